"""What attention looks at (analysis/locality.py), measured before training and at every evaluation.

It is measured on the same few images every time, spread evenly over the test split because a folder sorts it
by class. Every process reads all of them and every device measures all: they are few.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convit_jax.analysis import locality
from convit_jax.data.augment import normalize
from convit_jax.data.examples import Batch, EvalExample
from convit_jax.training.plan import Plan
from convit_jax.training.sharding import gather, replicated
from convit_jax.training.step import Arrays


def make_attention_log(
    graphdef: nnx.GraphDef, config: ConfigDict, plan: Plan, mesh: Mesh
) -> Callable[[Any], dict[str, Any]]:
    """Returns a function that measures parameters: {name: list over layers of lists over heads}.

    What the model or the config does not have is left out. All processes call it together.
    """
    images = len(plan.test.indices)
    wanted = config.locality.images
    count = min(-(-images // 100), 64) if wanted is None else min(wanted, images)
    batch = spread_images(replace(plan.test, canvas=0), count) if count else None
    whole = gather(mesh)

    def measure(params: Any, batch: Arrays | None) -> Arrays:
        model, found = nnx.merge(graphdef, whole(params)), {}
        if model.gpsa_blocks is not None:
            centres, spans = locality.centres_and_spans(model)
            found["gates"], found["span"] = model.gpsa_blocks.attn.gates(), spans
            found["centre_x"], found["centre_y"] = centres[..., 0], centres[..., 1]
        if batch is not None:
            images, valid = normalize(batch["image"], tuple(config.data.mean), tuple(config.data.std)), batch["valid"]
            found["nonlocality"] = locality.nonlocality(model, images, valid=valid)
            if config.locality.as_logged:
                found["nonlocality_as_logged"] = locality.nonlocality(model, images, valid=valid, as_logged=True)
        return found

    compiled = jax.jit(measure, out_shardings=replicated(mesh))

    def rounded(params: Any) -> dict[str, Any]:
        found = jax.device_get(compiled(params, batch))
        return {name: (np.round(np.float64(value), 4) + 0.0).tolist() for name, value in found.items()}

    return rounded


def spread_images(example: EvalExample, count: int) -> Batch:
    """Returns a batch of `count` images, the first of each of `count` equal parts; "valid" is False if unreadable."""
    batch = example(np.linspace(0, len(example.indices), count + 1).astype(int)[:-1].tolist())
    return {name: batch[name] for name in ("image", "valid")}
