"""One table of names between the original's state dict and our parameters, used in both directions.

Our module attributes carry the original's names, so little is left to translate: the leaf (kernel
and scale are `weight`), the layout (linear [in, out] is [out, in] there, convolution HWIO is OIHW),
and the blocks, which we hold stacked: layer i of gpsa_blocks is blocks.i, layer i of sa_blocks is
blocks.(i + number of GPSA blocks).
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.errors import UserError
from convit_jax.weights.stored import Stored
from convit_jax.weights.tensors import fresh

LEAVES = {"kernel": "weight", "scale": "weight"}
STRIP = 64  # columns
THREADS = 4


def table(params):
    """[(path, stacked, names)] of every leaf of our parameters, a nested dict of arrays or their shapes.

    path: keys of the leaf. names: of the original's tensors, one a layer if the leaf is stacked, else one.
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


def shapes(params):
    """{name: shape} of the state dict that our parameters (or their shapes) correspond to."""
    leaves = jax.tree.leaves(params)
    return {
        name: _to_original(np.broadcast_to(np.float32(0), leaf.shape[stacked:])).shape  # no memory
        for leaf, (_, stacked, names) in zip(leaves, table(params), strict=True)
        for name in names
    }


def check(tensors, params, source):
    """Account for every name and shape of a state dict.

    Args:
      tensors: {name: array}. params: our parameters, or their shapes. source: its name, for the message.

    Raises:
      UserError: names that are missing or unexpected, shapes and dtypes that do not fit, all together.
    """
    expected = shapes(params)
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
            f"the weights in {source} do not fit a ConViT or DeiT of their sizes ({found}): give a "
            "checkpoint of such a model."
        )


def to_params(tensors, params):
    """Our parameters, a nested dict of float32 numpy arrays, from a state dict that passed `check`.

    tensors: {name: array or Stored}. params: the parameters, or their shapes, that it fills.
    """
    rows = table(params)
    arrays = [  # JAX on a CPU takes them as they are
        fresh(4 * leaf.size, at_once=False).view(np.float32).reshape(leaf.shape)
        for leaf in jax.tree.leaves(params)
    ]
    places = [  # block by block, so that no thread is left alone with a stack of them
        (tensors[name], part)
        for array, (_, stacked, names) in zip(arrays, rows, strict=True)
        for part, name in zip(array if stacked else [array], names, strict=True)
    ]
    with ThreadPoolExecutor(THREADS) as pool:  # reading, checksums and copying leave Python free to go on
        list(pool.map(lambda place: _take(*place), places))  # raises what they raise
    filled = {}
    for array, (path, _, _) in zip(arrays, rows, strict=True):
        branch = filled
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = array
    return filled


def to_state_dict(params):
    """The original's state dict, {name: numpy array}, of our parameters."""
    tensors = {}
    for leaf, (_, stacked, names) in zip(jax.tree.leaves(params), table(params), strict=True):
        leaf = np.asarray(leaf)
        for name, array in zip(names, leaf if stacked else [leaf], strict=True):
            array = _to_original(array)
            tensors[name] = np.empty(array.shape, array.dtype)
            _copy(array, tensors[name])
    return tensors


def _take(tensor, target):
    """target[...] = a tensor, an array or Stored, in our layout."""
    if not isinstance(tensor, Stored):
        _copy(_from_original(tensor), target)
        return
    for first, rows in tensor.rows():
        place = slice(first, first + len(rows))
        target[(..., place) if tensor.ndim in (2, 4) else place] = _from_original(rows)


def _copy(source, target):
    """target[...] = source, in strips: transposing a matrix in one go misses the cache at every number.

    For thirty matrices of ConViT-B's MLP, 283 MB, 0.11 instead of 0.5 s of processor time (2 cores).
    """
    for first in range(0, target.shape[-1], STRIP):
        target[..., first : first + STRIP] = source[..., first : first + STRIP]


def _from_original(tensor):
    """OIHW -> HWIO of a convolution, [out, in] -> [in, out] of a linear layer; anything else as it is."""
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T if tensor.ndim == 2 else tensor


def _to_original(array):
    """The inverse of _from_original."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else _from_original(array)
