"""The operations of the policies by name, applied to batches in which each image has drawn its own.

An image's operations are a chain of layers, each with one operation and its argument. There is no branching: the
geometric operation of a layer is an affine map per image, most operations on pixel values are a lookup table per image,
and maps and tables are selected per image while they are small, before any pixel is touched.

To add an operation, add an entry to one of the dictionaries below; a test then requires that it is compared with
Pillow. Neither the order of these entries nor the values of `CODES` affect the random streams: a policy draws an index
into its own list of names (see `policies.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from vit_jax.data import geometry, pixels
from vit_jax.data.no_fuse import no_fuse

Images = UInt8[Array, "batch height width channels"]
Inside = Bool[Array, "batch height width"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """The operations that the images of a batch have drawn.

    Attributes:
        codes: int32 [layers, batch], indices into `NAMES`.
        arguments: float32 [layers, batch], in the unit of the operation.
    """

    # Any: JAX transformations rebuild it with shapes and placeholders instead of arrays.
    codes: Any
    arguments: Any


# name -> function(argument, height, width) that returns affine maps; arguments are degrees, factors or pixels.
GEOMETRIC: dict[str, Callable] = {
    "rotate": geometry.rotate,
    "shear_x": lambda factor, height, width: geometry.shear_x(factor),
    "shear_y": lambda factor, height, width: geometry.shear_y(factor),
    "translate_x": lambda distance, height, width: geometry.translate_x(distance),
    "translate_y": lambda distance, height, width: geometry.translate_y(distance),
}

# name -> function(argument, statistics) that returns lookup tables.
TABLES: dict[str, Callable] = {
    "invert": lambda unused, statistics: pixels.invert(len(unused)),
    "posterize": lambda bits, statistics: pixels.posterize(bits),
    "solarize": lambda threshold, statistics: pixels.solarize(threshold),
    "solarize_add": lambda added, statistics: pixels.solarize_add(added),
    "brightness": lambda factor, statistics: pixels.brightness(factor),
    "contrast": lambda factor, statistics: pixels.contrast(factor, statistics.mean()),
    "auto_contrast": lambda unused, statistics: no_fuse(pixels.auto_contrast)(statistics.histogram()),
    "equalize": lambda unused, statistics: no_fuse(pixels.equalize)(statistics.histogram()),
}

# name -> function(images) that returns what is blended with the image; the argument is the factor, 1 for the image.
BLENDED: dict[str, Callable] = {"color": pixels.grey, "sharpness": no_fuse(pixels.smooth)}

# name -> function(images, argument) that returns the changed images.
OTHERS: dict[str, Callable] = {
    "grayscale": lambda images, unused: jnp.broadcast_to(pixels.grey(images), images.shape).astype(jnp.uint8),
    "blur": pixels.blur,
    "hue": pixels.shift_hue,
}

NAMES = ("identity", *GEOMETRIC, *TABLES, *BLENDED, *OTHERS)
CODES = {name: code for code, name in enumerate(NAMES)}


class Statistics:
    """Statistics of the pixels inside the image, each computed once, when an operation needs it."""

    def __init__(self, images: Images, inside: Inside):
        """Remembers the images and the mask of the pixels that count."""
        self._images, self._inside = images, inside
        self._histogram = self._mean = None

    def histogram(self) -> Int[Array, "batch channels 256"]:
        """Returns `pixels.histogram`."""
        if self._histogram is None:
            self._histogram = pixels.histogram(self._images, self._inside)
        return self._histogram

    def mean(self) -> Int[Array, " batch"]:
        """Returns `pixels.mean_grey`."""
        if self._mean is None:
            self._mean = no_fuse(pixels.mean_grey)(self._images, self._inside)
        return self._mean


def affine_maps(
    codes: Int[Array, " batch"], arguments: Float[Array, " batch"], names: tuple[str, ...], height: int, width: int
) -> Float[Array, "batch 2 3"]:
    """Returns the affine maps of a layer; the identity for images whose operation is not geometric.

    Args:
        codes: operation of each image.
        arguments: argument of each image's operation.
        names: the operations that can occur in `codes`.
        height: of the images.
        width: of the images.
    """
    chosen = geometry.translate_x(jnp.zeros_like(arguments))
    for name in names:
        if name in GEOMETRIC:
            maps = GEOMETRIC[name](arguments, height, width)
            chosen = jnp.where((codes == CODES[name])[:, None, None], maps, chosen)
    return chosen


def apply(
    images: Images,
    inside: Inside,
    codes: Int[Array, " batch"],
    arguments: Float[Array, " batch"],
    names: tuple[str, ...],
) -> Images:
    """Returns the images after a layer's operations on pixel values; images with another operation are unchanged.

    Args:
        images: batch of images.
        inside: mask of the pixels that statistics are computed from.
        codes: operation of each image.
        arguments: argument of each image's operation.
        names: the operations that can occur in `codes`.
    """
    before = images
    if any(name in TABLES for name in names):
        images = pixels.look_up(before, _tables(Statistics(images, inside), codes, arguments, names))
    for name in names:
        if name in BLENDED:
            images = no_fuse(_blend)(images, before, BLENDED[name](before), _selected(name, codes), arguments)
        if name in OTHERS:
            images = jnp.where(_selected(name, codes), no_fuse(OTHERS[name])(before, arguments), images)
    return images


def _selected(name: str, codes: Int[Array, " batch"]) -> Bool[Array, "batch 1 1 1"]:
    return (codes == CODES[name])[:, None, None, None]


def _tables(
    statistics: Statistics, codes: Int[Array, " batch"], arguments: Float[Array, " batch"], names: tuple[str, ...]
) -> Int[Array, "batch _ 256"]:
    tables = pixels.identity(len(codes))
    for name in names:
        if name in TABLES:
            tables = jnp.where((codes == CODES[name])[:, None, None], TABLES[name](arguments, statistics), tables)
    return tables


def _blend(
    others: Images,
    images: Images,
    degenerate: Int[Array, "batch height width _"],
    selected: Bool[Array, "batch 1 1 1"],
    factor: Float[Array, " batch"],
) -> Images:
    blended = pixels.blend(degenerate, images.astype(jnp.int32), factor[:, None, None, None])
    return jnp.where(selected, blended.astype(jnp.uint8), others)


def any_geometric(names: tuple[str, ...]) -> bool:
    """Returns whether any of the operations is geometric."""
    return any(name in GEOMETRIC for name in names)


def is_geometric(codes: Int[Array, "layers batch"]) -> Bool[Array, " batch"]:
    """Returns which images have drawn a geometric operation in any layer."""
    # Their codes are contiguous, because NAMES contains all keys of GEOMETRIC together.
    first, last = (CODES[name] for name in (next(iter(GEOMETRIC)), list(GEOMETRIC)[-1]))
    return ((codes >= first) & (codes <= last)).any(0)
