"""The preview of augmentation shows what the training step trains on; test_visualize.py draws it."""

import numpy as np

from configs import default
from convit_jax.training import preview
from convit_jax.training.plan import make_plan


def test_it_shows_the_pixels_and_labels_of_the_steps(image_folder, monkeypatch):
    config = default.get_config()
    config.data.name, config.data.dir = "folder", str(image_folder)
    config.model.image_size = 16
    config.augment.update(policy="none", erase_prob=0.0, hflip=False, cutmix=0.0, label_smoothing=0.0)
    monkeypatch.setattr(preview, "STEPS", 2)
    plan = make_plan(config, devices=1)
    crops, mixed = preview.preview_augmentation(config, plan)
    batch = plan.train([3 * (row // preview.VERSIONS) + row % 3 for row in range(preview.IMAGES * preview.VERSIONS)])
    before = np.stack([image for row in crops for image, _ in row])
    np.testing.assert_allclose(before, batch["image"] / 255, atol=1e-6)
    names = [plan.train.source.class_names[label] for label in batch["label"][[0, -1]]]
    assert (crops[0][0][1], crops[-1][-1][1]) == tuple(names)
    for image, caption in (row[0] for row in mixed):
        share = float(caption.partition("%")[0]) / 100
        assert caption.splitlines() == [f"{100 * share:.0f}% {names[0]}", f"{100 - 100 * share:.0f}% {names[1]}"]
        np.testing.assert_allclose(image, share * before[0] + (1 - share) * before[-1], atol=0.01)
        assert np.abs(image - before[0]).max() > 0.01
