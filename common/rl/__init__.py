"""What samples, scores and updates a policy."""

import contextlib

from common import UserError


@contextlib.contextmanager
def in_one_line(what: str, advice: str):
    """Whatever a library raises becomes a UserError of one line: `what` failed, why, `advice`."""
    try:
        yield
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{what} ({why}): {advice}") from error
