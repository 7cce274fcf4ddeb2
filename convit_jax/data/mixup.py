"""Mixup and cutmix of a batch with its reverse, and the soft labels (timm's `Mixup` in mode "batch")."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


def mix_batch(
    images: jax.Array, labels: jax.Array, key: jax.Array, settings: ConfigDict, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """Mixes images float32 [B, H, W, C] and labels int32 [B] by mixup (arXiv 1710.09412) or cutmix (1905.04899).

    The choice and lambda are those of the whole batch. settings is config.augment. Returns (images, soft labels
    float32 [B, num_classes]).
    """
    mixup, cutmix = settings.mixup, settings.cutmix
    smoothing = settings.label_smoothing  # 1 - s + s / C at the label and s / C elsewhere
    targets = jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes
    if settings.mix_prob == 0.0 or (mixup == 0.0 and cutmix == 0.0):
        return images, targets
    on_key, switch_key, lam_key, box_key = jax.random.split(key, 4)
    height, width = images.shape[1:3]
    if mixup == 0.0 or cutmix == 0.0:
        use_cutmix = jnp.asarray(mixup == 0.0)
    else:
        use_cutmix = jax.random.bernoulli(switch_key, settings.mix_switch_prob)
    alpha = jnp.where(use_cutmix, cutmix, mixup)
    lam = jax.random.beta(lam_key, alpha, alpha)
    top, bottom, left, right = cutmix_box(box_key, lam, height, width)
    cutmix_lam = 1.0 - ((bottom - top) * (right - left)) / (height * width)  # of the box as cut
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    lam = jnp.where(use_cutmix, cutmix_lam, lam)
    lam = jnp.where(jax.random.bernoulli(on_key, settings.mix_prob), lam, 1.0)
    # The share of the image itself in each pixel: 1 outside and 0 inside the box, or lambda everywhere.
    share = jnp.where(use_cutmix & (lam < 1.0), 1.0 - inside, lam)[None, :, :, None]
    mixed = images * share + images[::-1] * (1.0 - share)
    return mixed, targets * lam + targets[::-1] * (1.0 - lam)


def cutmix_box(key: jax.Array, lam: jax.Array, height: int, width: int) -> tuple[jax.Array, ...]:
    """Returns (top, bottom, left, right) of a box of area 1 - lam around a random centre.

    timm's `rand_bbox`: the box is cut at the borders, and an odd side loses a pixel (timm 1.0 keeps it).
    """
    y_key, x_key = jax.random.split(key)
    side = jnp.sqrt(1.0 - lam)
    half_h, half_w = (height * side).astype(jnp.int32) // 2, (width * side).astype(jnp.int32) // 2
    y, x = jax.random.randint(y_key, (), 0, height), jax.random.randint(x_key, (), 0, width)
    top_bottom = (jnp.clip(edge, 0, height) for edge in (y - half_h, y + half_h))
    left_right = (jnp.clip(edge, 0, width) for edge in (x - half_w, x + half_w))
    return (*top_bottom, *left_right)
