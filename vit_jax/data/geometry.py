"""Geometric operations, composed so that each pixel of the result is interpolated from the source once.

An image is first cut from a window of its source (a crop that is resized and possibly mirrored), then transformed by a
chain of affine maps (rotated, sheared, translated). Each map follows Pillow's convention: it maps a pixel of the result
to coordinates in the input, x before y, in pixels, with the centre of the first pixel at (0.5, 0.5).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped, UInt8

from vit_jax.data.no_fuse import no_fuse

ATTEMPTS = 10  # draws of a random resized crop, as in torchvision
_BITS = 12  # of an interpolation weight: the product of two weights and an 8-bit pixel just fits into 32 bits

AffineMaps = Float[Array, "batch 2 3"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """The window that each image of a batch is cut from, before it is resized to the size of the result.

    Attributes:
        top, left: int32 [batch], first row and column of the window.
        height, width: int32 [batch], size of the window.
        mirrored: bool [batch], whether the window is then mirrored left to right.
    """

    # Any: JAX transformations rebuild it with shapes and placeholders instead of arrays.
    top: Any
    left: Any
    height: Any
    width: Any
    mirrored: Any


def full_windows(batch: int, height: int, width: int) -> Windows:
    """Returns windows that cover the whole image."""
    zeros = jnp.zeros(batch, jnp.int32)
    return Windows(zeros, zeros, zeros + height, zeros + width, jnp.zeros(batch, bool))


def resized_crop(
    key: PRNGKeyArray, batch: int, height: int, width: int, area: tuple[float, float], ratio: float
) -> Windows:
    """Returns windows of random area and aspect ratio, as torchvision's RandomResizedCrop.

    Ten sizes are drawn per image and the first that fits is used; if none fits, the largest central window with an
    allowed aspect ratio.

    Args:
        key: random key.
        batch: number of images.
        height: of the images.
        width: of the images.
        area: minimum and maximum area as a fraction of the image; sampled uniformly.
        ratio: maximum ratio of width to height; its logarithm is sampled uniformly from -log(ratio) to log(ratio).
    """
    area_key, ratio_key, position_key = jax.random.split(key, 3)
    pixels = height * width * jax.random.uniform(area_key, (ATTEMPTS, batch), minval=area[0], maxval=area[1])
    ratios = jnp.exp(jax.random.uniform(ratio_key, (ATTEMPTS, batch), minval=-math.log(ratio), maxval=math.log(ratio)))
    widths, heights = jnp.round(jnp.sqrt(pixels * ratios)), jnp.round(jnp.sqrt(pixels / ratios))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.argmax(0)[None]
    found = fits.any(0)
    central = (round(width / max(1.0, width / height / ratio)), round(height / max(1.0, height / width / ratio)))
    window_width = jnp.where(found, jnp.take_along_axis(widths, first, 0)[0], central[0])
    window_height = jnp.where(found, jnp.take_along_axis(heights, first, 0)[0], central[1])
    positions = jax.random.uniform(position_key, (2, batch))
    free = jnp.stack([height - window_height, width - window_width])
    top, left = jnp.where(found, jnp.minimum(jnp.floor(positions * (free + 1)), free), free // 2).astype(jnp.int32)
    sizes = window_height.astype(jnp.int32), window_width.astype(jnp.int32)
    return Windows(top, left, *sizes, jnp.zeros(batch, bool))


def rotate(degrees: Float[Array, " batch"], height: int, width: int) -> AffineMaps:
    """Returns counter-clockwise rotations about the centre."""
    angle = -jnp.deg2rad(degrees)
    return similarity(jnp.cos(angle), jnp.sin(angle), height, width)


def similarity(cosine: Float[Array, " batch"], sine: Float[Array, " batch"], height: int, width: int) -> AffineMaps:
    """Returns maps with the matrix [[cosine, sine], [-sine, cosine]] that keep the centre fixed."""
    x, y = width / 2, height / 2
    return _affine(cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)


def shear_x(factor: Float[Array, " batch"]) -> AffineMaps:
    """Returns maps that shift each row by `factor` times its distance from the top edge."""
    return _affine(1, factor, 0, 0, 1, 0)


def shear_y(factor: Float[Array, " batch"]) -> AffineMaps:
    """Returns maps that shift each column by `factor` times its distance from the left edge."""
    return _affine(1, 0, 0, factor, 1, 0)


def translate_x(pixels: Float[Array, " batch"]) -> AffineMaps:
    """Returns translations to the left."""
    return _affine(1, 0, pixels, 0, 1, 0)


def translate_y(pixels: Float[Array, " batch"]) -> AffineMaps:
    """Returns translations upwards."""
    return _affine(1, 0, 0, 0, 1, pixels)


def _affine(*entries: Float[Array, " batch"] | int) -> AffineMaps:
    rows = jnp.stack(jnp.broadcast_arrays(*(jnp.asarray(entry, jnp.float32) for entry in entries)), -1)
    return rows.reshape(-1, 2, 3)


def look_up(
    images: UInt8[Array, "batch source_height source_width channels"],
    windows: Windows,
    maps: list[AffineMaps],
    moved: Bool[Array, " batch"],
    height: int,
    width: int,
) -> tuple[UInt8[Array, "batch {height} {width} channels"], Bool[Array, "batch {height} {width}"]]:
    """Returns the images after windows and maps, in this order, and a mask of the pixels from inside the image.

    Pixels are interpolated bilinearly with integer weights of 12 bits, so every device computes the same pixels. A
    pixel is outside if any of the maps reaches beyond the edges, as if the maps were applied one by one.

    Args:
        images: sources of the windows.
        windows: window of each image.
        maps: affine maps, in the order of their application.
        moved: True to round down, as Pillow's affine transforms do; False to round to nearest, as its resizing does.
        height: of the result.
        width: of the result.
    """
    x = jnp.broadcast_to(jnp.arange(width) + 0.5, (1, height, width))
    y = jnp.broadcast_to((jnp.arange(height) + 0.5)[:, None], (1, height, width))
    inside = jnp.ones((len(images), height, width), bool)
    for entries in reversed(maps):
        a, b, c, d, e, f = entries.reshape(-1, 6).T[:, :, None, None]
        x, y = a * x + b * y + c, d * x + e * y + f
        inside &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x = jnp.where(_per_image(windows.mirrored), width - x, x)
    columns, right = _neighbours(
        x * _per_image(windows.width / width), _per_image(windows.left), _per_image(windows.width)
    )
    rows, below = _neighbours(
        y * _per_image(windows.height / height), _per_image(windows.top), _per_image(windows.height)
    )
    corners = no_fuse(_gather)(images, rows, columns)
    half = jnp.where(_per_image(moved), 0, 1 << (2 * _BITS - 1)).astype(jnp.uint32)
    return no_fuse(functools.partial(_interpolate, images.shape[-1]))(corners, right, below, half), inside


def _per_image(values: Shaped[Array, " batch"]) -> Shaped[Array, "batch 1 1"]:
    return values[:, None, None]


def _neighbours(
    position: jax.Array, first: jax.Array, size: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Returns the two pixels of a window on either side of each position, and the weight of the second."""
    # Rounded to a fraction of a pixel first: a float32 error must not turn a shift by whole pixels into a blur.
    steps = jnp.round((position - 0.5) * (1 << _BITS)).astype(jnp.int32)
    before, weight = steps >> _BITS, (steps & ((1 << _BITS) - 1)).astype(jnp.uint32)
    return tuple(first + jnp.clip(before + k, 0, size - 1) for k in (0, 1)), weight


def _gather(images: jax.Array, rows: tuple[jax.Array, ...], columns: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Returns the four pixels at `rows` x `columns`, each packed into 32 bits: one gather reads all channels."""
    batch, _, width, channels = images.shape
    packed = sum(images[..., k].astype(jnp.uint32) << (8 * k) for k in range(channels)).reshape(batch, -1)
    fetch = jax.vmap(lambda pixels, indices: pixels.at[indices].get(mode="clip"))
    return [fetch(packed, row * width + column) for row in rows for column in columns]


def _interpolate(
    channels: int, corners: list[jax.Array], right: jax.Array, below: jax.Array, half: jax.Array
) -> UInt8[Array, "batch height width {channels}"]:
    """Returns the pixels between four packed corners; `half` is added to the weighted sum before it is rounded down."""
    one = jnp.uint32(1 << _BITS)

    def weighted(shift: int) -> jax.Array:
        first, second, third, fourth = ((corner >> shift) & 255 for corner in corners)
        upper = first * (one - right) + second * right
        lower = third * (one - right) + fourth * right
        return (upper * (one - below) + lower * below + half) >> (2 * _BITS)

    return jnp.stack([weighted(8 * k) for k in range(channels)], -1).astype(jnp.uint8)
