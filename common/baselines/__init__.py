"""Every other method of the paper's tables, and the controls."""
