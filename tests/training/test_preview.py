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
    monkeypatch.setattr(preview, "STEPS", 4)
    plan = make_plan(config, devices=1)
    for step, row in enumerate(preview.preview_augmentation(config, plan)):
        batch = plan.train([3 * number + step % 3 for number in range(preview.IMAGES)])
        names = [plan.train.source.class_names[label] for label in batch["label"]]
        for number, (image, caption) in enumerate(row):
            shares = {name: int(share) / 100 for share, name in (line.split("% ") for line in caption.splitlines())}
            assert {*shares} == {names[number], names[-1 - number]}
            if len(shares) == 2:
                share, pixels = shares[names[number]], batch["image"] / 255
                mixed = share * pixels[number] + (1 - share) * pixels[-1 - number]
                np.testing.assert_allclose(image, mixed, atol=0.01)
