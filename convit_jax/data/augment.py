"""What happens to a batch on the device, before mixup: shift, horizontal flip, normalise.

Every draw is keyed by (seed, step) and the example's row in the global batch, so it does not
depend on how many devices share the batch.
"""

import jax
import jax.numpy as jnp


def normalize(images, mean, std):
    """uint8 [B, H, W, 3] -> float32, (images / 255 - mean) / std per channel."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def random_shift(images, padding, key):
    """Random crop of the black-padded image (torchvision's RandomCrop): uint8 [B, H, W, C] -> the same."""
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)

    def cut(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, corners)


def random_flip(images, key):
    """Each image [B, H, W, C] mirrored left to right with probability 0.5."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def augment(images, key, *, crop, padding, hflip, mean, std):
    """uint8 [B, H, W, 3] -> float32, augmented and normalised.

    crop: "pad" shifts by up to `padding` pixels; "resized" was done by the host. hflip: flip or not.
    """
    shift_key, flip_key = jax.random.split(key)
    if crop == "pad" and padding > 0:
        images = random_shift(images, padding, shift_key)
    if hflip:
        images = random_flip(images, flip_key)
    return normalize(images, mean, std)
