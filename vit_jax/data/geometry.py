"""Geometric operations, composed: whatever was drawn for an image, each of its pixels is looked up once.

An image is first taken from a window of its source (a crop, resized, perhaps mirrored), then moved by a chain of affine
maps (turned, sheared, shifted). Each is written as Pillow writes it, from a pixel of the result to the place in the
input that it comes from, x before y, in pixels, the centre of the first pixel at (0.5, 0.5).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from vit_jax.data.no_fuse import no_fuse

ATTEMPTS = 10  # at a random resized crop, as in torchvision
_BITS = 12  # of the weights of the look-up: two of them and 8 bits of a pixel just fit into 32

Maps = Float[Array, "batch 2 3"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """Where each image of a batch is cut from its source, before it is scaled to the size of the result.

    Attributes:
        top, left: int32 [batch], the window's first row and column.
        height, width: int32 [batch], its size.
        mirrored: bool [batch], whether it is then turned left to right.
    """

    # Any: transformations of JAX rebuild it with shapes and placeholders in place of arrays.
    top: Any
    left: Any
    height: Any
    width: Any
    mirrored: Any


def whole(batch: int, height: int, width: int) -> Windows:
    """All of each image, as it is."""
    zeros = jnp.zeros(batch, jnp.int32)
    return Windows(zeros, zeros, zeros + height, zeros + width, jnp.zeros(batch, bool))


def resized_crop(
    key: PRNGKeyArray, batch: int, height: int, width: int, area: tuple[float, float], ratio: float
) -> Windows:
    """Windows of a random share of the area and a random ratio of width to height (torchvision's RandomResizedCrop).

    Up to ten draws are made for each image, and the first that fits is taken; where none does, the largest central
    window whose ratio is allowed.

    Args:
        key: of the draws.
        batch: images.
        height: of the images.
        width: of the images.
        area: the least and the largest share; uniform between them.
        ratio: the largest ratio; its logarithm is uniform between -log(ratio) and log(ratio).
    """
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    pixels = height * width * jax.random.uniform(area_key, (ATTEMPTS, batch), minval=area[0], maxval=area[1])
    ratios = jnp.exp(jax.random.uniform(ratio_key, (ATTEMPTS, batch), minval=-math.log(ratio), maxval=math.log(ratio)))
    widths, heights = jnp.round(jnp.sqrt(pixels * ratios)), jnp.round(jnp.sqrt(pixels / ratios))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.argmax(0)[None]
    found = fits.any(0)
    central = (round(width / max(1.0, width / height / ratio)), round(height / max(1.0, height / width / ratio)))
    window_width = jnp.where(found, jnp.take_along_axis(widths, first, 0)[0], central[0])
    window_height = jnp.where(found, jnp.take_along_axis(heights, first, 0)[0], central[1])
    places = jax.random.uniform(place_key, (2, batch))
    free = jnp.stack([height - window_height, width - window_width])
    top, left = jnp.where(found, jnp.minimum(jnp.floor(places * (free + 1)), free), free // 2).astype(jnp.int32)
    sizes = window_height.astype(jnp.int32), window_width.astype(jnp.int32)
    return Windows(top, left, *sizes, jnp.zeros(batch, bool))


def rotate(degrees: Float[Array, " batch"], height: int, width: int) -> Maps:
    """Counter-clockwise about the centre."""
    angle = -jnp.deg2rad(degrees)
    return similarity(jnp.cos(angle), jnp.sin(angle), height, width)


def similarity(cosine: Float[Array, " batch"], sine: Float[Array, " batch"], height: int, width: int) -> Maps:
    """The map of matrix [[cosine, sine], [-sine, cosine]] that leaves the centre where it is."""
    x, y = width / 2, height / 2
    return _maps(cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)


def shear_x(factor: Float[Array, " batch"]) -> Maps:
    """Each row shifted by `factor` times its height below the upper edge."""
    return _maps(1, factor, 0, 0, 1, 0)


def shear_y(factor: Float[Array, " batch"]) -> Maps:
    """Each column shifted by `factor` times its distance from the left edge."""
    return _maps(1, 0, 0, factor, 1, 0)


def translate_x(pixels: Float[Array, " batch"]) -> Maps:
    """To the left."""
    return _maps(1, 0, pixels, 0, 1, 0)


def translate_y(pixels: Float[Array, " batch"]) -> Maps:
    """Upwards."""
    return _maps(1, 0, 0, 0, 1, pixels)


def _maps(*entries: Float[Array, " batch"] | int) -> Maps:
    rows = jnp.stack(jnp.broadcast_arrays(*(jnp.asarray(entry, jnp.float32) for entry in entries)), -1)
    return rows.reshape(-1, 2, 3)


def look_up(
    images: UInt8[Array, "batch source_height source_width channels"],
    windows: Windows,
    maps: list[Maps],
    moved: Bool[Array, " batch"],
    height: int,
    width: int,
) -> tuple[UInt8[Array, "batch {height} {width} channels"], Bool[Array, "batch {height} {width}"]]:
    """The images after their windows and then, in order, their maps; and where they come from inside.

    Bilinear between the four nearest pixels of the window, with weights of 12 bits in whole numbers, so that every
    device makes the same pixels. A pixel is outside where any of the maps reaches beyond the edges, as it would be
    were the maps applied one by one. Rounding is Pillow's: down for what an affine map `moved`, to the nearest for what
    is only resized.
    """
    x = jnp.broadcast_to(jnp.arange(width) + 0.5, (1, height, width))
    y = jnp.broadcast_to((jnp.arange(height) + 0.5)[:, None], (1, height, width))
    inside = jnp.ones((len(images), height, width), bool)
    for entries in reversed(maps):
        a, b, c, d, e, f = entries.reshape(-1, 6).T[:, :, None, None]
        x, y = a * x + b * y + c, d * x + e * y + f
        inside &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
    edge = lambda array: array[:, None, None]  # noqa: E731
    x = jnp.where(edge(windows.mirrored), width - x, x)
    columns, right = _neighbours(x * edge(windows.width / width), edge(windows.left), edge(windows.width))
    rows, below = _neighbours(y * edge(windows.height / height), edge(windows.top), edge(windows.height))
    corners = no_fuse(_gather)(images, rows, columns)
    half = jnp.where(edge(moved), 0, 1 << (2 * _BITS - 1)).astype(jnp.uint32)
    return no_fuse(functools.partial(_weigh, images.shape[-1]))(corners, right, below, half), inside


def _neighbours(place: jax.Array, first: jax.Array, size: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The two pixels of a window between whose centres each place lies, and the weight of the second."""
    # To a fraction of a pixel first: an error of float32 must not turn a whole shift into a blurred one.
    steps = jnp.round((place - 0.5) * (1 << _BITS)).astype(jnp.int32)
    before, weight = steps >> _BITS, (steps & ((1 << _BITS) - 1)).astype(jnp.uint32)
    return tuple(first + jnp.clip(before + k, 0, size - 1) for k in (0, 1)), weight


def _gather(images: jax.Array, rows: tuple[jax.Array, ...], columns: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The four pixels at `rows` x `columns`, the channels of each in one 32-bit number: one look-up for all of them."""
    batch, _, width, channels = images.shape
    packed = sum(images[..., k].astype(jnp.uint32) << (8 * k) for k in range(channels)).reshape(batch, -1)
    fetch = jax.vmap(lambda pixels, places: pixels.at[places].get(mode="clip"))
    return [fetch(packed, row * width + column) for row in rows for column in columns]


def _weigh(
    channels: int, corners: list[jax.Array], right: jax.Array, below: jax.Array, half: jax.Array
) -> UInt8[Array, "batch height width {channels}"]:
    """The pixels between four corners, unpacked again; `half` of the last place is added before rounding down."""
    one = jnp.uint32(1 << _BITS)

    def weigh(shift: int) -> jax.Array:
        first, second, third, fourth = ((corner >> shift) & 255 for corner in corners)
        upper = first * (one - right) + second * right
        lower = third * (one - right) + fourth * right
        return (upper * (one - below) + lower * below + half) >> (2 * _BITS)

    return jnp.stack([weigh(8 * k) for k in range(channels)], -1).astype(jnp.uint8)
