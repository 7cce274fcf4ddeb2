"""UserError, the exception for everything that the user can fix, and helpers that phrase its message."""

import contextlib
import difflib
import os
import traceback
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Bad input. The message says what is wrong, with the value, and what to do."""


@contextlib.contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns errors raised while reading `path` into a UserError that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path.") from error
    except MemoryError as error:
        raise UserError(f"cannot read {path}: not enough memory.") from error
    except Exception as error:  # libraries do not document what they raise for a damaged file
        reason = f"{type(error).__name__}: {printable(str(error))}"
        raise UserError(f"cannot read {path}: it is damaged ({reason}): download or save it again.") from error


def printable(text: str) -> str:
    """Returns text from a file as it may be printed: short and ASCII only."""
    return ascii(text if len(text) <= 100 else f"{text[:97]}...")[1:-1]


def known_cause(error: Exception) -> str | None:
    """Returns the message for an error of JAX or pathlib that the user can remedy, or None for any other."""
    text, platforms = str(error), os.environ.get("JAX_PLATFORMS")
    if "RESOURCE_EXHAUSTED" in text:
        return (
            f"the device ran out of memory ({text.splitlines()[0]}): lower batch_size (eval_batch_size in an "
            "evaluation), raise accumulate, set model.remat=True, or use mesh.fsdp with several devices."
        )
    if "home directory" in text:  # pathlib's words
        return "a path begins with ~, but the home directory is unknown: write the path out, or set HOME."
    # JAX's function; for cuda it fails an assertion that has no message.
    if platforms and [frame.name for frame in traceback.extract_tb(error.__traceback__)[-1:]] == ["backends"]:
        remedy = 'unset it, or install JAX for it, as pip install "jax[cuda12]".'
        return f"JAX cannot use JAX_PLATFORMS={platforms}: {remedy}"
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: ", did you mean 'X'?" or "."."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else "."
