"""Where arrays live: a mesh ("data", "fsdp"), the batch over both axes, the state over fsdp.

The rule for the state: an array is cut along its largest axis that fsdp divides, else copied.
"""

import collections

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from convit_jax.errors import UserError


def make_mesh(data, fsdp):
    """Mesh of data x fsdp devices; data = -1 takes all that there are.

    The devices of one process are neighbours, those of process 0 the first: so are the rows of a batch.

    Raises:
      UserError: the devices at hand cannot be arranged so.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if fsdp < 1 or (data < 1 and data != -1):
        raise UserError(
            f"mesh.data is {data} and mesh.fsdp {fsdp}: they are counts of devices (data=-1: all)."
        )
    if data == -1:
        if len(devices) % fsdp:
            raise UserError(f"mesh.fsdp is {fsdp}, which does not divide the {len(devices)} devices at hand.")
        data = len(devices) // fsdp
    if data * fsdp > len(devices):
        raise UserError(
            f"mesh.data x mesh.fsdp is {data} x {fsdp} devices, but there are {len(devices)}: "
            "lower them, or set mesh.data=-1 to take all."
        )
    if jax.process_count() > 1 and data * fsdp != len(devices):
        raise UserError(
            f"mesh.data x mesh.fsdp is {data} x {fsdp}, but the {jax.process_count()} processes have "
            f"{len(devices)} devices, and each must take part: set mesh.data=-1."
        )
    each = collections.Counter(device.process_index for device in devices)
    if len({*each.values()}) > 1:
        raise UserError(
            f"process {min(each, key=each.get)} has {min(each.values())} devices and process "
            f"{max(each, key=each.get)} has {max(each.values())}: give each process as many."
        )
    grid = np.array(devices[: data * fsdp]).reshape(data, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh):
    """Examples over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh):
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh, tree):
    """The sharding of each array of a state, from its shape alone."""
    size = mesh.shape["fsdp"]

    def rule(leaf):
        divisible = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if size == 1 or not divisible:
            return replicated(mesh)
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree.map(rule, tree)


def gather(mesh):
    """A function that copies every array of a tree to all devices, inside a compiled step.

    Parameters cut over fsdp are gathered once a step and their gradients cut as they are, so that sums over
    devices may be scattered: left to itself, the partitioner cuts activations along the parameters' axes and
    moves far more.
    """

    @jax.custom_vjp
    def whole(tree):
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    def cut(_, tree):
        return (jax.lax.with_sharding_constraint(tree, state_shardings(mesh, tree)),)

    whole.defvjp(lambda tree: (whole(tree), None), cut)
    return whole


def put_same(tree, shardings):
    """Numpy arrays that every process has alike -> global arrays on the devices.

    jax.device_put would fetch every array from all processes, to compare them.
    """
    return jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, array.__getitem__),
        tree,
        shardings,
    )


def put_batch(batch, mesh):
    """This process's rows of a batch (dict of numpy arrays) -> global arrays on the devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
