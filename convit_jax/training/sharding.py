"""Where arrays live: a mesh ("data", "fsdp"), the batch over both axes, the state over fsdp.

The rule for the state: an array is sharded along its largest axis that fsdp divides, else replicated.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from convit_jax.errors import UserError


def make_mesh(data: int, fsdp: int) -> Mesh:
    """Returns a mesh of data x fsdp devices, in the order of their processes; data=-1 takes all devices."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    rows = len(devices) // max(fsdp, 1) if data == -1 else data
    fewest = len(devices) if data == -1 or jax.process_count() > 1 else 1  # every process takes part
    if not fewest <= rows * fsdp <= len(devices):
        raise UserError(
            f"mesh.data is {data} and mesh.fsdp is {fsdp}, which does not fit {len(devices)} devices: set "
            "mesh.data=-1 to take all, and mesh.fsdp to a number that divides them."
        )
    grid = np.array(devices[: rows * fsdp]).reshape(rows, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device has a copy of."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of each array of a state, from its shape alone."""
    size = mesh.shape["fsdp"]

    def rule(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if size == 1 or not divisible:
            return replicated(mesh)
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree.map(rule, tree)


def gather(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns a function that replicates parameters in a compiled step, and shards their gradients again.

    Left to itself, XLA shards activations along the parameters' axes, which moves far more data.
    """

    @jax.custom_vjp
    def whole(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    def shard(_: None, tree: Any) -> tuple[Any]:
        return (jax.lax.with_sharding_constraint(tree, state_shardings(mesh, tree)),)

    whole.defvjp(lambda tree: (whole(tree), None), shard)
    return whole


def put_same(tree: Any, shardings: Any) -> Any:
    """Returns global arrays of numpy arrays that all processes have; jax.device_put would compare them, at length."""
    return jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, array.__getitem__), tree, shardings
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns this process's rows of a batch as global arrays on the devices."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))  # rows over all devices
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
