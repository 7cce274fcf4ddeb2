"""Published weights: which repository of the Hugging Face Hub holds a model of the authors.

Files go into the Hub's usual cache on this machine and are fetched once; huggingface_hub shows the
progress, resumes what was cut off and checks what came.
"""

import re
from pathlib import Path

from convit_jax.errors import UserError, nearest

#  authors' name                      repository
PUBLISHED = {
    name: f"timm/{name}.fb_in1k"
    for name in (
        "convit_tiny",
        "convit_small",
        "convit_base",
        "deit_tiny_patch16_224",
        "deit_small_patch16_224",
        "deit_base_patch16_224",
        "deit_base_patch16_384",
        "deit_tiny_distilled_patch16_224",
        "deit_small_distilled_patch16_224",
        "deit_base_distilled_patch16_224",
        "deit_base_distilled_patch16_384",
    )
}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are looked for


def repository(source):
    """The Hub id that a source names, either itself or by the authors' name of a model; or None."""
    if source in PUBLISHED:
        return PUBLISHED[source]
    file = source.endswith((".pth", ".pt", ".bin", ".safetensors"))
    return source if re.fullmatch(r"[\w-]+/[\w.-]+", source) and not file else None


def download(repo):
    """The folder with config.json and the weights of a Hub repository, downloaded if they are not there.

    Raises:
      UserError: no connection, no such repository, or one without weights.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        config = hf_hub_download(repo, "config.json")
        for name in WEIGHTS:
            try:
                hf_hub_download(repo, name)
                return Path(config).parent
            except errors.RemoteEntryNotFoundError:
                continue
        raise UserError(f"{repo} on the Hub has no {' or '.join(WEIGHTS)}: give another repository.")
    except errors.RemoteEntryNotFoundError as error:
        raise UserError(f"{repo} on the Hub has no config.json: give a repository of timm's.") from error
    except errors.RepositoryNotFoundError as error:
        hint = nearest(repo, PUBLISHED.values())
        raise UserError(
            f"there is no repository {repo} on the Hub, or you must log in to see it{hint} "
            f"The published models are: {', '.join(PUBLISHED)}."
        ) from error
    except UserError:
        raise
    except Exception as error:  # of whichever library below fails first
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        if isinstance(error, errors.LocalEntryNotFoundError):
            reason = "no connection to it, and no copy in the cache"
        raise UserError(
            f"cannot download {repo} from the Hub ({reason}): connect and start again, or download its "
            f"{' or '.join(WEIGHTS)} elsewhere and give the file's path."
        ) from error
