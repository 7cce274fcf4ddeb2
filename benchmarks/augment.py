"""What augmentation on the device costs next to the training step that it belongs to.

    python -m benchmarks.augment --model=convit_small --batch=512       # a GPU
    python -m benchmarks.augment --model=convit_small --batch=8 --dtype=float32 --rounds=5

Programs run in turn, one call each a round; the numbers are the median and the least of the rounds. (Where
other work shares the machine, the least is steadier.) A stage alone reads and writes all pixels, some of
which the compiled step saves.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from configs import default
from convit_jax.data.augment import normalize, random_erasing, random_flip
from convit_jax.data.mixup import mix
from convit_jax.data.randaugment import randaugment
from convit_jax.models.variants import abstract_model, initial_params, model_settings
from convit_jax.training.optimizer import make_optimizer
from convit_jax.training.step import augmented, make_train_step, new_state, step_keys, train_metrics

NUM_CLASSES = 1000
ALL, BARE, FULL = "all of them", "training step without augmentation", "training step with all of them"


def photos(count, size):
    """Random crops of scikit-learn's two photos, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]

    def crop(number):
        side = rng.uniform(100, 400)
        left, top = rng.uniform(0, 640 - side), rng.uniform(0, 427 - side)
        box = (left, top, left + side, top + side)
        return np.asarray(sources[number % 2].resize((size, size), Image.Resampling.BICUBIC, box=box))

    return np.stack([crop(number) for number in range(count)])


def stages(config):
    """Name -> function of a batch, its normalised images and a step's keys: each stage, and all of them."""
    aug, mean, std = config.augment, tuple(config.data.mean), tuple(config.data.std)
    draws = dict(magnitude=aug.magnitude, magnitude_std=aug.magnitude_std, num_ops=aug.num_ops)
    mixing = dict(mixup=aug.mixup, cutmix=aug.cutmix, prob=aug.mix_prob, switch_prob=aug.mix_switch_prob)
    labels = dict(num_classes=NUM_CLASSES, smoothing=aug.label_smoothing)
    return {
        "flip, normalise": lambda batch, _, keys: normalize(random_flip(batch["image"], keys[0]), mean, std),
        "RandAugment": lambda batch, _, keys: randaugment(
            batch["image"], keys[0], fill=(124, 116, 104), **draws
        ),
        "random erasing": lambda _, images, keys: random_erasing(images, keys[0], aug.erase_prob),
        "mixup, cutmix": lambda batch, images, keys: mix(images, batch["label"], keys[1], **labels, **mixing),
        ALL: lambda batch, _, keys: augmented(batch, keys, config, NUM_CLASSES),
    }


def one_stage(function, batch, images):
    """A function of a step's number that runs a stage and waits for it."""
    compiled = jax.jit(lambda batch, images, step: function(batch, images, step_keys(0, step)))
    return lambda number: jax.block_until_ready(compiled(batch, images, number))


def train_step(config, batch):
    """The same for a whole training step with a config; the state is its own."""
    arguments = {name: value for name, value in config.model.items() if value is not None}
    settings = model_settings(**{"num_classes": NUM_CLASSES, **arguments})
    graphdef, shapes = abstract_model(settings)
    optimizer = make_optimizer(config.optim, lambda step: 1e-3, shapes)
    step = jax.jit(
        make_train_step(graphdef, optimizer, lambda step: 1e-3, config, NUM_CLASSES), donate_argnums=0
    )
    state = jax.jit(lambda: new_state(initial_params(settings, 0), optimizer, ema=False))()

    def run(number):
        nonlocal state
        state, metrics = step(state, train_metrics(), batch, np.uint32(0))
        jax.block_until_ready(metrics)

    return run


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="convit_small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file to write the numbers to")
    options = parser.parse_args()

    config = default.get_config()
    config.batch_size = options.batch
    config.model.update(name=options.model, image_size=options.image_size, dtype=options.dtype)
    bare = config.copy_and_resolve_references()
    bare.augment.update(policy="none", erase_prob=0.0, hflip=False, mixup=0.0, cutmix=0.0)
    images = photos(options.batch, options.image_size)
    batch = jax.device_put({"image": images, "label": np.arange(options.batch, dtype=np.int32) % NUM_CLASSES})
    floats = jax.jit(lambda x: normalize(x, config.data.mean, config.data.std))(batch["image"])

    programs = {name: one_stage(function, batch, floats) for name, function in stages(config).items()}
    programs |= {BARE: train_step(bare, batch), FULL: train_step(config, batch)}
    times = {name: [] for name in programs}
    for number in range(options.rounds + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            program(number)
            if number:  # the first round compiles
                times[name].append((time.perf_counter() - began) / options.batch * 1e3)
    report = {"device": jax.devices()[0].device_kind, **vars(options)}
    print(*(report[name] for name in ("device", "model", "image_size", "batch", "dtype")))
    for name, reduce in (("median", statistics.median), ("least", min)):
        values = report[name] = {program: reduce(of_rounds) for program, of_rounds in times.items()}
        for program, value in values.items():
            print(f"{name:6s} {program:35s} {value:9.4f} ms an image")
        print(f"{name:6s} augmentation alone / step without: {100 * values[ALL] / values[BARE]:.1f} %")
        print(f"{name:6s} step with / step without: {100 * values[FULL] / values[BARE]:.1f} %")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
