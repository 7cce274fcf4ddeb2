"""Forms of one layer's attention, forward and gradient, on this machine's backend.

    python -m benchmarks.attention [--shape=8,196,9,48] [--dtype=float32] [--rounds=9] [--json=FILE]

Shape: batch, tokens (a square grid), heads, size of a head. `model` is what convit_jax.models.attention
does; the others are what it was chosen from, or might be on another backend. They take turns in one
process; medians, and the least, in ms of wall time and of processor time.
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


def forms(layer, on_gpu):
    """{name: function of (q, k, v [B, H, N, d], gates and factors)} -> [B, H, N, d]."""
    rows, columns = layer.grid

    def grid(v):
        return v.reshape(*v.shape[:2], rows, columns, v.shape[-1])

    def dense(gate, a_y, a_x, dtype):
        """gate * A_y (x) A_x, one N x N map a head for the whole batch."""
        return jnp.einsum("hyv,hxu->hyxvu", gate * a_y, a_x).reshape(-1, *[rows * columns] * 2).astype(dtype)

    def plain(q, k, v, *_):
        return model.attention(q, k, v)

    def library(implementation):
        def attend(q, k, v, *_):
            q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
            return jax.nn.dot_product_attention(q, k, v, implementation=implementation).transpose(0, 2, 1, 3)

        return attend

    def mixed(content, position):
        def attend(q, k, v, gate, a_y, a_x):
            out = (1.0 - gate) * content(q, k, v).astype(jnp.float32) + position(gate, a_y, a_x, v)
            return out.astype(v.dtype)

        return attend

    def batched(gate, a_y, a_x, v):
        return model.along_axes((gate * a_y).astype(v.dtype), a_x.astype(v.dtype), v)

    def heads_only(gate, a_y, a_x, v):
        moved = jnp.einsum("hxu,bhvud->bhvxd", a_x.astype(v.dtype), grid(v))
        return jnp.einsum("hyv,bhvxd->bhyxd", (gate * a_y).astype(v.dtype), moved).reshape(v.shape)

    def dense_product(gate, a_y, a_x, v):
        return jnp.einsum("hnm,bhmd->bhnd", dense(gate, a_y, a_x, v.dtype), v)

    def dense_sum(q, k, v, gate, a_y, a_x):
        maps = (1.0 - gate) * model.content_probabilities(q, k) + dense(gate, a_y, a_x, jnp.float32)
        return model.apply_maps(maps, v)

    found = {
        "plain: model": plain,
        "plain: jax.nn.dot_product_attention": library("xla"),
        "GPSA: model, factors repeated for the batch": mixed(plain, batched),
        "GPSA: factors batched over heads only": mixed(plain, heads_only),
        "GPSA: dense position, a product of its own": mixed(plain, dense_product),
        "GPSA: dense position added to the maps": dense_sum,
    }
    if on_gpu:
        found["plain: cuDNN"] = library("cudnn")
        found["GPSA: cuDNN, factors batched over heads only"] = mixed(library("cudnn"), heads_only)
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
    position = (layer.gates()[:, None, None], *layer.positional_factors())
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (batch, heads, tokens, size), options.dtype) for key in keys)

    calls = {}
    for name, form in forms(layer, jax.default_backend() == "gpu").items():
        forward = jax.jit(form)
        gradient = jax.jit(lambda d_out, *inputs, form=form: jax.vjp(form, *inputs)[1](d_out))
        both = {
            "forward": lambda forward=forward: forward(q, k, v, *position),
            "gradient": lambda gradient=gradient: gradient(d_out, q, k, v, *position),
        }
        try:
            jax.block_until_ready([call() for call in both.values()])
        except Exception as error:  # a kernel that this device does not have; the others still count
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        calls |= {(name, kind): call for kind, call in both.items()}
    wall, processor = {key: [] for key in calls}, {key: [] for key in calls}
    for _ in range(options.rounds):
        for key, call in calls.items():
            began, began_processor = time.perf_counter(), time.process_time()
            for _ in range(3):
                last = call()
            jax.block_until_ready(last)
            wall[key].append((time.perf_counter() - began) / 3 * 1e3)
            processor[key].append((time.process_time() - began_processor) / 3 * 1e3)
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
