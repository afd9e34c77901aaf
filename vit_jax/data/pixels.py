"""Operations on pixel values, batched and bit for bit Pillow's: 8-bit numbers in, 8-bit numbers out.

What depends on a pixel's own value alone is a table of 256 entries an image and channel; a batch in which each image
has an operation of its own is then one look-up, whatever the operations are. Each image has its own argument.
Statistics (histogram, mean) are over the pixels where `inside` is true: what was filled in is no part of the picture.
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
    """Each value replaced by what its image's and channel's table has for it."""
    batch, *_, channels = images.shape
    tables = jnp.broadcast_to(tables, (batch, channels, 256)).astype(jnp.uint8).reshape(batch, -1)
    places = images.astype(jnp.int32) + 256 * jnp.arange(channels)
    return no_fuse(jax.vmap(lambda table, place: table.at[place].get(mode="clip")))(tables, places)


# --- tables ---------------------------------------------------------------------------------------------------------


def identity(batch: int) -> Tables:
    """Every value as it is."""
    return jnp.broadcast_to(_VALUES, (batch, 1, 256))


def invert(batch: int) -> Tables:
    """ImageOps.invert."""
    return jnp.broadcast_to(255 - _VALUES, (batch, 1, 256))


def posterize(bits: Argument) -> Tables:
    """ImageOps.posterize: the highest `bits` bits, 0 to 8, are kept."""
    return _VALUES & (~0 << (8 - bits.astype(jnp.int32)))[:, None, None]


def solarize(threshold: Argument) -> Tables:
    """ImageOps.solarize: values from `threshold` on are inverted."""
    return jnp.where(threshold[:, None, None] > _VALUES, _VALUES, 255 - _VALUES)


def solarize_add(added: Argument) -> Tables:
    """Values below 128 made brighter by `added`, up to 255 (timm)."""
    brighter = jnp.minimum(_VALUES + added.astype(jnp.int32)[:, None, None], 255)
    return jnp.where(_VALUES < 128, brighter, _VALUES)


def brightness(factor: Argument) -> Tables:
    """ImageEnhance.Brightness: 0 is black, 1 the image."""
    return blend(jnp.zeros((), jnp.int32), _VALUES, factor[:, None, None])


def contrast(factor: Argument, mean: Int[Array, " batch"]) -> Tables:
    """ImageEnhance.Contrast: 0 is the mean grey of the image, 1 the image."""
    return blend(mean[:, None, None], _VALUES, factor[:, None, None])


def auto_contrast(histograms: Histograms) -> Tables:
    """ImageOps.autocontrast: each channel's least value becomes 0 and its largest 255."""
    present = histograms > 0
    low = present.argmax(-1).astype(jnp.int32)[..., None]
    high = 255 - present[..., ::-1].argmax(-1).astype(jnp.int32)[..., None]
    exact = (_VALUES - low) * 255 // jnp.maximum(high - low, 1)
    # Pillow computes in floating point and rounds down, which is one less where the quotient is whole, for some of the
    # values: which ones is looked up.
    octets = jnp.asarray(_one_less())[low[..., 0], high[..., 0]]
    less = (octets[..., _VALUES // 8] >> (7 - _VALUES % 8).astype(np.uint8)) & 1
    return jnp.where(high > low, jnp.clip(exact - less, 0, 255), _VALUES)


@functools.cache
def _one_less() -> UInt8[np.ndarray, "256 256 32"]:
    """A bit for each (low, high, value): whether Pillow's float64 result lies one below the exact quotient."""
    bits = np.zeros((256, 256, 32), np.uint8)
    for low in range(255):
        high = np.arange(low + 1, 256)[:, None]
        scale = 255.0 / (high - low)
        made = (_VALUES * scale + -low * scale).astype(np.int64)
        exact = (_VALUES - low) * 255 // (high - low)
        within = (low <= _VALUES) & (high >= _VALUES)
        bits[low, low + 1 :] = np.packbits(within & (made < exact), axis=-1)
    return bits


def equalize(histograms: Histograms) -> Tables:
    """ImageOps.equalize: each channel's values spread so that all are about equally frequent."""
    last = 255 - (histograms > 0)[..., ::-1].argmax(-1)
    top = jnp.take_along_axis(histograms, last[..., None], -1)
    step = (histograms.sum(-1, keepdims=True) - top) // 255
    before = jnp.cumsum(histograms, -1) - histograms
    spread = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, spread, _VALUES)


# --- statistics -----------------------------------------------------------------------------------------------------


def histogram(images: Images, inside: Inside) -> Histograms:
    """How often each value occurs in each channel."""
    channels = images.shape[-1]

    def count(image: jax.Array, weights: jax.Array) -> jax.Array:
        places = image.astype(jnp.int32) + 256 * jnp.arange(channels)
        weights = jnp.broadcast_to(weights[..., None], image.shape).astype(jnp.int32)
        return jnp.zeros(256 * channels, jnp.int32).at[places].add(weights, mode="promise_in_bounds")

    return no_fuse(jax.vmap(count))(images, inside).reshape(-1, channels, 256)


def grey(images: Images) -> Grey:
    """Pillow's conversion to 'L' (ITU-R 601-2), in whole numbers; one channel stays as it is."""
    if images.shape[-1] == 1:
        return images.astype(jnp.int32)
    red, green, blue = (images[..., k : k + 1].astype(jnp.int32) for k in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def mean_grey(images: Images, inside: Inside) -> Int[Array, " batch"]:
    """The mean of `grey`, to the nearest whole number, halves up."""
    count = jnp.maximum(inside.sum((1, 2)), 1)
    total = jnp.where(inside[..., None], grey(images), 0).sum((1, 2, 3))
    return (2 * total + count) // (2 * count)


# --- operations that are no tables ----------------------------------------------------------------------------------


def blend(
    degenerate: Int[Array, "..."] | np.ndarray, values: Int[Array, "..."] | np.ndarray, factor: Float[Array, "..."]
) -> Int[Array, "..."]:
    """Image.blend: degenerate + factor * (values - degenerate), in float32, cut to 0 .. 255 and rounded down."""
    difference = values - degenerate
    # The maximum changes no value, as no factor is negative: it keeps the compiler from fusing the product and the sum
    # into one operation with one rounding, where Pillow rounds twice.
    part = jnp.maximum(factor * jnp.abs(difference).astype(jnp.float32), 0.0)
    start = jnp.asarray(degenerate, jnp.float32)
    return jnp.clip(jnp.where(difference < 0, start - part, start + part), 0, 255).astype(jnp.int32)


def smooth(images: Images) -> Int[Array, "batch height width channels"]:
    """ImageFilter.SMOOTH: 3x3, the centre weighs 5 and each neighbour 1; pixels at the edge stay as they are."""
    values = images.astype(jnp.int32)
    if min(images.shape[1:3]) < 3:
        return values
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values[:, 1:-1, 1:-1]
    return values.at[:, 1:-1, 1:-1].set((2 * total + 13) // 26)


def blur(images: Images, radius: Argument) -> Images:
    """ImageFilter.GaussianBlur: three box blurs along each axis, `radius` (the standard deviation) of up to 2 pixels.

    The boxes are those of Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering"
    (2011), with Pillow's weights of 24 bits; the pixels at the edge are repeated beyond it.
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


def turn_hue(images: Images, turn: Argument) -> Images:
    """The hue turned by `turn`, -0.5 to 0.5 of the circle, in Pillow's 8-bit HSV (torchvision's adjust_hue)."""
    if images.shape[-1] == 1:
        return images
    hue, saturation, value = _to_hsv(images.astype(jnp.int32))
    # As a cast to 8 bits of the product has it: towards zero, and around the circle.
    steps = jnp.trunc(turn * 255).astype(jnp.int32)[:, None, None]
    return _from_hsv((hue + steps) & 255, saturation, value).astype(jnp.uint8)


def _to_hsv(colours: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    most, least = colours.max(-1), colours.min(-1)
    range_ = most - least
    largest = jnp.where(colours[..., 0] == most, 0, jnp.where(colours[..., 1] == most, 1, 2))
    # The two behind the largest, in turn: one is the least, and the hue follows from how far down the other is.
    second, third = (most - jnp.take_along_axis(colours, ((largest + k) % 3)[..., None], -1)[..., 0] for k in (1, 2))
    is_third = (third != range_).astype(jnp.int32)
    hue = jnp.asarray(_hues())[largest, is_third, jnp.where(is_third, third, second), range_].astype(jnp.int32)
    return hue, range_ * 255 // jnp.maximum(most, 1), most


@functools.cache
def _hues() -> UInt8[np.ndarray, "3 2 256 256"]:
    """Pillow's hue, for the largest channel, which of the two behind it is not the least, its distance, the range.

    A table, as Pillow rounds to float32 on its way, by which the hue of some colours is one less.
    """
    distance, range_ = _VALUES[:, None].astype(np.float32), np.maximum(_VALUES, 1).astype(np.float32)[None]
    share = distance / range_
    hues = np.zeros((3, 2, 256, 256), np.uint8)
    for largest in range(3):
        for is_third in (0, 1):
            second, third = (np.float32(1), share) if is_third else (share, np.float32(1))
            sixths = (2.0 * largest + np.float64(third) - np.float64(second)).astype(np.float32)
            turned = np.fmod(np.float64(sixths) / 6 + 1, 1).astype(np.float32)
            hues[largest, is_third] = np.where(distance <= range_, np.float64(turned) * 255, 0)
    hues[..., 0] = 0
    return hues


def _from_hsv(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> jax.Array:
    sector, rest = hue * 6 // 255, hue * 6 % 255
    share = lambda parts: (2 * value * (255 * 255 - saturation * parts) + 255 * 255) // (2 * 255 * 255)  # noqa: E731
    low, falling, rising = share(jnp.full_like(rest, 255)), share(rest), share(255 - rest)
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
