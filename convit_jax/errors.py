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


def out_of_memory(error):
    """The sentence for a JaxRuntimeError that says that a device has no memory left; None for another one."""
    first = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return (
        f"the device has not enough memory ({first}): lower batch_size, or eval_batch_size if it was an "
        "evaluation, raise accumulate, set model.remat=True, or with several devices mesh.fsdp."
    )


def nearest(name, known):
    """The end of a sentence about an unknown name: ', did you mean X?' if one is close, else '.'."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else "."
