"""What attention looks at, measured before training and at every evaluation (analysis/locality.py says how).

The images lie evenly over the test, which a folder sorts by class; they are the same ones every time,
whatever the evaluation's batch, the devices and the processes; few, for this shall cost little next to the
evaluation.
"""

import itertools

import jax
import numpy as np
from flax import nnx

from convit_jax.analysis import locality
from convit_jax.data.augment import normalize
from convit_jax.training.sharding import gather, put_batch, replicated

SHARE, MOST = 100, 64  # one in so many of the test's images, at most so many
DIGITS = 4  # after the point, in the log


def make_attention_log(graphdef, config, plan, mesh):
    """A function that measures parameters (on the devices of the mesh), for the line of an evaluation.

    It gives, as lists over layers of lists over heads: "gates", "centre_x", "centre_y" and "span" of the
    GPSA blocks; "nonlocality" of all blocks, and with locality.as_logged "nonlocality_as_logged". What
    the model or config has not is left out. All processes call it together.
    """
    batch = None
    if count := image_count(config, len(plan.test.indices)):
        batch = put_batch(spread(plan.test, count, mesh.size), mesh)
    whole = gather(mesh)

    def measure(params, batch):
        model = nnx.merge(graphdef, whole(params))
        found = {}
        if model.gpsa_blocks is not None:
            centres, found["span"] = locality.centres_and_spans(model)
            found |= {
                "gates": model.gpsa_blocks.attn.gates(),
                "centre_x": centres[..., 0],
                "centre_y": centres[..., 1],
            }
        if batch is not None:
            images = normalize(batch["image"], tuple(config.data.mean), tuple(config.data.std))
            found["nonlocality"] = locality.nonlocality(model, images, valid=batch["valid"])
            if config.locality.as_logged:
                found["nonlocality_as_logged"] = locality.nonlocality(
                    model, images, valid=batch["valid"], as_logged=True
                )
        return found

    compiled = jax.jit(measure, out_shardings=replicated(mesh))

    def measured(params):
        found = jax.device_get(compiled(params, batch))
        return {name: (np.round(np.float64(value), DIGITS) + 0.0).tolist() for name, value in found.items()}

    return measured


def image_count(config, test_images):
    """How many images to look at: as config.locality.images asks for, or a share of the test."""
    if config.locality.images is None:
        return min(-(-test_images // SHARE), MOST)
    return min(config.locality.images, test_images)


def spread(example, count, devices):
    """This process's rows of `count` images of an EvalExample: the first readable one of as many equal parts.

    Every process reads all of them, so that they agree which these are. A part without any gives none. Empty
    rows, "valid" False, make up a multiple of `devices`.
    """
    edges = np.linspace(0, len(example.indices), count + 1).astype(int).tolist()
    parts = ((example([slot]) for slot in range(*part)) for part in itertools.pairwise(edges))
    found = [row for part in parts for row in itertools.islice((r for r in part if r["valid"][0]), 1)]
    end = len(example.indices)
    found.append(example(range(end, end + -len(found) % devices)))
    share = sum(len(row["valid"]) for row in found) // jax.process_count()
    ours = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return {name: np.concatenate([row[name] for row in found])[ours] for name in ("image", "valid")}
