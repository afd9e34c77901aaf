"""Examples mixed with one another, and parts of them erased: on normalised images, in front of the model."""

import functools
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, UInt32

from vit_jax.data.no_fuse import no_fuse

Inputs = Float[Array, "batch height width channels"]
Targets = PyTree[Float[Array, "batch _"]]


def mixup(key: PRNGKeyArray, inputs: Inputs, targets: Targets, alpha: float) -> tuple[Inputs, Targets]:
    """Blends each example with another of the batch, in a share drawn from Beta(alpha, alpha) (arXiv 1710.09412).

    The order of a batch is random already, so the example at the mirrored place will do as the other.
    """
    share = jax.random.beta(key, alpha, alpha, (inputs.shape[0],))
    return _blend(inputs, share[:, None, None, None].astype(inputs.dtype)), _blend_all(targets, share)


def mix(
    key: PRNGKeyArray,
    inputs: Inputs,
    targets: Targets,
    *,
    mixup: float,
    cutmix: float,
    probability: float,
    switch: float,
    alike: bool,
) -> tuple[Inputs, Targets]:
    """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) with the example at the mirrored place of the batch.

    Args:
        key: of the draws.
        inputs: normalised images.
        targets: class probabilities, one array or a tree of them.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        probability: with which an example, or a batch, is mixed at all.
        switch: the share of cutmix where both are on.
        alike: one draw for the whole batch, rather than one an example.
    """
    draw = functools.partial(_draw_mix, inputs.shape[:3], mixup, cutmix, probability, switch, alike)
    weights, share = no_fuse(draw)(key)
    return no_fuse(_blend)(inputs, weights.astype(inputs.dtype)), _blend_all(targets, share)


def _draw_mix(
    shape: tuple[int, ...],
    mixup: float,
    cutmix: float,
    probability: float,
    switch: float,
    alike: bool,
    key: PRNGKeyArray,
) -> tuple[Float[Array, "_ height width 1"], Float[Array, " batch"]]:
    """The weight of each pixel of the image itself, and of its targets."""
    batch, height, width = shape
    draws = 1 if alike else batch
    done_key, switch_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 5)
    cuts = jax.random.uniform(switch_key, (draws,)) < (switch if mixup and cutmix else float(cutmix > 0))
    blended = jax.random.beta(mixup_key, mixup, mixup, (draws,)) if mixup else jnp.ones(draws)
    kept = jax.random.beta(cutmix_key, cutmix, cutmix, (draws,)) if cutmix else jnp.ones(draws)
    done = jax.random.uniform(done_key, (draws,)) < probability
    box = _box(place_key, kept, height, width)
    share = jnp.where(cuts, 1 - box.mean((1, 2)), blended)
    share = jnp.broadcast_to(jnp.where(done, share, 1.0), (batch,))
    # One weight a pixel, 0 or 1 in a cut, so that both are one blend.
    weights = jnp.where(cuts[:, None, None], 1.0 - box, blended[:, None, None])
    return jnp.where(done[:, None, None], weights, 1.0)[..., None], share


def _box(
    key: PRNGKeyArray, kept: Float[Array, " draws"], height: int, width: int
) -> Bool[Array, "draws {height} {width}"]:
    """A rectangle of the image's shape around a point of it, of an area of 1 - kept before it is cut at the edges."""
    places = jax.random.uniform(key, (2, *kept.shape))
    side = jnp.sqrt(1 - kept)

    def cover(place: jax.Array, size: int) -> jax.Array:
        half = jnp.floor(size * side).astype(jnp.int32) // 2
        centre = jnp.floor(place * size).astype(jnp.int32)
        pixels = jnp.arange(size)
        return (pixels >= (centre - half)[:, None]) & (pixels < (centre + half)[:, None])

    return cover(places[0], height)[:, :, None] & cover(places[1], width)[:, None, :]


def _blend(values: jax.Array, weights: jax.Array) -> jax.Array:
    return weights * values + (1 - weights) * values[::-1]


def _blend_all(targets: Any, share: jax.Array) -> Any:
    return jax.tree.map(lambda target: _blend(target, share[:, None]), targets)


def erase(
    key: PRNGKeyArray,
    inputs: Inputs,
    *,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: float = 10 / 3,
    noise: bool = False,
) -> Inputs:
    """Replaces a rectangle of an image by 0, the mean, or by normal noise in each pixel (arXiv 1708.04896; as in timm).

    Up to ten rectangles are drawn for each image, and the first that fits is taken.

    Args:
        key: of the draws.
        inputs: normalised images.
        probability: with which an image loses a rectangle.
        area: the least and the largest share of the image; uniform between them.
        ratio: the largest ratio of height to width; its logarithm is uniform between -log(ratio) and log(ratio).
        noise: fill with noise of mean 0 and standard deviation 1.
    """
    draw = functools.partial(_draw_rectangles, inputs.shape[:3], probability, area, ratio)
    draw_key, noise_key = jax.random.split(key)
    rectangle = no_fuse(draw)(draw_key)[..., None]
    if not noise:
        return jnp.where(rectangle, jnp.zeros((), inputs.dtype), inputs)
    return jnp.where(rectangle, no_fuse(lambda key: _normal(key, inputs.shape, inputs.dtype))(noise_key), inputs)


def _draw_rectangles(
    shape: tuple[int, ...], probability: float, area: tuple[float, float], ratio: float, key: PRNGKeyArray
) -> Bool[Array, "batch height width"]:
    batch, height, width = shape
    done_key, area_key, ratio_key, place_key = jax.random.split(key, 4)
    pixels = height * width * jax.random.uniform(area_key, (10, batch), minval=area[0], maxval=area[1])
    ratios = jnp.exp(jax.random.uniform(ratio_key, (10, batch), minval=-math.log(ratio), maxval=math.log(ratio)))
    heights, widths = jnp.round(jnp.sqrt(pixels * ratios)), jnp.round(jnp.sqrt(pixels / ratios))
    fits = (heights < height) & (widths < width)
    first = fits.argmax(0)[None]
    places = jax.random.uniform(place_key, (2, batch))

    def cover(sizes: jax.Array, place: jax.Array, size: int) -> jax.Array:
        side = jnp.take_along_axis(sizes, first, 0)[0]
        start = jnp.minimum(jnp.floor(place * (size - side + 1)), size - side)
        pixels = jnp.arange(size)
        return (pixels >= start[:, None]) & (pixels < (start + side)[:, None])

    done = (jax.random.uniform(done_key, (batch,)) < probability) & fits.any(0)
    rectangle = cover(heights, places[0], height)[:, :, None] & cover(widths, places[1], width)[:, None, :]
    return rectangle & done[:, None, None]


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Dtype) -> Inputs:
    """Normal noise of 16 bits a value, from a hash of the value's place and the key.

    Threefry would take as long for it as all else that is done to a batch, and what is erased needs no better numbers.
    The hash is lowbias32 (https://nullprogram.com/blog/2018/07/31/), twice.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    places = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    bits = _scramble(_scramble(places + first) ^ second) >> 16
    return jnp.asarray(_quantiles(), dtype).at[bits.astype(jnp.int32)].get(mode="promise_in_bounds")


def _scramble(bits: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


@functools.cache
def _quantiles() -> Float[np.ndarray, " 65536"]:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((k + 0.5) / 2**16) for k in range(2**16)], np.float32)
