"""The operations of the policies by name, applied to a batch in which each image has drawn some of its own.

An image's operations are a chain of layers, one operation and its argument each. Nothing branches: what a layer's
geometric operations are is a matrix an image, what its operations on pixels are is a table an image, and both are
chosen by selection among small arrays before the pixels are touched.
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
    """What each image of a batch has drawn.

    Attributes:
        codes: int32 [layers, batch], places in `NAMES`.
        arguments: float32 [layers, batch], in the unit of the operation.
    """

    # Any: transformations of JAX rebuild it with shapes and placeholders in place of arrays.
    codes: Any
    arguments: Any


# The map of an operation, of (argument, height, width); degrees, shares of a side, pixels.
GEOMETRIC: dict[str, Callable] = {
    "rotate": geometry.rotate,
    "shear_x": lambda factor, height, width: geometry.shear_x(factor),
    "shear_y": lambda factor, height, width: geometry.shear_y(factor),
    "translate_x": lambda distance, height, width: geometry.translate_x(distance),
    "translate_y": lambda distance, height, width: geometry.translate_y(distance),
}

# The table of an operation, of (argument, statistics).
TABLES: dict[str, Callable] = {
    "invert": lambda unused, seen: pixels.invert(len(unused)),
    "posterize": lambda bits, seen: pixels.posterize(bits),
    "solarize": lambda threshold, seen: pixels.solarize(threshold),
    "solarize_add": lambda added, seen: pixels.solarize_add(added),
    "brightness": lambda factor, seen: pixels.brightness(factor),
    "contrast": lambda factor, seen: pixels.contrast(factor, seen.mean()),
    "auto_contrast": lambda unused, seen: no_fuse(pixels.auto_contrast)(seen.histogram()),
    "equalize": lambda unused, seen: no_fuse(pixels.equalize)(seen.histogram()),
}

# What an image is blended with, by a factor of which 1 leaves it as it is.
BLENDED: dict[str, Callable] = {"color": pixels.grey, "sharpness": no_fuse(pixels.smooth)}

# Made of (images, argument) as they are.
OTHERS: dict[str, Callable] = {
    "grayscale": lambda images, unused: jnp.broadcast_to(pixels.grey(images), images.shape).astype(jnp.uint8),
    "blur": pixels.blur,
    "hue": pixels.turn_hue,
}

NAMES = ("identity", *GEOMETRIC, *TABLES, *BLENDED, *OTHERS)
CODES = {name: code for code, name in enumerate(NAMES)}


class Statistics:
    """Of the pixels inside, computed where an operation asks for them, once."""

    def __init__(self, images: Images, inside: Inside):
        """Of these images."""
        self._images, self._inside = images, inside
        self._histogram = self._mean = None

    def histogram(self) -> Int[Array, "batch channels 256"]:
        """See `pixels.histogram`."""
        if self._histogram is None:
            self._histogram = pixels.histogram(self._images, self._inside)
        return self._histogram

    def mean(self) -> Int[Array, " batch"]:
        """See `pixels.mean_grey`."""
        if self._mean is None:
            self._mean = no_fuse(pixels.mean_grey)(self._images, self._inside)
        return self._mean


def maps(
    codes: Int[Array, " batch"], arguments: Float[Array, " batch"], names: tuple[str, ...], height: int, width: int
) -> Float[Array, "batch 2 3"]:
    """A layer's geometric operations, among `names`, as a map an image; others are the map that moves nothing."""
    chosen = geometry.translate_x(jnp.zeros_like(arguments))
    for name in names:
        if name in GEOMETRIC:
            made = GEOMETRIC[name](arguments, height, width)
            chosen = jnp.where((codes == CODES[name])[:, None, None], made, chosen)
    return chosen


def apply(
    images: Images,
    inside: Inside,
    codes: Int[Array, " batch"],
    arguments: Float[Array, " batch"],
    names: tuple[str, ...],
) -> Images:
    """A layer's operations on pixels, among `names`; every other image stays as it is."""
    here = lambda name: (codes == CODES[name])[:, None, None, None]  # noqa: E731
    before = images
    if any(name in TABLES for name in names):
        images = pixels.look_up(before, _table(Statistics(images, inside), codes, arguments, names))
    for name in names:
        if name in BLENDED:
            images = no_fuse(_blended)(images, before, BLENDED[name](before), here(name), arguments)
        if name in OTHERS:
            images = jnp.where(here(name), no_fuse(OTHERS[name])(before, arguments), images)
    return images


def _table(
    seen: Statistics, codes: Int[Array, " batch"], arguments: Float[Array, " batch"], names: tuple[str, ...]
) -> Int[Array, "batch _ 256"]:
    table = pixels.identity(len(codes))
    for name in names:
        if name in TABLES:
            table = jnp.where((codes == CODES[name])[:, None, None], TABLES[name](arguments, seen), table)
    return table


def _blended(
    others: Images,
    images: Images,
    degenerate: Int[Array, "batch height width _"],
    here: Bool[Array, "batch 1 1 1"],
    factor: Float[Array, " batch"],
) -> Images:
    made = pixels.blend(degenerate, images.astype(jnp.int32), factor[:, None, None, None])
    return jnp.where(here, made.astype(jnp.uint8), others)


def moves(names: tuple[str, ...]) -> bool:
    """Whether any of the operations is geometric."""
    return any(name in GEOMETRIC for name in names)


def moved(codes: Int[Array, "layers batch"]) -> Bool[Array, " batch"]:
    """Which images have drawn a geometric operation."""
    first, last = (CODES[name] for name in (next(iter(GEOMETRIC)), list(GEOMETRIC)[-1]))
    return ((codes >= first) & (codes <= last)).any(0)
