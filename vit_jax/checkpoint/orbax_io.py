"""Reading and writing of one checkpoint with Orbax: a tree of arrays and a JSON object stored with it."""

import contextlib
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import atomic
from vit_jax.checkpoint import inventory
from vit_jax.sharding import multihost

STATE = "state"  # Orbax's name of the tree
SUFFIX = ".orbax-checkpoint-tmp"  # of incomplete checkpoints
# Paths that Orbax, etils and TensorStore take literally. Others have patterns (Orbax lists files with glob), schemes
# such as 'gs:', backslashes, or bytes that are not UTF-8.
_PLAIN = re.compile(r"[A-Za-z0-9_./+=,~-]+")


def check_path(path: Path) -> None:
    """Raises OSError if several processes cannot use a path, each of which would need a link of its own."""
    if jax.process_count() > 1 and not _PLAIN.fullmatch(str(path)):
        raise OSError("several processes need a path of letters, digits and ./_+=,~-")


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """The path of a checkpoint, below a temporary symbolic link if Orbax would not take its own path literally."""
    check_path(path)
    if _PLAIN.fullmatch(str(path)):
        yield path
        return
    parent = None if _PLAIN.fullmatch(tempfile.gettempdir()) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="vit_jax-", dir=parent) as scratch:
        link = Path(scratch, "checkpoints")
        link.symlink_to(path.parent.absolute(), target_is_directory=True)
        yield link / path.name


@contextlib.contextmanager
def _single_process() -> Iterator[Any]:
    """Orbax, set up to read in this process alone, without barriers.

    In a cluster, a process that finds a corrupt file would leave the others waiting at Orbax's barriers.
    """
    from orbax.checkpoint import v1 as ocp

    try:
        is_alone = jax.process_count() == 1
    except (AssertionError, RuntimeError) as error:  # AssertionError: JAX's, without a message
        raise RuntimeError(f"JAX finds no device of JAX_PLATFORMS={jax.config.jax_platforms}") from error
    if is_alone:
        yield ocp
        return
    context, own = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = own
    context.multiprocessing.active_processes = {own}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{own}"
    with context:
        yield ocp


def write(path: Path, arrays: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes a tree of NumPy arrays and a JSON object atomically: under a temporary name until it is on the disk.

    Orbax renames a complete checkpoint before its files are on the disk: after a power failure it would be empty.

    All processes of a cluster must call this together.
    """
    from orbax.checkpoint import v1 as ocp

    _write(path, lambda scratch: ocp.save_checkpointables(scratch, {STATE: arrays}, custom_metadata=content))


def write_small(path: Path, arrays: dict[str, Any], content: dict[str, Any]) -> None:
    """As `write`, by Orbax's function for a single tree."""
    from orbax.checkpoint import v1 as ocp

    _write(path, lambda scratch: ocp.save(scratch, arrays, checkpointable_name=STATE, custom_metadata=content))


def _write(path: Path, save: Callable[[Path], None]) -> None:
    # A name of its own: a process that was stopped during a save and wakes up must not rename the files of another one.
    scratch = path.with_name(f"{path.name}{SUFFIX}-{multihost.on_rank_0(lambda: secrets.token_hex(4))}")
    with atomic.unfinished(scratch):
        with _plain(scratch) as usable:
            save(usable)
        if multihost.is_rank_0():
            inventory.write(scratch)
            atomic.sync_and_rename(scratch, path)


def read(path: Path, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the arrays of a checkpoint, with the shapes, dtypes and shardings of `like` if given."""
    wanted = None if like is None else {STATE: jax.tree.map(_abstract, like)}
    with _single_process() as ocp, _plain(path) as usable:
        return ocp.load_checkpointables(usable, wanted)[STATE]


def read_part(path: Path, name: str) -> Any:
    """Returns the NumPy arrays below one top-level name of a checkpoint; no others are read."""

    def on_one_device(leaf: Any) -> jax.ShapeDtypeStruct:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    with _single_process() as ocp, _plain(path) as usable:
        like = jax.tree.map(on_one_device, ocp.checkpointables_metadata(usable).metadata[STATE][name])
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return jax.tree.map(np.asarray, ocp.load_checkpointables(usable, {STATE: {name: like}})[STATE][name])


def read_shapes(path: Path) -> Any:
    """Returns the tree of a checkpoint with shapes and dtypes in place of arrays, as Orbax finds them on the disk."""
    with _single_process() as ocp, _plain(path) as usable:
        return ocp.checkpointables_metadata(usable).metadata[STATE]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
