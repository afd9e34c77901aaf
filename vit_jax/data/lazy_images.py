"""Encoded examples: decoded each time they are read, or a whole split at once."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from vit_jax import atomic, terminal
from vit_jax.data import cache
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.progress import Counter

_SCAN_CHUNK = 64  # images that a thread decodes per task of a scan
_DECODE_CHUNK = 256  # the same for `decode_all`

Size = tuple[int, int, int]  # height, width, channels


@dataclasses.dataclass(frozen=True)
class Records:
    """The encoded examples of a stored split. Any number of threads may read at once.

    Attributes:
        count: number of examples.
        read: read(index, size, how) returns an image of that height, width and number of channels, and its label; `how`
            it is resized and cropped is that of training by default.
        describe: describe(index) returns where the example is stored: a file, or a record of one.
    """

    count: int
    read: Callable[..., tuple[UInt8[np.ndarray, "height width channels"], Any]]
    describe: Callable[[int], str]


@dataclasses.dataclass(frozen=True, eq=False)
class LazyImages:
    """Stands in for an array of images; indexing decodes the selected images.

    Attributes:
        parts: records, and the range of them that is used, in order.
        size: height, width and channels of every image.
        how: images are resized and cropped.
    """

    parts: tuple[tuple[Records, range], ...]
    size: Size
    how: Preparation = COVER
    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Examples, height, width, channels."""
        return (sum(len(indices) for _, indices in self.parts), *self.size)

    @property
    def nbytes(self) -> int:
        """Size of the decoded images in bytes."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> UInt8[np.ndarray, "examples height width channels"]:
        indices = np.arange(len(self))[key]
        images = np.empty((len(indices), *self.size), np.uint8)
        for image, index in zip(images, indices.tolist(), strict=True):
            records, record = self.locate(index)
            image[...] = records.read(record, self.size, self.how)[0]
        return images

    def locate(self, index: int) -> tuple[Records, int]:
        """Returns the records that contain an example, and its index among them."""
        for records, indices in self.parts:
            if index < len(indices):
                return records, indices[index]
            index -= len(indices)
        raise IndexError(index)


@dataclasses.dataclass(frozen=True)
class ScannedSplit:
    """The result of one pass over a stored split: labels, and mean and standard deviation of the pixels in [0, 1]."""

    labels: Int32[np.ndarray, " examples"]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def scan(records: Records, size: Size, folder: Path | None, title: str, how: Preparation = COVER) -> ScannedSplit:
    """Decodes every image once, with several threads; the result is cached in `folder` and read from there next time.

    Raises:
        UserError: an image cannot be read.
    """
    cached = _open(folder, records.count, size[2]) if folder else None
    if cached:
        return cached
    terminal.warn(f"scanning {title}: {records.count:,} images (only once)")
    labels = np.empty(records.count, np.int32)

    def sums(start: int) -> np.ndarray:
        total = np.zeros((2, size[2]), np.float64)
        for index in range(start, min(start + _SCAN_CHUNK, records.count)):
            image, labels[index] = records.read(index, size, how)
            pixels = image.reshape(-1, size[2]).astype(np.float64)
            total += pixels.sum(0), np.square(pixels).sum(0)
        return total

    # Sums of integers are exact in float64, so the order of the threads does not matter.
    chunks = range(0, records.count, _SCAN_CHUNK)
    with Counter("scanning", records.count, "images") as counter:
        total = sum(counter.over(map_in_threads(sums, chunks), _SCAN_CHUNK))
    first, second = total / (records.count * size[0] * size[1])
    std = np.sqrt(np.maximum(second - first**2, 0))
    known = ScannedSplit(labels, tuple((first / 255).tolist()), tuple((std / 255).tolist()))
    if folder:
        _keep(folder, known)
    return known


def map_in_threads(function: Callable, arguments: Sequence[int]) -> Iterator:
    """Yields the function's result for each argument, in order, computed by several threads."""
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        yield from threads.map(function, arguments)


def decode_all(records: Records, images: np.ndarray, labels: np.ndarray, how: Preparation = COVER) -> None:
    """Decodes a whole stored split into `images` and `labels` with several threads."""

    def decode(start: int) -> None:
        for index in range(start, min(start + _DECODE_CHUNK, len(labels))):
            images[index], labels[index] = records.read(index, images.shape[1:], how)

    # Pillow releases the GIL while it decodes and resizes.
    with Counter("decoding", len(labels), "images") as counter:
        for _ in counter.over(map_in_threads(decode, range(0, len(labels), _DECODE_CHUNK)), _DECODE_CHUNK):
            pass


def _open(folder: Path, count: int, channels: int) -> ScannedSplit | None:
    statistics = cache.read_mean_std(folder, channels)
    try:
        labels = np.load(folder / "labels.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_complete = statistics is not None and (labels.dtype, labels.shape) == (np.int32, (count,))
    return ScannedSplit(labels, *statistics) if is_complete else None


def _keep(folder: Path, known: ScannedSplit) -> None:
    """Beside, then in place, each file whole; silently not at all where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replace(folder / "labels.npy") as file:
            np.save(file, known.labels)
    except OSError:
        return
    cache.write_mean_std(folder, known.mean, known.std)
