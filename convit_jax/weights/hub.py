"""Finds weights on the disk, or downloads them from the Hugging Face Hub into its usual cache."""

import re
import textwrap
from pathlib import Path

from convit_jax.errors import UserError, nearest

# fmt: off
PUBLISHED = {name: f"timm/{name}.fb_in1k" for name in (  # the authors' name: the repository
    "convit_tiny", "convit_small", "convit_base",
    "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_224", "deit_base_distilled_patch16_384",
)}
# fmt: on
PUBLISHED |= {f"deit_{size}": PUBLISHED[f"deit_{size}_patch16_224"] for size in ("tiny", "small", "base")}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one of them is in a repository


def fetch(source: str) -> Path:
    """Returns the path of weights: `source` itself, or the folder of what the Hub has under that name."""
    path, repo = Path(source).expanduser(), PUBLISHED.get(source, source)
    if path.exists():
        return path
    if re.fullmatch(r"[\w-]+/[\w.-]+", repo) and not repo.endswith((".pth", ".pt", ".bin", ".safetensors")):
        try:
            from huggingface_hub import errors, hf_hub_download

            config = hf_hub_download(repo, "config.json")
            try:
                hf_hub_download(repo, WEIGHTS[0])
            except errors.RemoteEntryNotFoundError:
                hf_hub_download(repo, WEIGHTS[1])
            return Path(config).parent
        except Exception as error:  # of any library that the download goes through
            reason = textwrap.shorten(str(error), 200) or type(error).__name__
            raise UserError(
                f"there is no file or directory {source}, and the Hub does not give {repo} ({reason}): check "
                f"the name and the connection, or download {WEIGHTS[0]} and config.json yourself and give the folder."
            ) from None
    raise UserError(
        f"there is no file or directory {source}, and no published model of that name"
        f"{nearest(source, PUBLISHED)} The published models are: {', '.join(PUBLISHED)}."
    )
