"""From a source to what the device reads: the whole set resident there, or its batches sent for each dispatch.

Both ways give the same batches: the order (`order.py`) names them, and what happens to them happens on the device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, UInt8

from vit_jax.data import order
from vit_jax.data.sources import Source

# What of a device's free memory a resident set may take; the rest is for the model and its activations.
RESIDENT_SHARE = 0.3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Feed:
    """What one dispatch of several batches reads.

    Attributes:
        images: uint8, the whole set [examples, height, width, channels], or the batches' own
            [batches, batch, height, width, channels].
        labels: int32, likewise [examples] or [batches, batch].
        indices: int32 [batches, batch] into the whole set; None where images are the batches' own.
    """

    # Any: transformations of JAX rebuild it with shapes and placeholders in place of arrays.
    images: Any
    labels: Any
    indices: Any


def take(
    feed: Feed, position: Int[Array, ""], sharding: NamedSharding
) -> tuple[UInt8[Array, "batch height width channels"], Int[Array, " batch"]]:
    """The batch at a position of the feed, each device holding its share of the examples."""
    if feed.indices is None:
        return feed.images[position], feed.labels[position]
    indices = jax.lax.with_sharding_constraint(feed.indices[position], sharding)
    return feed.images[indices], feed.labels[indices]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Feeds for training or evaluation from one source.

    Attributes:
        source: where the examples come from.
        mesh: the devices; batches are spread over its axis 'data'.
        resident: the whole set as it lies on every device, or None where batches are sent.
    """

    source: Source
    mesh: Mesh
    resident: Feed | None

    def feed(self, indices: Int[np.ndarray, "batches batch"]) -> Feed:
        """What a dispatch over these batches reads."""
        if self.resident is not None:
            return dataclasses.replace(self.resident, indices=_put(self.mesh, PartitionSpec(), indices))
        spread = PartitionSpec(None, "data")
        height, width, channels = self.source.images.shape[1:]
        images = _build(
            self.mesh,
            spread,
            (*indices.shape, height, width, channels),
            lambda index: self.source.read(indices[index[:2]].ravel()).reshape(
                *indices[index[:2]].shape, height, width, channels
            ),
        )
        return Feed(images, _put(self.mesh, spread, self.source.labels[indices]), None)


def make(source: Source, mesh: Mesh, resident: str = "auto") -> Pipeline:
    """A pipeline over a source; `resident` is 'always', 'never', or 'auto' for where the set fits on each device."""
    fits = resident == "always" or (resident == "auto" and source.images.nbytes <= _room(mesh))
    if not fits:
        return Pipeline(source, mesh, None)
    images = _put(mesh, PartitionSpec(), source.images)
    labels = _put(mesh, PartitionSpec(), source.labels)
    return Pipeline(source, mesh, Feed(images, labels, None))


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
