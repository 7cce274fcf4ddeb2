"""Where arrays live: a mesh ("data", "fsdp"), the batch over both axes, the state over fsdp.

The rule for the state: an array is sharded along its largest axis that fsdp divides, else replicated.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from convit_jax.errors import UserError


def make_mesh(data: int, fsdp: int) -> Mesh:
    """Returns a mesh of data x fsdp devices.

    The devices of one process are neighbours and those of process 0 come first, as do their rows of a batch.

    Args:
      data: -1 takes all devices.
      fsdp: devices that also share the state.

    Raises:
      UserError: the devices cannot be arranged like this.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if fsdp < 1 or (data < 1 and data != -1):
        raise UserError(f"mesh.data is {data} and mesh.fsdp is {fsdp}: give numbers of devices (mesh.data=-1 for all).")
    if data == -1:
        if len(devices) % fsdp:
            raise UserError(f"mesh.fsdp is {fsdp}, which does not divide the {len(devices)} devices.")
        data = len(devices) // fsdp
    if data * fsdp > len(devices):
        raise UserError(
            f"mesh.data x mesh.fsdp is {data} x {fsdp} devices, but there are {len(devices)}: "
            "lower them, or set mesh.data=-1 to take all."
        )
    if jax.process_count() > 1 and data * fsdp != len(devices):
        raise UserError(
            f"mesh.data x mesh.fsdp is {data} x {fsdp}, but the {jax.process_count()} processes have "
            f"{len(devices)} devices, which must all take part: set mesh.data=-1."
        )
    counts = collections.Counter(device.process_index for device in devices).most_common()
    (most_process, most), (fewest_process, fewest) = counts[0], counts[-1]
    if most != fewest:
        raise UserError(
            f"process {fewest_process} has {fewest} devices and process {most_process} has {most}: "
            "give each process the same number."
        )
    grid = np.array(devices[: data * fsdp]).reshape(data, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


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
    """Returns a function that replicates every array of a tree, for use inside a compiled step.

    Parameters sharded over fsdp are gathered once a step and their gradients are sharded like them, so that
    XLA can scatter the sums over devices. Left to itself, the partitioner shards activations along the
    parameters' axes, which moves far more data.
    """

    @jax.custom_vjp
    def whole(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    def shard(_: None, tree: Any) -> tuple[Any]:
        return (jax.lax.with_sharding_constraint(tree, state_shardings(mesh, tree)),)

    whole.defvjp(lambda tree: (whole(tree), None), shard)
    return whole


def put_same(tree: Any, shardings: Any) -> Any:
    """Returns numpy arrays, the same on every process, as global arrays on the devices.

    jax.device_put would fetch every array from all processes to compare them.
    """
    return jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, array.__getitem__),
        tree,
        shardings,
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns this process's rows of a batch as global arrays on the devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
