"""The one exception for things that the user can put right, and how it is said of a file.

Its message is a sentence that names the thing and the remedy; commands print
it alone, without a trace.
"""

import contextlib
import difflib


class UserError(ValueError):
    """Bad input: the message is complete, says what is wrong and what to do."""


@contextlib.contextmanager
def explained(path):
    """What goes wrong inside while `path` is read is said in one sentence."""
    try:
        yield
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path.") from error
    except MemoryError as error:
        raise UserError(f"cannot read {path}: there is not enough memory for it.") from error


def nearest(name, known):
    """The end of a sentence about an unknown name: ', did you mean X?' if one is close, else '.'."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else "."
