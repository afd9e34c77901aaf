"""Reading and writing of one checkpoint with Orbax: a tree of arrays and a JSON object stored with it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

STATE = "state"  # Orbax's name of the tree


@contextlib.contextmanager
def _single_process() -> Iterator[Any]:
    """Orbax, set up to read in this process alone, without barriers.

    In a cluster, a process that finds a corrupt file would leave the others waiting at Orbax's barriers.
    """
    from orbax.checkpoint import v1 as ocp

    if jax.process_count() == 1:
        yield ocp
        return
    context, own = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = own
    context.multiprocessing.active_processes = {own}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{own}"
    with context:
        yield ocp


def write(path: Path, arrays: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes a tree of NumPy arrays and a JSON object atomically: under a temporary name until it is complete.

    All processes of a cluster must call this together.
    """
    from orbax.checkpoint import v1 as ocp

    ocp.save_checkpointables(path, {STATE: arrays}, custom_metadata=content)


def read(path: Path, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the arrays of a checkpoint, with the shapes, dtypes and shardings of `like` if given."""
    with _single_process() as ocp:
        return ocp.load_checkpointables(path, None if like is None else {STATE: jax.tree.map(_abstract, like)})[STATE]


def read_part(path: Path, name: str) -> Any:
    """Returns the NumPy arrays below one top-level name of a checkpoint; no others are read."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def on_one_device(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    with _single_process() as ocp:
        like = jax.tree.map(on_one_device, ocp.checkpointables_metadata(path).metadata[STATE][name])
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return jax.tree.map(np.asarray, ocp.load_checkpointables(path, {STATE: {name: like}})[STATE][name])


def read_content(path: Path) -> Any:
    """Returns the JSON object stored with the arrays."""
    with _single_process() as ocp:
        return ocp.checkpointables_metadata(path).custom_metadata


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
