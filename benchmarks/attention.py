"""Forms of one layer's attention, forward and gradient, on this machine's backend.

    python -m benchmarks.attention [--shape=8,196,9,48] [--dtype=float32] [--rounds=9] [--json=FILE]

Shape: batch, tokens (a square grid), heads, size of a head. `model` is what convit_jax.models.attention
does; the others are what it was chosen from, or might be on another backend. Each takes turns with plain
attention as the model has it, in one process, and is printed when it is done, since the next may end the
process: medians, and the least, in ms of wall time and of processor time, and the median of the ratios of
neighbouring turns. With a number of tokens that is no square, as 197, only plain attention is measured.
"""

import argparse
import json
import math
import operator
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from convit_jax.models import attention as model
from convit_jax.models import kernels

PLAIN = "plain: model"


def library(q, k, v):
    """attention(q, k, v [B, H, N, d]) by jax.nn, which wants [B, N, H, d]."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v).transpose(0, 2, 1, 3)


def over_heads_only(a_y, a_x, v):
    """As model.along_axes, the products batched over heads alone: no factor is repeated, values move."""
    grid = v.reshape(*v.shape[:2], a_y.shape[-1], a_x.shape[-1], v.shape[-1])
    moved = jnp.einsum("hxu,bhvud->bhvxd", a_x.astype(v.dtype), grid)
    return jnp.einsum("hyv,bhvxd->bhyxd", a_y.astype(v.dtype), moved).reshape(v.shape)


def dense_maps(a_y, a_x):
    """A_y (x) A_x, one N x N map a head for the whole batch."""
    tokens = a_y.shape[-1] * a_x.shape[-1]
    return jnp.einsum("hyv,hxu->hyxvu", a_y, a_x).reshape(-1, tokens, tokens)


def dense(a_y, a_x, v):
    """As model.along_axes, one N x N map a head."""
    return jnp.einsum("hnm,bhmd->bhnd", dense_maps(a_y, a_x).astype(v.dtype), v)


def factors_of_parts(a_y, a_x, v):
    """As kernels.position, by the two factors: v [B, N, H, d]."""
    grid = v.reshape(v.shape[0], a_y.shape[-1], a_x.shape[-1], *v.shape[2:])
    moved = jnp.einsum("hxu,bvuhd->bvxhd", a_x.astype(v.dtype), grid)
    return jnp.einsum("hyv,bvxhd->byxhd", a_y.astype(v.dtype), moved).reshape(v.shape)


def forms(on_gpu):
    """{name: function of (q, k, v) and for GPSA also (gate, a_y, a_x)} -> as v.

    q, k and v are [B, H, N, d], and [B, N, H, d] for cuDNN.
    """

    def gpsa(content, position, of_values=lambda gate: gate):
        """of_values: the gate [H, 1, 1] in the layout of the values."""

        def attend(q, k, v, gate, a_y, a_x):
            return model.mix(of_values(gate), content(q, k, v), position(gate * a_y, a_x, v))

        return attend

    def dense_sum(q, k, v, gate, a_y, a_x):
        maps = (1.0 - gate) * model.content_probabilities(q, k) + dense_maps(gate * a_y, a_x)
        return model.apply_maps(maps, v)

    found = {
        PLAIN: model.attention,
        "plain: jax.nn.dot_product_attention": library,
        "GPSA: model, factors repeated for the batch": gpsa(model.attention, model.along_axes),
        "GPSA: factors batched over heads only": gpsa(model.attention, over_heads_only),
        "GPSA: dense position, a product of its own": gpsa(model.attention, dense),
        "GPSA: dense position added to the maps": dense_sum,
    }
    if on_gpu:  # last, since a kernel that crashes ends the process
        last = operator.itemgetter((slice(None), 0))  # [H, 1]
        found["plain: cuDNN"] = kernels.attention
        found["GPSA: cuDNN, dense position"] = gpsa(kernels.attention, kernels.position, last)
        found["GPSA: cuDNN, factors over heads only"] = gpsa(kernels.attention, factors_of_parts, last)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8,196,9,48")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    batch, tokens, heads, size = map(int, options.shape.split(","))
    side = math.isqrt(tokens)
    layer = model.GatedPositionalSelfAttention(heads * size, heads, (side, side), rngs=nnx.Rngs(0))
    factors = (layer.gates()[:, None, None], *layer.positional_factors())
    on_gpu = jax.default_backend() == "gpu"
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (batch, heads, tokens, size), options.dtype) for key in keys)

    def calls(name, form):
        """{kind: function without arguments} of a form."""
        *arrays, cotangent = (x.transpose(0, 2, 1, 3) if "cuDNN" in name else x for x in (q, k, v, d_out))
        inputs = (*arrays, *factors) if name.startswith("GPSA") else arrays
        forward = jax.jit(form)
        gradient = jax.jit(lambda cotangent, *inputs: jax.vjp(form, *inputs)[1](cotangent))
        return {"forward": lambda: forward(*inputs), "gradient": lambda: gradient(cotangent, *inputs)}

    print(f"{options.shape} {options.dtype}, {jax.devices()[0].device_kind}, ms: median (least)")
    plain, results = calls(PLAIN, model.attention), []
    jax.block_until_ready([call() for call in plain.values()])  # compiled
    for name, form in forms(on_gpu).items():
        if name.startswith("GPSA") and side**2 != tokens:
            continue
        print(f"  {name}", flush=True)
        for kind, call in (plain if name == PLAIN else calls(name, form)).items():
            try:
                jax.block_until_ready(call())  # compiled
            except Exception as error:  # a kernel that this device does not have; the others still count
                print(f"    {kind:10}{str(error).splitlines()[0]}", flush=True)
                continue
            turns = [(timed(plain[kind], on_gpu), timed(call, on_gpu)) for _ in range(options.rounds)]
            wall, processor = zip(*(of_it for _, of_it in turns), strict=True)
            ratio = statistics.median(of_it[0] / of_plain[0] for of_plain, of_it in turns)
            parts = [
                f"{title} {statistics.median(values):8.3f} ({min(values):.3f})"
                for title, values in (("wall", wall), ("processor", processor))
            ]
            print(f"    {kind:10}{'   '.join(parts)}   {ratio:.2f} x plain", flush=True)
            results.append({"form": name, "kind": kind, "ratio": ratio, "wall": wall, "processor": processor})
            if options.json:
                Path(options.json).write_text(json.dumps(results, indent=1))


def timed(call, on_gpu):
    """Milliseconds of one call, (of wall time, of processor time), in a turn of several."""
    count = 20 if on_gpu else 3
    began, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        last = call()
    jax.block_until_ready(last)
    return (time.perf_counter() - began) * 1e3 / count, (time.process_time() - processor) * 1e3 / count


if __name__ == "__main__":
    main()
