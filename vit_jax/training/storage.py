"""The one door to Orbax: arrays, and what stands beside them, to a folder and back."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


@contextlib.contextmanager
def _alone() -> Iterator[Any]:
    """Orbax, reading in this process by itself: nobody waits at its barriers for one that has found damage."""
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


def write(path: Path, arrays: dict[str, Any], beside: dict[str, Any]) -> None:
    """Writes a tree of NumPy arrays, and what goes beside it (JSON): under another name until all is there.

    All processes of a cluster must call this together.
    """
    from orbax.checkpoint import v1 as ocp

    ocp.save_checkpointables(path, {"state": arrays}, custom_metadata=beside)


def read(path: Path, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """The arrays of a folder; with the shapes, types and shardings of `like`, where given."""
    abstract = None
    if like is not None:
        abstract = {"state": jax.tree.map(_abstract, like)}
    with _alone() as ocp:
        return ocp.load_checkpointables(path, abstract)["state"]


def read_beside(path: Path) -> Any:
    """What was written beside the arrays."""
    with _alone() as ocp:
        return ocp.checkpointables_metadata(path).custom_metadata


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
