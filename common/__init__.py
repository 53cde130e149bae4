"""Helpers of the six stages."""


class UserError(Exception):
    """Something the user can put right. Shown as one line with exit code 2, never as a traceback."""
