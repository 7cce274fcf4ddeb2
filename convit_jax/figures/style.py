"""How figures look and how they are written: one set of colours, PNG to look at and PDF to print.

Fonts in the PDF are TrueType, as publishers ask for, and a file is never seen half-written.
"""

import os

from convit_jax.errors import UserError

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STYLE = {"pdf.fonttype": 42, "axes.spines.top": False, "axes.spines.right": False}


def save(figure, stem):
    """Write a Figure beside a path without ending, in a folder that is made if it is not there.

    Returns:
      [stem.png, stem.pdf].

    Raises:
      UserError: they cannot be written.
    """
    from matplotlib import rc_context

    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    for path in paths:
        beside = path.with_name(f"{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with rc_context(STYLE):
                figure.savefig(beside, format=path.suffix[1:], dpi=160)
            os.replace(beside, path)
        except OSError as error:
            raise UserError(
                f"cannot write the picture {path} ({error}): make room, or choose another folder."
            ) from error
    return paths
