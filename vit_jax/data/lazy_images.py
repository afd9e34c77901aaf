"""Examples as they are stored: decoded each time they are read, or a whole split at once."""

import concurrent.futures
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from vit_jax.data import cache

_CHUNK = 64  # images a thread decodes at a time
_STRETCH = 256  # the same, where a whole split is decoded for good

Size = tuple[int, int, int]  # height, width, channels


@dataclasses.dataclass(frozen=True)
class Records:
    """The examples of a stored split as they are stored. Any number of threads may read at once.

    Attributes:
        count: how many there are.
        read: of (place, shape) an image of that height, width and channels, and its label.
        describe: of a place where it is stored: a file, or a record of one.
    """

    count: int
    read: Callable[[int, Size], tuple[UInt8[np.ndarray, "height width channels"], Any]]
    describe: Callable[[int], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """What stands in for an array of images: the part of it that is asked for is decoded then.

    Attributes:
        parts: records, and which of them, in order.
        size: height, width and channels of every image.
    """

    parts: tuple[tuple[Records, range], ...]
    size: Size
    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Examples, height, width, channels."""
        return (sum(len(places) for _, places in self.parts), *self.size)

    @property
    def nbytes(self) -> int:
        """Bytes that the decoded images take."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> UInt8[np.ndarray, "examples height width channels"]:
        places = np.arange(len(self))[key]
        images = np.empty((len(places), *self.size), np.uint8)
        for image, place in zip(images, places.tolist(), strict=True):
            records, stored = self.locate(place)
            image[...] = records.read(stored, self.size)[0]
        return images

    def locate(self, place: int) -> tuple[Records, int]:
        """The records that hold an example, and its place among them."""
        for records, places in self.parts:
            if place < len(places):
                return records, places[place]
            place -= len(places)
        raise IndexError(place)


@dataclasses.dataclass(frozen=True)
class Known:
    """What one pass over a stored split finds out: its labels, and mean and std of its images."""

    labels: Int32[np.ndarray, " examples"]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def survey(records: Records, size: Size, folder: Path | None, title: str) -> Known:
    """Decodes every image once, by several threads, and keeps what it learns in `folder`; at once where it is kept.

    Raises:
        UserError: an image cannot be read.
    """
    kept = _open(folder, records.count) if folder else None
    if kept:
        return kept
    print(f"looking through {title}: {records.count:,} images, once", file=sys.stderr, flush=True)
    labels = np.empty(records.count, np.int32)

    def sums(start: int) -> np.ndarray:
        total = np.zeros((2, size[2]), np.float64)
        for place in range(start, min(start + _CHUNK, records.count)):
            image, labels[place] = records.read(place, size)
            pixels = image.reshape(-1, size[2]).astype(np.float64)
            total += pixels.sum(0), np.square(pixels).sum(0)
        return total

    # Sums of whole numbers are exact in float64: the order of the threads does not matter.
    first, second = sum(in_threads(sums, range(0, records.count, _CHUNK))) / (records.count * size[0] * size[1])
    std = np.sqrt(np.maximum(second - first**2, 0))
    known = Known(labels, tuple((first / 255).tolist()), tuple((std / 255).tolist()))
    if folder:
        _keep(folder, known)
    return known


def in_threads(work: Callable, starts: Sequence[int]) -> list:
    """What `work` makes of each, in order, by several threads."""
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        return list(threads.map(work, starts))


def decode_all(records: Records, images: np.ndarray, labels: np.ndarray) -> None:
    """Reads and decodes a whole stored split into `images` and `labels`, with several threads."""

    def work(start: int) -> None:
        for place in range(start, min(start + _STRETCH, len(labels))):
            images[place], labels[place] = records.read(place, images.shape[1:])

    # Pillow decodes and resizes without holding the interpreter's lock.
    in_threads(work, range(0, len(labels), _STRETCH))


def _open(folder: Path, count: int) -> Known | None:
    try:
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        found = json.loads((folder / "mean_std.json").read_text())
        known = Known(labels, tuple(found["mean"]), tuple(found["std"]))
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    return known if (labels.dtype, labels.shape) == (np.int32, (count,)) else None


def _keep(folder: Path, known: Known) -> None:
    """Beside, then in place, each file whole; silently not at all where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".labels.{os.getpid()}.npy"
        np.save(scratch, known.labels)
        os.replace(scratch, folder / "labels.npy")
    except OSError:
        return
    cache.write(folder / "mean_std.json", json.dumps({"mean": known.mean, "std": known.std}).encode())
