"""Helpers of the six stages."""

import contextlib


class UserError(Exception):
    """Something the user can put right: shown as one line with exit code 2, without traceback."""


@contextlib.contextmanager
def in_one_line(what: str, advice: str, kinds=Exception):
    """What a library raises becomes a UserError of one line: `what` failed, why, `advice`."""
    try:
        yield
    except kinds as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{what} ({why}): {advice}") from error
