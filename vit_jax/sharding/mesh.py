"""The mesh of devices, and how arrays are laid out on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError


def make_mesh(devices: int | None) -> Mesh:
    """A mesh of one axis, 'data', over so many devices, or all.

    Raises:
        UserError: there are not so many.
    """
    present = jax.devices()
    if devices is not None and devices > len(present):
        raise UserError(f"config.mesh.devices is {devices}\n  allowed: 1 to {len(present)}, or None for all")
    count = devices or len(present)
    # Automatic axes: XLA places the collectives; `make_mesh` would make explicit ones by default.
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=present[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def data_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises UserError where the devices and microbatches do not divide the batch evenly."""
    parts = mesh.size * accumulation
    if batch_size % parts:
        lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = " or ".join(str(size) for size in (lower, upper) if size)
        microbatches = f" of {accumulation} microbatches" if accumulation > 1 else ""
        raise UserError(
            f"config.train.batch_size is {batch_size}, which does not divide among {mesh.size} devices{microbatches}\n"
            f"  allowed: a multiple of {parts}, as {near}"
        )
