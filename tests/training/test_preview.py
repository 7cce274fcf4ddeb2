"""The preview of augmentation shows what the training step trains on; test_visualize.py draws it."""

import jax
import numpy as np
import pytest

from configs import default
from convit_jax.data.augment import stage_keys
from convit_jax.data.randaugment import Op, draw_operations
from convit_jax.training import preview
from convit_jax.training.plan import make_plan
from convit_jax.training.step import step_keys


@pytest.fixture
def config(image_folder):
    config = default.get_config()
    config.data.name, config.data.dir = "folder", str(image_folder)
    config.model.image_size = 16
    return config


def test_it_shows_the_pixels_of_the_step(config):
    config.augment.update(policy="none", erase_prob=0.0, hflip=False, cutmix=0.0)
    batch = make_plan(config, devices=1).train(range(8))
    before, steps = preview.augment_batch(config, batch, 3)
    np.testing.assert_allclose(before, batch["image"] / 255, atol=1e-6)
    assert len(steps) == preview.STEPS
    low, high = np.minimum(before, before[::-1]), np.maximum(before, before[::-1])
    for mixed, targets in steps:
        assert np.abs(mixed - before).max() > 0.01
        assert ((mixed > low - 1e-6) & (mixed < high + 1e-6)).all()
        assert 0 < targets[0, batch["label"][0]] <= 1


def test_captions_name_what_is_drawn_and_mixed(config):
    captions = preview.list_operations(config, 40)
    ops = jax.device_get(draw_operations(stage_keys(step_keys(0, 0)[0])["policy"], 40, config.augment)[0])
    for caption, row in zip(captions, ops, strict=True):
        assert caption.splitlines() == [Op(op).name.title().replace("_", "") for op in row if op != Op.NONE]
    names = ("ant", "bee", "cat")
    assert preview.format_shares(np.array([0.6, 0.3, 0.1]), np.array([0, 1]), names) == "60% ant\n30% bee"
    assert preview.format_shares(np.array([0.9, 0.05, 0.05]), np.array([0, 1]), names) == "90% ant"
    config.augment.policy = "none"
    assert preview.list_operations(config, 3) == ["", "", ""]
