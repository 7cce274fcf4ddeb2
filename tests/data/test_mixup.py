"""Mixup and cutmix: labels that tell exactly what was mixed, and the distributions of the definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.stats import beta, ks_2samp, kstest

from convit_jax.data.mixup import cutmix_box, mix, soft_labels

BOTH = dict(num_classes=4, smoothing=0.0, mixup=0.8, cutmix=1.0, prob=1.0, switch_prob=0.5)
ONLY_MIXUP = {**BOTH, "cutmix": 0.0}
ONLY_CUTMIX = {**BOTH, "mixup": 0.0}
EACH = pytest.mark.parametrize("settings", [BOTH, ONLY_MIXUP, ONLY_CUTMIX], ids=["both", "mixup", "cutmix"])
KEYS = 2000
HEIGHT, WIDTH = 9, 12
IMAGES = np.random.default_rng(0).normal(size=(4, HEIGHT, WIDTH, 2)).astype(np.float32)
LABELS = np.arange(4, dtype=np.int32)  # unlike its partner's, so that target [0, 0] is lambda


def mix_with_many_keys(settings):
    """Images [KEYS, B, H, W, C], soft labels [KEYS, B, classes] and lambdas [KEYS]."""
    keys = jax.random.split(jax.random.key(0), KEYS)
    mixed = jax.vmap(lambda key: mix(jnp.asarray(IMAGES), jnp.asarray(LABELS), key, **settings))(keys)
    images, targets = map(np.asarray, mixed)
    return images, targets, targets[:, 0, 0]


def own_and_partner(images):
    """bool [KEYS, B, H, W] twice: the pixel is the image's own; it is the partner's."""
    return (images == IMAGES).all(-1), (images == IMAGES[::-1]).all(-1)


def four_deviations(probability):
    return 4 * np.sqrt(probability * (1 - probability) / KEYS)


@pytest.mark.parametrize(("smoothing", "on", "off"), [(0.0, 1.0, 0.0), (0.1, 0.925, 0.025), (0.4, 0.7, 0.1)])
def test_soft_labels_spread_the_smoothing_over_all_classes(smoothing, on, off):
    labels = soft_labels(jnp.array([2, 0]), 4, smoothing)
    assert labels.dtype == jnp.float32
    np.testing.assert_allclose(labels, [[off, off, on, off], [on, off, off, off]], atol=1e-7)


@EACH
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_mix_those_of_an_image_and_its_partner_by_one_lambda(settings, smoothing):
    *_, lam = mix_with_many_keys(settings)
    _, targets, _ = mix_with_many_keys({**settings, "smoothing": smoothing})
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
    own = np.where(np.eye(4), 1 - smoothing * 0.75, smoothing * 0.25)
    lam = lam[:, None, None]
    np.testing.assert_allclose(targets, lam * own + (1 - lam) * own[::-1], atol=1e-6)
    assert lam.std() > 0.1


def test_mixup_blends_the_images_by_the_lambda_of_their_labels():
    images, _, lam = mix_with_many_keys(ONLY_MIXUP)
    lam = lam[:, None, None, None, None]
    np.testing.assert_allclose(images, lam * IMAGES + (1 - lam) * IMAGES[::-1], atol=1e-5)
    assert images.dtype == np.float32


def test_cutmix_takes_each_pixel_from_one_of_two_images_in_the_share_of_their_labels():
    images, _, lam = mix_with_many_keys(ONLY_CUTMIX)
    own, partner = own_and_partner(images)
    assert (own ^ partner).all()
    assert (own == own[:, :1]).all()  # one box for the batch
    np.testing.assert_allclose(lam, own[:, 0].mean((1, 2)), atol=1e-7)


def test_cutmix_cuts_one_rectangle():
    own, _ = own_and_partner(mix_with_many_keys(ONLY_CUTMIX)[0])
    cut = ~own[:, 0]
    rows, columns = cut.any(2), cut.any(1)
    np.testing.assert_array_equal(cut, rows[:, :, None] & columns[:, None, :])
    for lines in (rows, columns):  # without a gap
        assert (np.diff(lines, prepend=False, append=False, axis=1).sum(1) <= 2).all()


@pytest.mark.parametrize(
    ("lam", "half_height", "half_width"), [(0.0, 4, 6), (0.5, 3, 4), (0.75, 2, 3), (0.99, 0, 0), (1.0, 0, 0)]
)
def test_a_cutmix_box_has_any_centre_and_is_cut_at_the_borders(lam, half_height, half_width):
    keys = jax.random.split(jax.random.key(1), KEYS)
    boxes = jax.vmap(lambda key: jnp.stack(cutmix_box(key, lam, HEIGHT, WIDTH)))(keys)

    def spans(half, length):
        return [(max(centre - half, 0), min(centre + half, length)) for centre in range(length)]

    expected = {(*y, *x) for y in spans(half_height, HEIGHT) for x in spans(half_width, WIDTH)}
    assert set(map(tuple, boxes.tolist())) == expected


@pytest.mark.parametrize("alpha", [0.8, 0.2])
def test_the_lambda_of_mixup_has_the_beta_distribution_of_its_alpha(alpha):
    *_, lam = mix_with_many_keys({**ONLY_MIXUP, "mixup": alpha})
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 4 * np.sqrt(variance / KEYS)
    assert abs(lam.var() / variance - 1) < 0.06
    assert kstest(lam, beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_lambda_of_cutmix_is_that_of_a_box_of_beta_distributed_area_as_cut(alpha):
    rng = np.random.default_rng(0)
    side, pixels = np.sqrt(1 - rng.beta(alpha, alpha, 20_000)), 1
    for length in (HEIGHT, WIDTH):
        half, centre = (length * side).astype(int) // 2, rng.integers(length, size=len(side))
        pixels = pixels * (np.minimum(centre + half, length) - np.maximum(centre - half, 0))
    *_, lam = mix_with_many_keys({**ONLY_CUTMIX, "cutmix": alpha})
    assert ks_2samp(((1 - lam) * HEIGHT * WIDTH).round(), pixels).pvalue > 0.01


@pytest.mark.parametrize("switch_prob", [0.0, 0.3, 1.0])
def test_cutmix_is_chosen_with_switch_prob(switch_prob):
    images, _, lam = mix_with_many_keys({**BOTH, "switch_prob": switch_prob})
    own, partner = own_and_partner(images)
    by_cutmix = (own | partner).all((1, 2, 3))
    assert abs(by_cutmix.mean() - switch_prob) <= four_deviations(switch_prob)
    assert lam.std() > 0.1


@EACH
def test_a_batch_is_mixed_with_prob_and_else_left_alone_with_its_labels(settings):
    images, targets, lam = mix_with_many_keys({**settings, "prob": 0.3})
    alone = (images == IMAGES).all((1, 2, 3, 4))
    np.testing.assert_array_equal(alone, (targets == np.eye(4)).all((1, 2)))
    *_, lam_if_always = mix_with_many_keys(settings)
    mixed = 0.3 * (lam_if_always < 1).mean()  # a small box of cutmix may hold no pixel
    assert abs((~alone).mean() - mixed) < four_deviations(mixed)
    np.testing.assert_array_equal(lam[~alone], lam_if_always[~alone])


@pytest.mark.parametrize("change", [dict(prob=0.0), dict(mixup=0.0, cutmix=0.0)], ids=["prob", "alphas"])
def test_mixing_turned_off_leaves_the_images_and_the_soft_labels(change):
    settings = {**BOTH, "smoothing": 0.1, **change}
    images, targets = mix(jnp.asarray(IMAGES), jnp.asarray(LABELS), jax.random.key(0), **settings)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(targets, soft_labels(LABELS, 4, 0.1))


@pytest.mark.parametrize("settings", [ONLY_MIXUP, ONLY_CUTMIX], ids=["mixup", "cutmix"])
def test_a_batch_over_eight_devices_is_mixed_as_on_one(settings):
    devices = np.array(jax.devices())
    assert devices.size == 8
    images = np.random.default_rng(0).normal(size=(16, 8, 6, 3)).astype(np.float32)
    labels = np.arange(16, dtype=np.int32) % 4
    rows = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
    function = jax.jit(partial(mix, **settings))
    alone = function(*jax.device_put((images, labels), devices[0]), jax.random.key(5))
    shared = function(*jax.device_put((images, labels), rows), jax.random.key(5))
    assert not np.array_equal(alone[0], images)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)
