"""How many files a process may have open: data sets of a thousand shards need more than the usual 1,024."""

import resource

from convit_jax.errors import UserError


def allow(needed, who):
    """Raise this process's soft limit to `needed` open files, if it is lower.

    Raises:
      UserError: the hard limit is lower too. who: needs them, as "TFDS".
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"{who} needs {needed} open files, but a process may have {hard} here: "
                "raise that limit (ulimit -Hn)."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
