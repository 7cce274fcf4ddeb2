"""Mixup and cutmix of a batch with its reverse, and the soft labels that belong to them.

As timm's Mixup in batch mode, which the recipe uses: one choice and one lambda for a batch,
label smoothing within the labels.
"""

import jax
import jax.numpy as jnp


def soft_labels(labels, num_classes, smoothing):
    """int [B] -> float32 [B, num_classes]: 1 - s + s / C on the label, s / C elsewhere."""
    off = smoothing / num_classes
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + off


def cutmix_box(key, lam, height, width):
    """(top, bottom, left, right) of a box of area 1 - lam around a random centre, cut at the borders.

    An odd side loses a pixel, as in the timm of the original's time; timm 1.0 keeps it.
    """
    y_key, x_key = jax.random.split(key)
    side = jnp.sqrt(1.0 - lam)
    half_h, half_w = (height * side).astype(jnp.int32) // 2, (width * side).astype(jnp.int32) // 2
    y, x = jax.random.randint(y_key, (), 0, height), jax.random.randint(x_key, (), 0, width)
    return (
        jnp.clip(y - half_h, 0, height),
        jnp.clip(y + half_h, 0, height),
        jnp.clip(x - half_w, 0, width),
        jnp.clip(x + half_w, 0, width),
    )


def mix(images, labels, key, *, num_classes, smoothing, mixup, cutmix, prob, switch_prob):
    """Mix a batch with its reverse.

    Args:
      images: float32 [B, H, W, C]. labels: int32 [B]. key: PRNG key of the step.
      num_classes, smoothing: of the soft labels.
      mixup, cutmix: alpha of the Beta distribution of each lambda; 0 turns it off.
      prob: of mixing a batch at all. switch_prob: of cutmix where both are on.

    Returns:
      (images, soft labels float32 [B, num_classes]).
    """
    targets = soft_labels(labels, num_classes, smoothing)
    if prob == 0.0 or (mixup == 0.0 and cutmix == 0.0):
        return images, targets
    on_key, switch_key, lam_key, box_key = jax.random.split(key, 4)
    height, width = images.shape[1:3]
    if mixup == 0.0 or cutmix == 0.0:
        use_cutmix = jnp.asarray(mixup == 0.0)
    else:
        use_cutmix = jax.random.bernoulli(switch_key, switch_prob)
    alpha = jnp.where(use_cutmix, cutmix, mixup)
    lam = jax.random.beta(lam_key, alpha, alpha)
    top, bottom, left, right = cutmix_box(box_key, lam, height, width)
    cutmix_lam = 1.0 - ((bottom - top) * (right - left)) / (height * width)  # of the box as cut
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    lam = jnp.where(use_cutmix, cutmix_lam, lam)
    lam = jnp.where(jax.random.bernoulli(on_key, prob), lam, 1.0)
    # The share of the image itself, per pixel: 1 outside and 0 inside the box, or lambda everywhere.
    share = jnp.where(use_cutmix & (lam < 1.0), 1.0 - inside, lam)[None, :, :, None]
    mixed = images * share + images[::-1] * (1.0 - share)
    return mixed, targets * lam + targets[::-1] * (1.0 - lam)
