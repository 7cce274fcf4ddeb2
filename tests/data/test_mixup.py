"""Mixup and cutmix: labels that tell exactly what was mixed, and the distributions of the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy.stats import beta, ks_2samp, kstest

from convit_jax.data.mixup import mix_batch

CLASSES, KEYS = 4, 2000
HEIGHT, WIDTH = 9, 12
IMAGES = np.random.default_rng(0).normal(size=(4, HEIGHT, WIDTH, 2)).astype(np.float32)
LABELS = np.arange(4, dtype=np.int32)  # unlike its partner's
SMOOTHING = 0.1
OWN = np.where(np.eye(4), 1 - SMOOTHING * 0.75, SMOOTHING * 0.25)  # soft labels without mixing


def settings(**changes):
    both = dict(mixup=0.8, cutmix=1.0, mix_prob=1.0, mix_switch_prob=0.3, label_smoothing=SMOOTHING)
    return ConfigDict(both | changes)


@functools.cache
def mix_with_many_keys(**changes):
    """Images [KEYS, B, H, W, C], soft labels [KEYS, B, classes] and lambdas [KEYS]."""
    keys = jax.random.split(jax.random.key(0), KEYS)
    mix = functools.partial(mix_batch, settings=settings(**changes), num_classes=CLASSES)
    images, targets = jax.jit(jax.vmap(lambda key: mix(jnp.asarray(IMAGES), jnp.asarray(LABELS), key)))(keys)
    targets = np.asarray(targets)
    return np.asarray(images), targets, (targets[:, 0, 0] - OWN[3, 0]) / (OWN[0, 0] - OWN[3, 0])


def test_mixup_blends_images_and_labels_by_one_lambda_of_the_beta_distribution():
    alpha = 0.2
    images, targets, lam = mix_with_many_keys(mixup=alpha, cutmix=0.0)
    for mixed, own in ((images, IMAGES), (targets, OWN)):
        share = lam.reshape(-1, *(1,) * own.ndim)
        np.testing.assert_allclose(mixed, share * own + (1 - share) * own[::-1], atol=1e-5)
        assert mixed.dtype == np.float32
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.var() / variance - 1) < 0.06
    assert kstest(lam, beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_cuts_one_rectangle_whose_area_is_in_the_labels():
    alpha = 0.3
    images, _, lam = mix_with_many_keys(mixup=0.0, cutmix=alpha)
    own, partner = ((images == each).all(-1) for each in (IMAGES, IMAGES[::-1]))
    assert (own ^ partner).all()
    assert (own == own[:, :1]).all()  # one box for the batch
    np.testing.assert_allclose(lam, own[:, 0].mean((1, 2)), atol=1e-6)
    cut = ~own[:, 0]
    rows, columns = cut.any(2), cut.any(1)
    np.testing.assert_array_equal(cut, rows[:, :, None] & columns[:, None, :])
    for lines in (rows, columns):  # without a gap
        assert (np.diff(lines, prepend=False, append=False, axis=1).sum(1) <= 2).all()
    rng = np.random.default_rng(0)
    side, pixels = np.sqrt(1 - rng.beta(alpha, alpha, 20_000)), 1
    for length in (HEIGHT, WIDTH):  # the area of the definition, cut at the borders
        half, centre = (length * side).astype(int) // 2, rng.integers(length, size=len(side))
        pixels = pixels * (np.minimum(centre + half, length) - np.maximum(centre - half, 0))
    assert ks_2samp(((1 - lam) * HEIGHT * WIDTH).round(), pixels).pvalue > 0.01


def test_a_batch_is_mixed_with_prob_by_cutmix_with_switch_prob_and_otherwise_keeps_its_labels():
    images, targets, lam = mix_with_many_keys(mix_prob=0.3)
    alone = (images == IMAGES).all((1, 2, 3, 4))
    np.testing.assert_array_equal(alone, np.isclose(targets, OWN, atol=1e-7).all((1, 2)))
    always, _, lam_if_always = mix_with_many_keys()
    by_cutmix = ((always == IMAGES) | (always == IMAGES[::-1])).all((1, 2, 3, 4))
    assert abs(by_cutmix.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / KEYS)  # mix_switch_prob
    mixed = 0.3 * (lam_if_always < 1 - 1e-6).mean()  # a small box of cutmix may hold no pixel
    assert abs((~alone).mean() - mixed) < 4 * np.sqrt(0.3 * 0.7 / KEYS)
    np.testing.assert_array_equal(lam[~alone], lam_if_always[~alone])


def test_mixing_turned_off_leaves_the_images_and_the_soft_labels():
    off = settings(mixup=0.0, cutmix=0.0)
    images, targets = mix_batch(jnp.asarray(IMAGES), jnp.asarray(LABELS), jax.random.key(0), off, CLASSES)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_allclose(targets, OWN, atol=1e-7)
