"""ConViT in JAX: vision transformers whose attention starts as a convolution and learns to let go."""

from convit_jax.models.variants import create_model, list_models

__all__ = ["create_model", "list_models"]
__version__ = "0.1.0"
