"""Forms of one layer's attention, forward and gradient, on this machine's backend.

    python -m benchmarks.attention [--shape=8,196,9,48] [--dtype=float32] [--rounds=9] [--json=FILE]

Shape: batch, tokens (a square grid), heads, size of a head. `model` is what convit_jax.models.attention
does; the others are what it was chosen from, or might be on another backend. They take turns in one
process; medians, and the least, in ms of wall time and of processor time. With a number of tokens that is
no square, as 197, only plain attention is measured.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from convit_jax.models import attention as model


def library(implementation):
    """attention(q, k, v [B, H, N, d]) by jax.nn, which wants [B, N, H, d]: "xla" or "cudnn"."""

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation).transpose(0, 2, 1, 3)

    return attend


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


def forms(on_gpu):
    """{name: function of (q, k, v [B, H, N, d]) and for GPSA also (gate, a_y, a_x)} -> [B, H, N, d]."""

    def gpsa(content, position):
        def attend(q, k, v, gate, a_y, a_x):
            out = position(gate * a_y, a_x, v)
            return ((1.0 - gate) * content(q, k, v).astype(jnp.float32) + out).astype(v.dtype)

        return attend

    def dense_sum(q, k, v, gate, a_y, a_x):
        maps = (1.0 - gate) * model.content_probabilities(q, k) + dense_maps(gate * a_y, a_x)
        return model.apply_maps(maps, v)

    found = {
        "plain: model": model.attention,
        "plain: jax.nn.dot_product_attention": library("xla"),
        "GPSA: model, factors repeated for the batch": gpsa(model.attention, model.along_axes),
        "GPSA: factors batched over heads only": gpsa(model.attention, over_heads_only),
        "GPSA: dense position, a product of its own": gpsa(model.attention, dense),
        "GPSA: dense position added to the maps": dense_sum,
    }
    if on_gpu:  # last, since a kernel that crashes ends the process
        found["plain: cuDNN, and transposed for it"] = library("cudnn")
        found["GPSA: cuDNN, and transposed for it; factors over heads only"] = gpsa(
            library("cudnn"), over_heads_only
        )
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
    calls_a_turn = 20 if on_gpu else 3
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (batch, heads, tokens, size), options.dtype) for key in keys)

    calls = {}
    for name, form in forms(on_gpu).items():
        if name.startswith("GPSA") and side**2 != tokens:
            continue
        inputs = (q, k, v, *factors) if name.startswith("GPSA") else (q, k, v)
        forward = jax.jit(form)
        gradient = jax.jit(lambda d_out, *inputs, form=form: jax.vjp(form, *inputs)[1](d_out))
        both = {
            "forward": lambda forward=forward, inputs=inputs: forward(*inputs),
            "gradient": lambda gradient=gradient, inputs=inputs: gradient(d_out, *inputs),
        }
        try:
            jax.block_until_ready([call() for call in both.values()])
        except Exception as error:  # a kernel that this device does not have; the others still count
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        print(f"compiled: {name}", flush=True)
        calls |= {(name, kind): call for kind, call in both.items()}
    wall, processor = {key: [] for key in calls}, {key: [] for key in calls}
    for _ in range(options.rounds):
        for key, call in calls.items():
            began, began_processor = time.perf_counter(), time.process_time()
            for _ in range(calls_a_turn):
                last = call()
            jax.block_until_ready(last)
            wall[key].append((time.perf_counter() - began) / calls_a_turn * 1e3)
            processor[key].append((time.process_time() - began_processor) / calls_a_turn * 1e3)
    print(f"{options.shape} {options.dtype}, {jax.devices()[0].device_kind}, ms: median (least)")
    for name in dict.fromkeys(name for name, _ in calls):
        print(f"  {name}")
        for kind in ("forward", "gradient"):
            parts = [
                f"{title} {statistics.median(times[name, kind]):8.3f} ({min(times[name, kind]):.3f})"
                for title, times in (("wall", wall), ("processor", processor))
            ]
            print(f"    {kind:10}{'   '.join(parts)}")
    if options.json:
        results = [{"form": n, "kind": k, "wall": wall[n, k], "processor": processor[n, k]} for n, k in calls]
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
