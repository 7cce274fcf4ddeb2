"""Downloads published weights from the Hugging Face Hub into its usual cache."""

import re
from pathlib import Path

from convit_jax.errors import UserError, nearest

PUBLISHED = {  # the authors' name: the repository
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
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that exists is taken


def repository(source: str) -> str | None:
    """Returns the Hub id that a source names, directly or by the authors' name of a model, or None."""
    if source in PUBLISHED:
        return PUBLISHED[source]
    is_file = source.endswith((".pth", ".pt", ".bin", ".safetensors"))
    return source if re.fullmatch(r"[\w-]+/[\w.-]+", source) and not is_file else None


def download(repo: str) -> Path:
    """Returns the folder with config.json and the weights of a Hub repository, downloaded once.

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
    except Exception as error:  # of any library that the download goes through
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        if isinstance(error, errors.LocalEntryNotFoundError):
            reason = "no connection to it, and no copy in the cache"
        raise UserError(
            f"cannot download {repo} from the Hub ({reason}): connect and try again, or download its "
            f"{' or '.join(WEIGHTS)} elsewhere and give the file's path."
        ) from error
