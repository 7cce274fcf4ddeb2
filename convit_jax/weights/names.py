"""The names and layouts of the original's state dict and of our parameters, translated in both directions.

Our module attributes carry the original's names. Three things differ: leaves (`kernel` and `scale` are
`weight` there), layouts (linear [in, out] is [out, in], convolution HWIO is OIHW), and blocks, which we
hold stacked: layer i of gpsa_blocks is blocks.i, layer i of sa_blocks is blocks.(i + number of GPSA
blocks).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.errors import UserError

LEAVES = {"kernel": "weight", "scale": "weight"}


def first_blocks(params: Any) -> dict[str, int]:
    """Returns the number of the first block in each stack of our parameters (or their shapes)."""
    local = jax.tree.leaves(params["gpsa_blocks"])[0].shape[0] if "gpsa_blocks" in params else 0
    return {"gpsa_blocks": 0, "sa_blocks": local}


def name_table(params: Any) -> dict[str, Any]:
    """Returns our parameters (or their shapes) with each leaf replaced by the original's names, one per layer."""
    first = first_blocks(params)

    def names(path: Any, leaf: Any) -> list[str]:
        stack, *within = [LEAVES.get(entry.key, entry.key) for entry in path]
        if stack not in first:
            return [".".join([stack, *within])]
        return [".".join(["blocks", str(first[stack] + layer), *within]) for layer in range(leaf.shape[0])]

    return jax.tree_util.tree_map_with_path(names, params)


def to_params(
    tensors: Mapping[str, np.ndarray], params: Any, put: Callable[[np.ndarray], Any] = lambda array: array
) -> dict[str, Any]:
    """Returns our parameters, a nested dict of float32 arrays, of a state dict that `check_state_dict` has passed.

    `params` are our parameters or their shapes. `put` takes each finished array, as jax.device_put, so that the
    host holds one at a time.
    """

    def fill(leaf: Any, names: list[str]) -> Any:
        layers = [_from_original(tensors[name]) for name in names]
        return put(np.stack(layers, dtype=np.float32).reshape(leaf.shape))

    return jax.tree.map(fill, params, name_table(params))


def to_state_dict(params: Any) -> dict[str, np.ndarray]:
    """Returns the original's state dict of our parameters, {name: array or view of the parameters}."""
    tensors: dict[str, np.ndarray] = {}

    def split(leaf: Any, names: list[str]) -> None:
        layers = np.asarray(leaf) if names[0].startswith("blocks.") else np.asarray(leaf)[None]
        tensors.update({name: _to_original(layer) for name, layer in zip(names, layers, strict=True)})

    jax.tree.map(split, params, name_table(params))
    return tensors


def state_dict_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of the state dict that belongs to our parameters (or their shapes)."""
    views = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)  # take no memory
    return {name: tensor.shape for name, tensor in to_state_dict(views).items()}


def check_state_dict(tensors: Mapping[str, np.ndarray], params: Any, source: str) -> None:
    """Raises UserError that lists all names, shapes and dtypes in a state dict that do not fit our parameters."""
    expected = state_dict_shapes(params)
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape or not of floating point": [
            f"{name} {list(tensor.shape)} ({tensor.dtype}) instead of {list(expected[name])}"
            for name, tensor in tensors.items()
            if name in expected and not (tensor.shape == expected[name] and jnp.issubdtype(tensor.dtype, jnp.floating))
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise UserError(
            f"the weights in {source} do not fit a ConViT or DeiT of their sizes ({found}): "
            "give a checkpoint of such a model."
        )


def _from_original(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T if tensor.ndim == 2 else tensor


def _to_original(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else _from_original(array)
