"""Decoded images on disk: written once, atomically, and memory-mapped afterwards."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from vit_jax import atomic, paths, terminal
from vit_jax.errors import UserError
from vit_jax.progress import Counter

Fill = Callable[[np.ndarray, np.ndarray], None]  # fill(images, labels) writes every example into the two arrays
Shape = tuple[int, int, int, int]  # examples, height, width, channels
_STATISTICS = "mean_std.json"


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedSplit:
    """A whole stored split; `folder` is its directory in the cache, None if it is only in memory."""

    images: UInt8[np.ndarray, "examples height width channels"]
    labels: Int32[np.ndarray, " examples"]
    folder: Path | None


def default_dir() -> Path:
    """Returns $XDG_CACHE_HOME/vit_jax/data, or ~/.cache/vit_jax/data."""
    return paths.cache_dir() / "data"


def in_memory(shape: Shape, fill: Fill) -> DecodedSplit:
    """Decodes a split into memory.

    Raises:
        UserError: the images are larger than the memory of the machine.
    """
    needed, memory = math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UserError(
            f"{needed / 1e9:.0f} GB of decoded images do not fit into {memory / 1e9:.0f} GB of memory\n"
            "  set config.data.cache_dir to a disk with enough space, or use a smaller config.data.image_size"
        )
    images, labels = np.empty(shape, np.uint8), np.empty(shape[0], np.int32)
    fill(images, labels)
    return DecodedSplit(images, labels, None)


def open_or_create(folder: Path, shape: Shape, fill: Fill, *, title: str) -> DecodedSplit:
    """Memory-maps the arrays in `folder`; creates them first if they are missing, incomplete or damaged.

    Any number of processes may call this at once: each writes a directory of its own, and the first to finish renames
    it into place. If `folder` cannot be written, the split is decoded into memory, with a warning.

    Args:
        folder: directory of the arrays.
        shape: examples, height, width, channels.
        fill: fill(images, labels) writes every image and label into the two arrays.
        title: name of the split in the progress message.

    Raises:
        UserError: the images do not fit into memory, or another process modifies the cache.
    """
    try:
        arrays = _open(folder, shape)
        if arrays:
            return arrays
        terminal.warn(f"decoding {title}: {shape[0]:,} images (only once; cached in {folder})")
        _make(folder, shape, fill)
    except OSError as error:
        if error.errno not in _UNWRITABLE and os.path.isdir(folder.parent):
            raise
        reason = os.strerror(error.errno)
        terminal.warn(f"warning: cannot write the cache ({reason}); decoding into memory at every start")
        return in_memory(shape, fill)
    arrays = _open(folder, shape)
    if not arrays:
        raise UserError(f"cache {folder} is modified while in use\n  remove it, or set another config.data.cache_dir")
    return arrays


_UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)


def _open(folder: Path, shape: Shape) -> DecodedSplit | None:
    """Returns the arrays of a complete cache, or None."""
    try:
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):  # missing or truncated
        return None
    except OSError as error:  # not by a cache: decoded into memory if the directory is the reason
        if error.errno in _UNWRITABLE:
            raise
        raise UserError(
            f"cache {folder} cannot be read: {error.strerror}\n  fix that, or set another config.data.cache_dir"
        ) from error
    expected = (np.uint8, shape, np.int32, shape[:1])
    if (images.dtype, images.shape, labels.dtype, labels.shape) != expected:
        return None
    if (folder / "images.npy").stat().st_size != images.offset + images.nbytes:
        return None
    return DecodedSplit(images, labels, folder)


def _make(folder: Path, shape: Shape, fill: Fill) -> None:
    """Writes the arrays to a temporary directory and renames it to `folder` once they are on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # If the disk becomes full, a process that writes a memory-mapped file is killed.
    if shutil.disk_usage(folder.parent).free < math.prod(shape) + 2**20:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        images = np.lib.format.open_memmap(scratch / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        labels = np.empty(shape[0], np.int32)
        fill(images, labels)
        images.flush()
        del images
        np.save(scratch / "labels.npy", labels)
        _put_in_place(scratch, folder, shape)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(scratch: Path, folder: Path, shape: Shape) -> None:
    scratch.chmod(0o755)  # mkdtemp creates private directories, but a cache may be shared
    for _ in range(3):
        try:
            atomic.sync_and_rename(scratch, folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if _open(folder, shape):  # another process was first
            return
        damaged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            os.rename(folder, damaged / "damaged")
        finally:
            shutil.rmtree(damaged, ignore_errors=True)


def extra_labels(
    folder: Path | None, kind: str, count: int, fill: Callable[[np.ndarray], None]
) -> Int32[np.ndarray, " examples"]:
    """Returns labels of another kind, written by `fill(labels)`; cached in `folder`."""
    kept = folder / f"labels-{kind}.npy" if folder else None
    if kept:
        try:
            labels = np.load(kept, allow_pickle=False)
            if (labels.dtype, labels.shape) == (np.int32, (count,)):
                return labels
        except (OSError, ValueError, EOFError):
            pass  # missing or incomplete: created below
    labels = np.empty(count, np.int32)
    fill(labels)
    if kept:
        content = io.BytesIO()
        np.save(content, labels)
        write(kept, content.getvalue())
    return labels


def mean_and_std(arrays: DecodedSplit) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel of pixels scaled to [0, 1]; cached in the split's folder.

    Sums of 8-bit values and of their squares are exact in float64, so the result does not depend on their order.
    """
    known = read_mean_std(arrays.folder, arrays.images.shape[3]) if arrays.folder else None
    if known:
        return known
    examples, height, width, channels = arrays.images.shape
    sums, squares = np.zeros((2, height, width, channels))
    with Counter("computing mean and std:", examples, "images") as counter:
        for start in counter.over(range(0, examples, 1024), 1024):
            pixels = arrays.images[start : start + 1024].astype(np.float64)
            sums += pixels.sum(0)
            squares += np.square(pixels, out=pixels).sum(0)
    count = examples * height * width
    mean = sums.sum((0, 1)) / count
    variance = np.maximum(squares.sum((0, 1)) / count - mean**2, 0.0)
    mean, std = tuple((mean / 255).tolist()), tuple((np.sqrt(variance) / 255).tolist())
    if arrays.folder:
        write_mean_std(arrays.folder, mean, std)
    return mean, std


def read_mean_std(folder: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns the statistics in a cache folder; None if they are missing, damaged or not finite."""
    try:
        found = json.loads((folder / _STATISTICS).read_text())
        mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (mean, std) if len(mean) == len(std) == channels and all(map(math.isfinite, mean + std)) else None


def write_mean_std(folder: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Writes the statistics into a cache folder, if that can be written."""
    write(folder / _STATISTICS, atomic.to_json({"mean": mean, "std": std}).encode())


def write(path: Path, content: bytes) -> None:
    """Whole or not at all; silently not at all where the folder is read-only, since the content can be made again."""
    with contextlib.suppress(OSError):
        atomic.write_bytes(path, content)
