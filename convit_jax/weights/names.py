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


def name_table(params: Any) -> list[tuple[list[str], bool, list[str]]]:
    """Returns (path, stacked, names) of every leaf of our parameters, a nested dict of arrays or shapes.

    `path` has the keys of the leaf, `names` those of the original's tensors: one per layer if the leaf is
    stacked, else one.
    """
    local = jax.tree.leaves(params["gpsa_blocks"])[0].shape[0] if "gpsa_blocks" in params else 0
    first = {"gpsa_blocks": 0, "sa_blocks": local}
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [entry.key for entry in path]
        stacked = keys[0] in first
        names = [".".join(LEAVES.get(key, key) for key in keys)]
        if stacked:
            _, _, within = names[0].partition(".")
            names = [f"blocks.{first[keys[0]] + layer}.{within}" for layer in range(leaf.shape[0])]
        rows.append((keys, stacked, names))
    return rows


def state_dict_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of the state dict that belongs to our parameters (or their shapes)."""
    leaves = jax.tree.leaves(params)
    return {
        name: _to_original(np.broadcast_to(np.float32(0), leaf.shape[stacked:])).shape  # takes no memory
        for leaf, (_, stacked, names) in zip(leaves, name_table(params), strict=True)
        for name in names
    }


def check_state_dict(tensors: Mapping[str, np.ndarray], params: Any, source: str) -> None:
    """Checks every name, shape and dtype of a state dict.

    Args:
      tensors: {name: array} with the original's names.
      params: our parameters, or their shapes.
      source: where the tensors are from, for the message.

    Raises:
      UserError: lists all names that are missing or unexpected, and all shapes and dtypes that do not fit.
    """
    expected = state_dict_shapes(params)
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "not of floating point": [
            f"{name} ({tensor.dtype})"
            for name, tensor in tensors.items()
            if name in expected and not jnp.issubdtype(tensor.dtype, jnp.floating)
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
    for keys, stacked, names in name_table(params):
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
    for leaf, (_, stacked, names) in zip(jax.tree.leaves(params), name_table(params), strict=True):
        layers = np.asarray(leaf) if stacked else np.asarray(leaf)[None]
        tensors.update({name: _to_original(array) for name, array in zip(names, layers, strict=True)})
    return tensors


def _from_original(tensor: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO of a convolution, [out, in] -> [in, out] of a linear layer; anything else unchanged."""
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T if tensor.ndim == 2 else tensor


def _to_original(array: np.ndarray) -> np.ndarray:
    """The inverse of _from_original."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else _from_original(array)
