"""From a source to batches on the device: the whole set resident there, or its batches sent for each dispatch.

Both ways give the same batches: `order.py` selects the examples, and augmentation runs on the device.
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
from vit_jax.runtime import memory

# Fraction of a device's free memory for a resident set; the rest is for the model and its activations.
RESIDENT_SHARE = 0.3
# Maximum bytes of images that are sent for one dispatch; at least one batch is sent.
SENT_BYTES = 64 * 2**20
BATCH_SPEC = PartitionSpec(None, "data")  # of arrays [batches, batch, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Feed:
    """The input of one dispatch of several batches.

    Attributes:
        images: uint8, the whole set [examples, height, width, channels], or only the batches of the dispatch
            [batches, batch, height, width, channels]; likewise for stored features, float32 [examples, ...].
        labels: int32 [examples] or [batches, batch]; a dictionary of such arrays for several kinds of label.
        indices: int32 [batches, batch] into the whole set; None if images are only the batches of the dispatch.
    """

    # Any: JAX transformations rebuild it with shapes and placeholders instead of arrays.
    images: Any
    labels: Any
    indices: Any


def get_batch(
    feed: Feed, position: Int[Array, ""], sharding: NamedSharding
) -> tuple[Shaped[Array, "batch *example"], Int[Array, " batch"] | dict[str, Int[Array, " batch"]]]:
    """Returns images and labels of the batch at a position of the feed, sharded over the devices."""
    if feed.indices is None:
        return jax.tree.map(lambda array: array[position], (feed.images, feed.labels))
    indices = jax.lax.with_sharding_constraint(feed.indices[position], sharding)
    return jax.tree.map(lambda array: array[indices], (feed.images, feed.labels))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Feeds for training or evaluation from one source.

    Attributes:
        source: source of the examples.
        mesh: device mesh; batches are sharded over its axis 'data'.
        resident: the whole set, replicated on every device; None if batches are sent.
        reading: how batches that are sent are read.
    """

    source: Source
    mesh: Mesh
    resident: Feed | None
    reading: Reading

    def feed(self, indices: Int[np.ndarray, "batches batch"]) -> Feed:
        """Returns the feed of a dispatch over these batches."""
        return next(self.feeds([(indices, len(indices))]))

    def feeds(self, tables: Iterable[tuple[Int[np.ndarray, "batches batch"], int]]) -> Iterator[Feed]:
        """Yields the feed of each table of indices; batches that are sent are read ahead.

        Args:
            tables: indices, and how many of their rows are used.

        Raises:
            UserError: an example cannot be read.
        """
        if self.resident is not None:
            for indices, _ in tables:
                yield dataclasses.replace(self.resident, indices=_put(self.mesh, PartitionSpec(), indices))
            return
        # Each process reads only the columns that its own devices hold.
        for table, images in stream.read_ahead(self.source, self.reading, (self._part(*table) for table in tables)):
            yield self._send(*table.tag, images)

    def rows(self, batch_size: int, max_rows: int) -> int:
        """Returns the number of batches per dispatch: `max_rows`, or fewer if they are sent and large."""
        if self.resident is not None:
            return max_rows
        batch_bytes = batch_size * math.prod(self.source.images.shape[1:]) * self.source.images.dtype.itemsize
        return max(1, min(max_rows, SENT_BYTES // batch_bytes))

    def abstract_feed(self, rows: int, batch_size: int) -> Feed:
        """Returns the shapes and shardings of a feed of `rows` batches, without reading any."""
        if self.resident is not None:
            return self.feed(np.zeros((rows, batch_size), np.int32))
        sharding = NamedSharding(self.mesh, BATCH_SPEC)

        def describe(shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, batch_size, *shape), dtype, sharding=sharding)

        labels = jax.tree.map(lambda labels: describe((), labels.dtype), self.source.targets())
        return Feed(describe(self.source.images.shape[1:], self.source.images.dtype), labels, None)

    def _part(self, indices: Int[np.ndarray, "batches batch"], count: int) -> stream.Table:
        held = NamedSharding(self.mesh, BATCH_SPEC).addressable_devices_indices_map(indices.shape)
        columns = np.unique(np.concatenate([np.arange(indices.shape[1])[index[1]] for index in held.values()]))
        return stream.Table(indices[:count, columns], len(indices), (indices, columns))

    def _send(self, indices: np.ndarray, columns: np.ndarray, images: stream.Images) -> Feed:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            chosen = np.searchsorted(columns, np.arange(indices.shape[1])[index[1]])
            return images[index[0], chosen[0] : chosen[-1] + 1]

        sent = _build(self.mesh, BATCH_SPEC, (*indices.shape, *images.shape[2:]), part)
        labels = jax.tree.map(lambda labels: _put(self.mesh, BATCH_SPEC, labels[indices]), self.source.targets())
        return Feed(sent, labels, None)


def make(source: Source, mesh: Mesh, resident: str = "auto", reading: Reading | None = None) -> Pipeline:
    """Returns a pipeline; `resident` is 'always', 'never', or 'auto' to keep the set on the devices if it fits."""
    reading = reading or Reading()
    fits = resident == "always" or (resident == "auto" and source.images.nbytes <= _room(mesh))
    if not fits:
        return Pipeline(source, mesh, None, reading)
    whole = source.images
    if not isinstance(whole, np.ndarray):
        table = stream.Table(np.arange(len(source))[None], 1)
        whole = next(stream.read_ahead(source, reading, [table]))[1][0]

    def replicate(array: np.ndarray) -> jax.Array:
        return _put(mesh, PartitionSpec(), array)

    return Pipeline(source, mesh, Feed(replicate(whole), jax.tree.map(replicate, source.targets()), None), reading)


def train_indices(
    seed: int, batch_size: int, first: int, count: int, rows: int, examples: int, repeats: int = 1
) -> Int[np.ndarray, "rows batch"]:
    """Returns the examples of the steps first to first + count, one row per step; the remaining rows are unused zeros.

    The number of rows is constant over a run, so every dispatch runs the same compiled program. With repeated
    augmentation (arXiv 1901.09335) a row contains its distinct examples `repeats` times.
    """
    table, distinct = np.zeros((rows, batch_size), np.int32), batch_size // repeats
    examples_of_steps = order.indices(seed, first * distinct, count * distinct, examples).reshape(count, distinct)
    table[:count] = np.tile(examples_of_steps, (1, repeats))
    return table


def evaluation_indices(
    batch_size: int, examples: int
) -> tuple[Int[np.ndarray, "batches batch"], Bool[np.ndarray, "batches batch"]]:
    """Returns every example once, in order, and a mask that is False for the padding of the last batch."""
    batches = -(-examples // batch_size)
    indices = np.arange(batches * batch_size).reshape(batches, batch_size)
    real = indices < examples
    return np.where(real, indices, 0).astype(np.int32), real


def _put(mesh: Mesh, spec: PartitionSpec, array: np.ndarray) -> jax.Array:
    return _build(mesh, spec, array.shape, lambda index: array[index])


def _build(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], read: Callable) -> jax.Array:
    # Reads only the parts of this process's own devices.
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)


def _room(mesh: Mesh) -> float:
    """Returns the bytes available to a resident set on each device."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        # CPU devices share the memory.
        return RESIDENT_SHARE * memory.free_host_memory() / len(mesh.local_devices)
    return RESIDENT_SHARE * memory.free_device_memory(device)
