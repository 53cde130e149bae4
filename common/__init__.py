"""Helpers of the six stages."""


class UserError(Exception):
    """Something the user can put right: shown as one line with exit code 2, without traceback."""
