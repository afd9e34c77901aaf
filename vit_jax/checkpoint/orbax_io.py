"""The one door to Orbax: arrays, and what stands beside them, to a folder and back."""

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

# What Orbax and asyncio log of arrays that could not be read or written, in words that only this has.
_OF_ORBAX = re.compile(
    r"Failed to get metadata for checkpointable|_SignalingThread\.run\(\) raised|never retrieved.*(orbax|zarr|OCDBT)",
    re.DOTALL,
)


@functools.cache
def _hush() -> None:
    """Keeps off the screen what Orbax leaves behind where a read or a write fails: who asked for it says so in a line.

    Its other reads go on, find their event loop closed or raise what nobody takes, and each thread that a failed write
    goes through logs it: hundreds of lines of tracebacks, some of them long after.
    """
    unraisable = sys.unraisablehook

    def of_others(report: Any) -> None:
        code = getattr(report.object, "cr_code", None)  # of a coroutine that was given up
        if str(report.exc_value) != "Event loop is closed" and (code is None or "orbax" not in code.co_filename):
            unraisable(report)

    sys.unraisablehook = of_others
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not _OF_ORBAX.search(record.getMessage()))


@contextlib.contextmanager
def _alone() -> Iterator[Any]:
    """Orbax, reading in this process by itself: nobody waits at its barriers for one that has found damage."""
    from orbax.checkpoint import v1 as ocp

    _hush()
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

    _hush()
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
