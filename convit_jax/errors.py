"""The one exception for things that the user can put right.

Its message is a sentence that names the thing and the remedy; commands print
it alone, without a trace.
"""

import difflib


class UserError(ValueError):
    """Bad input: the message is complete, says what is wrong and what to do."""


def nearest(name, known):
    """The end of a sentence about an unknown name: ', did you mean X?' if one is close, else '.'."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else "."
