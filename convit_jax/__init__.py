"""ConViT in JAX: vision transformers whose attention layers start as convolutions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convit_jax.models.variants import create_model, list_models
    from convit_jax.weights.pretrained import load_pretrained, save_pretrained

__all__ = ["create_model", "list_models", "load_pretrained", "save_pretrained"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the public functions when they are used: preparing data needs no JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'convit_jax' has no attribute {name!r}")
    from convit_jax.models import variants
    from convit_jax.weights import pretrained

    return getattr(pretrained if name.endswith("_pretrained") else variants, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
