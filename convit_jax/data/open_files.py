"""How many files a process may have open: data sets of a thousand shards need more than the usual 1,024."""

import resource

from convit_jax.errors import UserError


def allow(needed, who, otherwise=""):
    """Raise this process's soft limit on open files if it is lower than needed.

    Args:
      needed: files. who: what needs them, as "TFDS", for the sentence. otherwise: another remedy to name.

    Raises:
      UserError: the hard limit is lower too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"{who} needs {needed:,} open files, but a process may have {hard:,} here (ulimit -Hn): "
                f"have that limit raised{otherwise}."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
