"""Chooses how a run computes attention: tries each form on the run's own device and shapes, takes the fastest."""

import dataclasses
import functools
import math
import timeit
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from convit_jax.models import kernels
from convit_jax.models.variants import model_settings
from convit_jax.models.vit import Block, Settings, patch_grid
from convit_jax.training.distributed import from_all, say
from convit_jax.training.plan import Plan

FORMS = ("xla", "cudnn")
TOLERANCE = 0.03  # of relative errors; rounding to bfloat16 gives 0.007
GAIN = 1.1  # that makes another form than xla worth it: noise must not decide between two runs


def choose_forms(config: ConfigDict, plan: Plan, devices: int, kept: dict[str, Any] | None) -> Plan:
    """Returns the plan with what "auto" means here; kept: run.json of a run that continues, whose forms stay."""
    auto = [name for name in ("dtype", "attention", "scan_unroll") if config.model[name] == "auto"]
    model = plan.model | {name: kept[name] for name in auto if kept and name in kept}  # plan.model has defaults
    if kept and model["attention"] != kept.get("attention"):
        model["scan_unroll"] = plan.model["scan_unroll"]
    if kept is None and "dtype" in auto and jax.default_backend() != "cpu":
        model["dtype"] = "bfloat16"
    if kept is None and auto and all(from_all(kernels.cudnn_available())):
        if "attention" in auto and model["dtype"] == "bfloat16":
            model["attention"] = _fastest(model, plan.batch_size // devices // config.accumulate)
        if "scan_unroll" in auto and model["attention"] == "cudnn":
            model["scan_unroll"] = model["depth"]
    return dataclasses.replace(plan, model=model)


def _fastest(settings: Settings, batch: int) -> str:
    """The form that is the fastest in all processes, "xla" if no other is GAIN times as fast; prints a line."""
    found = [max(results) for results in zip(*from_all(_try_forms(settings, batch)), strict=True)]
    fastest = FORMS[int(np.argmin([found[0][0], *(GAIN * seconds for seconds, _ in found[1:])]))]
    say(f"Attention, {batch} images, with gradient: {', '.join(text for _, text in found)}. The run uses {fastest}.")
    return fastest


def _try_forms(settings: Settings, batch: int) -> list[tuple[float, str]]:
    """(seconds, text) of each form; infinite seconds if it fails or differs from the definition in float32."""
    settings = settings | {"drop_rate": 0.0, "attn_drop_rate": 0.0}
    few = math.gcd(batch, 8)  # images, repeated to fill the batch: the definition needs much memory

    @functools.cache
    def exact() -> Any:
        explicit = {"attention": "xla", "dtype": "float32", "attn_drop_rate": 1e-9}  # which drops nothing
        with jax.default_matmul_precision("highest"):
            return _measure(settings | explicit, few, 1)[0]

    found = []
    for form in FORMS:
        try:
            checked = model_settings("convit_tiny", **settings | {"attention": form})  # every setting is given
            result, seconds, compiling = _measure(checked, few, batch // few)
            off = float(_largest_error(result, exact()))
            if off < TOLERANCE:
                found.append((seconds, f"{form} {1000 * seconds:.2f} ms (compiled in {compiling:.1f} s)"))
            else:
                found.append((math.inf, f"{form} is not used (off by {off:.1%} from float32)"))
        except Exception as error:  # whatever a form does on this machine, the run goes on
            found.append((math.inf, f"{form} is not used ({error!r:.100})"))
    return found


def _measure(settings: Settings, few: int, repeats: int) -> tuple[Any, float, float]:
    """(gradients and outputs, seconds of a step, seconds to compile it) of an attention layer of each kind."""
    dim, patches, rng = settings["embed_dim"], math.prod(patch_grid(settings)), np.random.default_rng(0)
    tokens = {True: patches} if settings["local_up_to_layer"] else {}  # of GPSA, then of plain attention
    tokens[False] = patches + (2 if settings["distilled"] else 1)
    layers: Any = nnx.eval_shape(lambda: [Block(settings, gpsa=gpsa, rngs=nnx.Rngs(0)).attn for gpsa in tokens])
    graphdef, shapes = nnx.split(layers)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) * dim**-0.5, shapes)
    inputs = [rng.standard_normal((few, count, dim), np.float32) for count in tokens.values()]

    def loss(params: Any, inputs: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
        xs = [jnp.tile(x, (repeats, 1, 1)) for x in inputs]
        layers = zip(nnx.merge(graphdef, params), xs, strict=True)
        outputs = [layer(x.astype(settings["dtype"]), key=jax.random.key(0)) for layer, x in layers]
        return sum(jnp.sum(out * x) for out, x in zip(outputs, xs, strict=True)) / repeats, outputs

    began, arguments = timeit.default_timer(), jax.device_put((params, inputs))
    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*arguments).compile()
    compiling, result = timeit.default_timer() - began, step(*arguments)
    return result, min(timeit.repeat(lambda: jax.block_until_ready(step(*arguments)), number=1)), compiling


@jax.jit
def _largest_error(found: Any, exact: Any) -> jax.Array:
    """The largest error of an array, relative to the exact one (root mean squares); NaN if there is one."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    squares = [jnp.mean((a.reshape(-1, *b.shape) - b) ** 2) / (jnp.mean(b**2) + 1e-6) for a, b in pairs]
    return jnp.sqrt(jnp.max(jnp.stack(squares)))
