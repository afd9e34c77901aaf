"""Batched operations on pixel values, identical to Pillow's bit for bit: uint8 in, uint8 out.

An operation that depends only on the value of a pixel is a lookup table of 256 entries per image and channel, so a
batch in which each image has its own operation takes one lookup. Each image has its own argument. Statistics
(histogram, mean) are computed from the pixels where `inside` is true; fill pixels are not part of the image.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from vit_jax.data.no_fuse import no_fuse

Images = UInt8[Array, "batch height width channels"]
Inside = Bool[Array, "batch height width"]
Argument = Float[Array, " batch"]
Grey = Int[Array, "batch height width 1"]
Tables = Int[Array, "batch #channels 256"]
Histograms = Int[Array, "batch channels 256"]

_VALUES = np.arange(256, dtype=np.int32)


def look_up(images: Images, tables: Tables) -> Images:
    """Returns the images with each value replaced by its entry in the table of the image and channel."""
    batch, *_, channels = images.shape
    tables = jnp.broadcast_to(tables, (batch, channels, 256)).astype(jnp.uint8).reshape(batch, -1)
    indices = images.astype(jnp.int32) + 256 * jnp.arange(channels)
    return no_fuse(jax.vmap(lambda table, index: table.at[index].get(mode="clip")))(tables, indices)


# --- tables ---------------------------------------------------------------------------------------------------------


def identity(batch: int) -> Tables:
    """Returns tables that change nothing."""
    return jnp.broadcast_to(_VALUES, (batch, 1, 256))


def invert(batch: int) -> Tables:
    """Returns the tables of ImageOps.invert."""
    return jnp.broadcast_to(255 - _VALUES, (batch, 1, 256))


def posterize(bits: Argument) -> Tables:
    """Returns the tables of ImageOps.posterize: the highest `bits` bits, 0 to 8, are kept."""
    return _VALUES & (~0 << (8 - bits.astype(jnp.int32)))[:, None, None]


def solarize(threshold: Argument) -> Tables:
    """Returns the tables of ImageOps.solarize: values of at least `threshold` are inverted."""
    return jnp.where(threshold[:, None, None] > _VALUES, _VALUES, 255 - _VALUES)


def solarize_add(added: Argument) -> Tables:
    """Returns tables that add `added` to values below 128, up to 255 (timm)."""
    brighter = jnp.minimum(_VALUES + added.astype(jnp.int32)[:, None, None], 255)
    return jnp.where(_VALUES < 128, brighter, _VALUES)


def brightness(factor: Argument) -> Tables:
    """Returns the tables of ImageEnhance.Brightness: factor 0 is black, 1 the image."""
    return blend(jnp.zeros((), jnp.int32), _VALUES, factor[:, None, None])


def contrast(factor: Argument, mean: Int[Array, " batch"]) -> Tables:
    """Returns the tables of ImageEnhance.Contrast: factor 0 is the mean grey of the image, 1 the image."""
    return blend(mean[:, None, None], _VALUES, factor[:, None, None])


def auto_contrast(histograms: Histograms) -> Tables:
    """Returns the tables of ImageOps.autocontrast: each channel's minimum becomes 0 and its maximum 255."""
    present = histograms > 0
    low = present.argmax(-1).astype(jnp.int32)[..., None]
    high = 255 - present[..., ::-1].argmax(-1).astype(jnp.int32)[..., None]
    exact = (_VALUES - low) * 255 // jnp.maximum(high - low, 1)
    # Pillow computes in float64 and rounds down, which for some exact quotients gives one less; a table says for which.
    octets = jnp.asarray(_one_less())[low[..., 0], high[..., 0]]
    less = (octets[..., _VALUES // 8] >> (7 - _VALUES % 8).astype(np.uint8)) & 1
    return jnp.where(high > low, jnp.clip(exact - less, 0, 255), _VALUES)


@functools.cache
def _one_less() -> UInt8[np.ndarray, "256 256 32"]:
    """Returns a bit per (low, high, value): whether Pillow's float64 result is one less than the exact quotient."""
    bits = np.zeros((256, 256, 32), np.uint8)
    for low in range(255):
        high = np.arange(low + 1, 256)[:, None]
        scale = 255.0 / (high - low)
        rounded = (_VALUES * scale + -low * scale).astype(np.int64)
        exact = (_VALUES - low) * 255 // (high - low)
        within = (low <= _VALUES) & (high >= _VALUES)
        bits[low, low + 1 :] = np.packbits(within & (rounded < exact), axis=-1)
    return bits


def equalize(histograms: Histograms) -> Tables:
    """Returns the tables of ImageOps.equalize: the values of each channel become about equally frequent."""
    last = 255 - (histograms > 0)[..., ::-1].argmax(-1)
    top = jnp.take_along_axis(histograms, last[..., None], -1)
    step = (histograms.sum(-1, keepdims=True) - top) // 255
    before = jnp.cumsum(histograms, -1) - histograms
    spread = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, spread, _VALUES)


# --- statistics -----------------------------------------------------------------------------------------------------


def histogram(images: Images, inside: Inside) -> Histograms:
    """Returns the number of pixels inside with each value, per channel."""
    channels = images.shape[-1]

    def count(image: jax.Array, weights: jax.Array) -> jax.Array:
        indices = image.astype(jnp.int32) + 256 * jnp.arange(channels)
        weights = jnp.broadcast_to(weights[..., None], image.shape).astype(jnp.int32)
        return jnp.zeros(256 * channels, jnp.int32).at[indices].add(weights, mode="promise_in_bounds")

    return no_fuse(jax.vmap(count))(images, inside).reshape(-1, channels, 256)


def grey(images: Images) -> Grey:
    """Returns Pillow's conversion to mode 'L' (ITU-R 601-2), in integers; images of one channel are unchanged."""
    if images.shape[-1] == 1:
        return images.astype(jnp.int32)
    red, green, blue = (images[..., k : k + 1].astype(jnp.int32) for k in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def mean_grey(images: Images, inside: Inside) -> Int[Array, " batch"]:
    """Returns the mean of `grey` over the pixels inside, rounded to the nearest integer, halves up."""
    count = jnp.maximum(inside.sum((1, 2)), 1)
    total = jnp.where(inside[..., None], grey(images), 0).sum((1, 2, 3))
    return (2 * total + count) // (2 * count)


# --- operations that are not tables ---------------------------------------------------------------------------------


def blend(
    degenerate: Int[Array, "..."] | np.ndarray, values: Int[Array, "..."] | np.ndarray, factor: Float[Array, "..."]
) -> Int[Array, "..."]:
    """Returns Image.blend: degenerate + factor * (values - degenerate) in float32, clipped to 0..255, rounded down."""
    difference = values - degenerate
    # No factor is negative, so the maximum changes no value: it keeps the compiler from contracting the multiplication
    # and the addition into one operation that rounds once, where Pillow rounds twice.
    part = jnp.maximum(factor * jnp.abs(difference).astype(jnp.float32), 0.0)
    start = jnp.asarray(degenerate, jnp.float32)
    return jnp.clip(jnp.where(difference < 0, start - part, start + part), 0, 255).astype(jnp.int32)


def smooth(images: Images) -> Int[Array, "batch height width channels"]:
    """Returns ImageFilter.SMOOTH: a 3x3 kernel, weight 5 at the centre and 1 elsewhere; edge pixels are unchanged."""
    values = images.astype(jnp.int32)
    if min(images.shape[1:3]) < 3:
        return values
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values[:, 1:-1, 1:-1]
    return values.at[:, 1:-1, 1:-1].set((2 * total + 13) // 26)


def blur(images: Images, radius: Argument) -> Images:
    """Returns ImageFilter.GaussianBlur: three box blurs along each axis.

    The boxes are those of Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering"
    (2011), with Pillow's 24-bit weights; edge pixels are repeated beyond the edge.

    Args:
        images: batch of images.
        radius: standard deviation, at most 2 pixels.
    """
    variance = radius**2 / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = (2**24 / (2 * (whole + part) + 1)).astype(jnp.uint32)
    outer = (2**24 - (2 * whole + 1).astype(jnp.uint32) * inner) // 2
    one = whole >= 1
    weights = [w[:, None, None, None] for w in (inner, jnp.where(one, inner, outer), jnp.where(one, outer, 0))]

    def box(values: jax.Array, axis: int) -> jax.Array:
        padded = jnp.pad(values, [(0, 0) if k != axis else (2, 2) for k in range(4)], mode="edge")
        taps = [jax.lax.slice_in_dim(padded, k, k + values.shape[axis], axis=axis) for k in range(5)]
        total = weights[0] * taps[2] + weights[1] * (taps[1] + taps[3]) + weights[2] * (taps[0] + taps[4])
        return (total + (1 << 23)) >> 24

    values = images.astype(jnp.uint32)
    for axis in (2, 2, 2, 1, 1, 1):
        values = box(values, axis)
    return values.astype(jnp.uint8)


def shift_hue(images: Images, shift: Argument) -> Images:
    """Returns images with the hue shifted by -0.5 to 0.5 of the circle, in 8-bit HSV (torchvision's adjust_hue)."""
    if images.shape[-1] == 1:
        return images
    hue, saturation, value = _to_hsv(images.astype(jnp.int32))
    # Like torchvision's cast to 8 bits: rounded towards zero, and modulo 256.
    steps = jnp.trunc(shift * 255).astype(jnp.int32)[:, None, None]
    return _from_hsv((hue + steps) & 255, saturation, value).astype(jnp.uint8)


def _to_hsv(colors: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    maximum, minimum = colors.max(-1), colors.min(-1)
    range_ = maximum - minimum
    largest = jnp.where(colors[..., 0] == maximum, 0, jnp.where(colors[..., 1] == maximum, 1, 2))
    # Distances of the two other channels from the largest: one of them is the range, the other determines the hue.
    second, third = (maximum - jnp.take_along_axis(colors, ((largest + k) % 3)[..., None], -1)[..., 0] for k in (1, 2))
    is_third = (third != range_).astype(jnp.int32)
    hue = jnp.asarray(_hues())[largest, is_third, jnp.where(is_third, third, second), range_].astype(jnp.int32)
    return hue, range_ * 255 // jnp.maximum(maximum, 1), maximum


@functools.cache
def _hues() -> UInt8[np.ndarray, "3 2 256 256"]:
    """Returns Pillow's hue by largest channel, which other channel is not the smallest, its distance, and the range.

    A table, because Pillow's intermediate float32 rounding makes the hue of some colors one less.
    """
    distance, range_ = _VALUES[:, None].astype(np.float32), np.maximum(_VALUES, 1).astype(np.float32)[None]
    share = distance / range_
    hues = np.zeros((3, 2, 256, 256), np.uint8)
    for largest in range(3):
        for is_third in (0, 1):
            second, third = (np.float32(1), share) if is_third else (share, np.float32(1))
            sixths = (2.0 * largest + np.float64(third) - np.float64(second)).astype(np.float32)
            fraction = np.fmod(np.float64(sixths) / 6 + 1, 1).astype(np.float32)
            hues[largest, is_third] = np.where(distance <= range_, np.float64(fraction) * 255, 0)
    hues[..., 0] = 0
    return hues


def _from_hsv(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> jax.Array:
    sector, rest = hue * 6 // 255, hue * 6 % 255

    def scaled(parts: jax.Array) -> jax.Array:
        return (2 * value * (255 * 255 - saturation * parts) + 255 * 255) // (2 * 255 * 255)

    low, falling, rising = scaled(jnp.full_like(rest, 255)), scaled(rest), scaled(255 - rest)
    table = [
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    ]
    sector = sector % 6
    channels = [jnp.select([sector == k for k in range(6)], [row[c] for row in table]) for c in range(3)]
    return jnp.where((saturation == 0)[..., None], value[..., None], jnp.stack(channels, -1))
