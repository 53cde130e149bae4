"""placeholder"""
def write(run):
    return ""
