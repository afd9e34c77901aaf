"""The device mesh, and the layouts of arrays that do not depend on their names."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.sharding import devices as devices_module


def make_mesh(devices: int | None) -> Mesh:
    """Returns a mesh with one axis, 'data'.

    Args:
        devices: number of devices; None for all.

    Raises:
        UserError: there are fewer devices, or they do not start.
    """
    available = devices_module.start()
    if devices is not None and devices > len(available):
        raise UserError(f"config.mesh.devices is {devices}\n  allowed: 1 to {len(available)}, or None for all")
    count = devices or len(available)
    # `jax.make_mesh` makes explicit axes by default; with automatic ones XLA chooses the collectives.
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=available[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout in which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def data_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout in which the devices share the first axis, that of the batch."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Checks that devices and microbatches divide the batch evenly.

    Raises:
        UserError: they do not.
    """
    parts = mesh.size * accumulation
    if batch_size % parts:
        lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = " or ".join(str(size) for size in (lower, upper) if size)
        microbatches = f" x {accumulation} microbatches" if accumulation > 1 else ""
        raise UserError(
            f"config.train.batch_size is {batch_size}: not divisible by {mesh.size} devices{microbatches}\n"
            f"  allowed: multiples of {parts}, such as {near}"
        )
