"""From a source to what the device reads: the whole set resident there, or its batches sent for each dispatch.

Both ways give the same batches: the order (`order.py`) names them, and what happens to them happens on the device.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Shaped

from vit_jax.data import order, stream
from vit_jax.data.sources import Source
from vit_jax.data.stream import Reading

# What of a device's free memory a resident set may take; the rest is for the model and its activations.
RESIDENT_SHARE = 0.3
# Bytes of images that are sent for one dispatch, at most (but one batch at least).
SENT_BYTES = 64 * 2**20
SPREAD = PartitionSpec(None, "data")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Feed:
    """What one dispatch of several batches reads.

    Attributes:
        images: uint8, the whole set [examples, height, width, channels], or the batches' own
            [batches, batch, height, width, channels]; stored features likewise, float32 [examples, ...].
        labels: int32, likewise [examples] or [batches, batch]; a dictionary of such where there are several kinds.
        indices: int32 [batches, batch] into the whole set; None where images are the batches' own.
    """

    # Any: transformations of JAX rebuild it with shapes and placeholders in place of arrays.
    images: Any
    labels: Any
    indices: Any


def get_batch(
    feed: Feed, position: Int[Array, ""], sharding: NamedSharding
) -> tuple[Shaped[Array, "batch *example"], Int[Array, " batch"] | dict[str, Int[Array, " batch"]]]:
    """The batch at a position of the feed, each device holding its share of the examples."""
    if feed.indices is None:
        return jax.tree.map(lambda array: array[position], (feed.images, feed.labels))
    indices = jax.lax.with_sharding_constraint(feed.indices[position], sharding)
    return jax.tree.map(lambda array: array[indices], (feed.images, feed.labels))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Feeds for training or evaluation from one source.

    Attributes:
        source: where the examples come from.
        mesh: the devices; batches are spread over its axis 'data'.
        resident: the whole set as it lies on every device, or None where batches are sent.
        reading: how those are read that are sent.
    """

    source: Source
    mesh: Mesh
    resident: Feed | None
    reading: Reading

    def feed(self, indices: Int[np.ndarray, "batches batch"]) -> Feed:
        """What a dispatch over these batches reads."""
        return next(self.feeds([(indices, len(indices))]))

    def feeds(self, tables: Iterable[tuple[Int[np.ndarray, "batches batch"], int]]) -> Iterator[Feed]:
        """The feed of each table of batches, of which so many rows are used; of a set that is sent, read ahead.

        Raises:
            UserError: an example cannot be read.
        """
        if self.resident is not None:
            for indices, _ in tables:
                yield dataclasses.replace(self.resident, indices=_put(self.mesh, PartitionSpec(), indices))
            return
        # Of several processes, each reads the columns alone that its own devices hold.
        for table, images in stream.read_ahead(self.source, self.reading, (self._part(*table) for table in tables)):
            yield self._send(*table.tag, images)

    def rows(self, batch_size: int, wanted: int) -> int:
        """How many batches a dispatch has room for: those wanted, or as many as are sent at a time."""
        if self.resident is not None:
            return wanted
        batch_bytes = batch_size * math.prod(self.source.images.shape[1:]) * self.source.images.dtype.itemsize
        return max(1, min(wanted, SENT_BYTES // batch_bytes))

    def abstract_feed(self, rows: int, batch_size: int) -> Feed:
        """Shapes and shardings of a feed of so many batches, without reading one."""
        if self.resident is not None:
            return self.feed(np.zeros((rows, batch_size), np.int32))
        sharding = NamedSharding(self.mesh, SPREAD)

        def describe(shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, batch_size, *shape), dtype, sharding=sharding)

        labels = jax.tree.map(lambda labels: describe((), labels.dtype), self.source.targets())
        return Feed(describe(self.source.images.shape[1:], self.source.images.dtype), labels, None)

    def _part(self, indices: Int[np.ndarray, "batches batch"], count: int) -> stream.Table:
        held = NamedSharding(self.mesh, SPREAD).addressable_devices_indices_map(indices.shape)
        columns = np.unique(np.concatenate([np.arange(indices.shape[1])[index[1]] for index in held.values()]))
        return stream.Table(indices[:count, columns], len(indices), (indices, columns))

    def _send(self, indices: np.ndarray, columns: np.ndarray, images: stream.Images) -> Feed:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.searchsorted(columns, np.arange(indices.shape[1])[index[1]])
            return images[index[0], wanted[0] : wanted[-1] + 1]

        sent = _build(self.mesh, SPREAD, (*indices.shape, *images.shape[2:]), part)
        put = lambda labels: _put(self.mesh, SPREAD, labels[indices])  # noqa: E731
        return Feed(sent, jax.tree.map(put, self.source.targets()), None)


def make(source: Source, mesh: Mesh, resident: str = "auto", reading: Reading | None = None) -> Pipeline:
    """A pipeline over a source; `resident` is 'always', 'never', or 'auto' for where the set fits on each device."""
    reading = reading or Reading()
    fits = resident == "always" or (resident == "auto" and source.images.nbytes <= _room(mesh))
    if not fits:
        return Pipeline(source, mesh, None, reading)
    whole = source.images
    if not isinstance(whole, np.ndarray):
        table = stream.Table(np.arange(len(source))[None], 1)
        whole = next(stream.read_ahead(source, reading, [table]))[1][0]
    put = lambda array: _put(mesh, PartitionSpec(), array)  # noqa: E731
    return Pipeline(source, mesh, Feed(put(whole), jax.tree.map(put, source.targets()), None), reading)


def train_indices(
    seed: int, batch_size: int, first: int, count: int, rows: int, examples: int, repeats: int = 1
) -> Int[np.ndarray, "rows batch"]:
    """The examples of the steps first .. first + count, a row a step; rows beyond them are zeros that nobody reads.

    The number of rows is constant over a run, so that every dispatch runs the one compiled program. With repeated
    augmentation (arXiv 1901.09335) a row is its distinct examples over again, `repeats` times.
    """
    table, distinct = np.zeros((rows, batch_size), np.int32), batch_size // repeats
    taken = order.indices(seed, first * distinct, count * distinct, examples).reshape(count, distinct)
    table[:count] = np.tile(taken, (1, repeats))
    return table


def evaluation_indices(
    batch_size: int, examples: int
) -> tuple[Int[np.ndarray, "batches batch"], Bool[np.ndarray, "batches batch"]]:
    """Every example once, in order, and True where a place holds one: the last batch is filled up with example 0."""
    batches = -(-examples // batch_size)
    places = np.arange(batches * batch_size).reshape(batches, batch_size)
    real = places < examples
    return np.where(real, places, 0).astype(np.int32), real


def _put(mesh: Mesh, spec: PartitionSpec, array: np.ndarray) -> jax.Array:
    return _build(mesh, spec, array.shape, lambda index: array[index])


def _build(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], read: Callable) -> jax.Array:
    # Asks for each device's part alone: a process of several reads only what its own devices hold.
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)


def _room(mesh: Mesh) -> float:
    """Bytes that a resident set may take on each device."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        # Host devices share the memory, and a set that is mapped from disk need not be copied into it.
        import psutil

        return RESIDENT_SHARE * psutil.virtual_memory().available / len(mesh.local_devices)
    stats = device.memory_stats() or {}
    return RESIDENT_SHARE * (stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))
