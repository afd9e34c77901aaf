"""Proof that what is saved can be restored: of a checkpoint after its save, of a run directory before a run."""

import contextlib
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import atomic, machine_errors
from vit_jax.checkpoint import integrity, inventory, orbax_io, run_files
from vit_jax.checkpoint.integrity import CorruptCheckpoint
from vit_jax.errors import UserError, few
from vit_jax.progress import Counter
from vit_jax.sharding import multihost

METADATA_BYTES = 2**20  # space for what is stored in addition to the arrays
NAME = "proof-"  # how the names of small checkpoints begin that are made for a proof


def read_back(path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint that is on the disk, after reading what Orbax needs to open it.

    Raises:
        CorruptCheckpoint: it is not what was written.
        UserError: it cannot be read.
    """
    content = inventory.read_content(path)
    written = {name: text.split(" ")[0] for name, text in content["digests"].items()}
    try:
        if (path / inventory.FILES).exists():
            inventory.check_sizes(path)
        leaves = integrity.names_and_leaves(orbax_io.read_shapes(path))
        found = {name: integrity.dtype_and_shape(leaf) for name, leaf in leaves.items() if name in written}
    except CorruptCheckpoint:
        raise
    except Exception as error:  # the files show which of them is damage
        raise inventory.explain(path, written, error) from error
    if found != written:
        differ = [name for name in written if found.get(name) != written[name]]
        raise CorruptCheckpoint(f"{path} is corrupt: {few(differ)} differ from what was written")
    return content


def check_room(workdir: Path, size: int) -> None:
    """Raises UserError if the disk of a run directory has no room for a checkpoint with arrays of `size` bytes."""
    needed, free = size + METADATA_BYTES, shutil.disk_usage(workdir).free
    if free < needed:
        raise UserError(
            f"--workdir={workdir}: a checkpoint needs {needed:,} bytes, but its disk has only {free:,} free\n"
            "  free disk space, or use another --workdir"
        )


def prove(workdir: Path) -> None:
    """Saves a small checkpoint in a run directory, restores it and removes it.

    All processes of a cluster must call this together; there, only files are made, without Orbax, whose barriers must
    be passed by all processes. The run directory must be locked.

    Raises:
        UserError: a checkpoint that is saved there cannot be restored.
    """
    path = workdir.resolve() / run_files.CHECKPOINTS / f"{NAME}0000000000"  # as long as the name of any step
    arrays = {"step": np.asarray(0, np.int32), "parameters": np.arange(1000, dtype=np.float32)}
    written = integrity.digests(arrays)
    try:
        with Counter(f"checking that {workdir} can hold checkpoints", enabled=multihost.is_rank_0()):
            multihost.on_rank_0(lambda: _attempt(workdir, lambda: _prepare(path)))
            if jax.process_count() == 1:
                _attempt(workdir, lambda: orbax_io.write_small(path, arrays, integrity.seal({"digests": written})))
                _attempt(workdir, lambda: _compare(path, written))
    finally:
        if multihost.is_rank_0():
            _remove(path)


def _attempt(workdir: Path, action: Callable[[], None]) -> None:
    """Turns whatever Orbax, TensorStore or the operating system raise for a path into a UserError.

    Errors of the machine that are not the path's, such as a package that cannot be imported, are raised as they are.
    """
    try:
        action()
    except Exception as error:
        if not isinstance(error, OSError) and machine_errors.explain(error) is not None:
            raise
        raise UserError(
            f"--workdir={workdir} cannot hold checkpoints: {integrity.root_cause(error)}\n  {_way_out(error)}"
        ) from error


def _way_out(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, OSError | MemoryError | RuntimeError) and (explained := machine_errors.explain(error)):
            return explained.splitlines()[-1].strip()
        error = error.__cause__ or error.__context__
    return "free disk space if it is full, or use another --workdir"


def _prepare(path: Path) -> None:
    """Makes and removes a file as deep as those of a checkpoint; Orbax waits five minutes if it cannot make one."""
    orbax_io.check_path(path)
    _remove(path)  # left by a process that was killed
    atomic.make_directory(path.parent)
    scratch = path.with_name(f"{path.name}{orbax_io.SUFFIX}-{'0' * 8}{orbax_io.SUFFIX}")
    deepest = scratch / "state" / "ocdbt.process_0" / "d" / ("0" * 32)
    deepest.parent.mkdir(parents=True)
    deepest.write_bytes(bytes(1000))
    shutil.rmtree(scratch)


def _compare(path: Path, written: dict[str, str]) -> None:
    if read_back(path)["digests"] != written or integrity.digests(orbax_io.read(path)) != written:
        raise OSError(errno.EIO, "what was read is not what was written")


def _remove(path: Path) -> None:
    for left in path.parent.glob(f"{path.name}*"):
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()  # if it is empty, no run has begun
