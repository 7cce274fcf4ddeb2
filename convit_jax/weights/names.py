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


def name_table(params: Any) -> list[tuple[list[str], Any, bool, list[str]]]:
    """Returns (path, leaf, stacked, names) for every leaf of our parameters, a nested dict of arrays or shapes.

    `path` has the keys of the leaf, `names` those of the original's tensors: one per layer if the leaf is
    stacked, else one.
    """
    local = jax.tree.leaves(params["gpsa_blocks"])[0].shape[0] if "gpsa_blocks" in params else 0
    first = {"gpsa_blocks": 0, "sa_blocks": local}
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [entry.key for entry in path]
        stack, *within = [LEAVES.get(key, key) for key in keys]
        layers = range(leaf.shape[0]) if stack in first else ()
        names = [".".join(["blocks", str(first[stack] + layer), *within]) for layer in layers]
        rows.append((keys, leaf, stack in first, names or [".".join([stack, *within])]))
    return rows


def state_dict_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of the state dict that belongs to our parameters (or their shapes)."""
    views = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)  # take no memory
    return {name: tensor.shape for name, tensor in to_state_dict(views).items()}


def check_state_dict(tensors: Mapping[str, np.ndarray], params: Any, source: str) -> None:
    """Checks every name, shape and dtype of a state dict from `source` against our parameters (or their shapes).

    Raises:
      UserError: lists all names that are missing or unexpected, and all shapes and dtypes that do not fit.
    """
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


def to_params(
    tensors: Mapping[str, np.ndarray], params: Any, put: Callable[[np.ndarray], Any] = lambda array: array
) -> dict[str, Any]:
    """Returns our parameters, a nested dict of float32 arrays, of a state dict.

    Args:
      tensors: {name: array of any float type}; `check_state_dict` has passed it.
      params: our parameters, or their shapes.
      put: called with each finished array, as jax.device_put; so the host holds one at a time.
    """
    filled: dict[str, Any] = {}
    for keys, _, stacked, names in name_table(params):
        layers = [_from_original(tensors[name]) for name in names]
        branch = filled
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
        array = np.stack(layers, dtype=np.float32) if stacked else np.array(layers[0], np.float32, order="C")
        branch[keys[-1]] = put(array)
    return filled


def to_state_dict(params: Any) -> dict[str, np.ndarray]:
    """Returns the original's state dict of our parameters, {name: array or view of the parameters}."""
    tensors = {}
    for _, leaf, stacked, names in name_table(params):
        layers = np.asarray(leaf) if stacked else np.asarray(leaf)[None]
        tensors.update({name: _to_original(array) for name, array in zip(names, layers, strict=True)})
    return tensors


def _from_original(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T if tensor.ndim == 2 else tensor


def _to_original(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else _from_original(array)
