"""The montage shows what the training step trains on."""

import jax
import numpy as np
import pytest

from configs import default
from convit_jax.data.augment import stage_keys
from convit_jax.data.randaugment import Op, draw_operations
from convit_jax.errors import UserError
from convit_jax.figures import augmentations as montage
from convit_jax.training.plan import make_plan
from convit_jax.training.step import step_keys


@pytest.fixture
def config(image_folder):
    config = default.get_config()
    config.data.name, config.data.dir = "folder", str(image_folder)
    config.model.image_size = 16
    return config


def test_a_picture_of_a_folder_of_images(config, tmp_path, monkeypatch):
    from matplotlib.image import imread

    for name, number in (("IMAGES", 2), ("VERSIONS", 2), ("STEPS", 2)):
        monkeypatch.setattr(montage, name, number)
    montage.augmentation_montage(config, make_plan(config, devices=1), tmp_path / "all.png")
    height, width, _ = imread(tmp_path / "all.png").shape
    assert min(height, width) > 600
    with pytest.raises(UserError, match=r"cannot write the picture .*none/all.png"):
        montage.augmentation_montage(config, make_plan(config, devices=1), tmp_path / "none/all.png")


def test_it_shows_the_pixels_of_the_step(config):
    config.augment.update(policy="none", erase_prob=0.0, hflip=False, cutmix=0.0)
    plan = make_plan(config, devices=1)
    batch = plan.train(range(8))
    before, steps = montage.as_the_step_sees(config, batch, 3)
    np.testing.assert_allclose(before, batch["image"] / 255, atol=1e-6)
    assert len(steps) == montage.STEPS
    for mixed, targets in steps:
        share = targets[0, batch["label"][0]]
        assert np.abs(mixed - before).max() > 0.01
        low, high = np.minimum(before, before[::-1]), np.maximum(before, before[::-1])
        assert (mixed > low - 1e-6).all()
        assert (mixed < high + 1e-6).all()
        assert 0 < share <= 1


def test_captions_name_what_is_drawn_and_mixed(config):
    captions = montage.drawn_operations(config, 40)
    ops, _, _ = draw_operations(stage_keys(step_keys(0, 0)[0])["policy"], 40, config.augment)
    for caption, row in zip(captions, jax.device_get(ops), strict=True):
        assert len(caption.splitlines()) == (row != Op.NONE).sum()
    assert montage.operation_name(Op.ROTATE, 9.21, -1.0) == "Rotate -9.2"
    assert montage.operation_name(Op.TRANSLATE_X, 8.0, 1.0) == "TranslateX +8.0"
    assert montage.operation_name(Op.SOLARIZE_ADD, 9.5, -1.0) == "SolarizeAdd 9.5"
    assert montage.operation_name(Op.AUTO_CONTRAST, 9.5, -1.0) == "AutoContrast"
    names = ("ant", "bee", "cat")
    assert montage.label_shares(np.array([0.6, 0.3, 0.1]), [0, 1], names) == "60% ant\n30% bee"
    assert montage.label_shares(np.array([0.9, 0.05, 0.05]), [0, 1], names) == "90% ant"
    config.augment.policy = "none"
    assert montage.drawn_operations(config, 3) == ["", "", ""]
