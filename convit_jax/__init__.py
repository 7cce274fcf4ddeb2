"""ConViT in JAX: vision transformers whose attention starts as a convolution and learns to let go."""

__all__ = ["create_model", "list_models", "load_pretrained"]
__version__ = "0.1.0"


def __getattr__(name):
    """The public names come when they are asked for: preparing data needs no JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'convit_jax' has no attribute {name!r}")
    if name == "load_pretrained":
        from convit_jax.weights.pretrained import load_pretrained

        return load_pretrained
    from convit_jax.models import variants

    return getattr(variants, name)
