"""Mixing of examples, and random erasing: applied to normalized images, before the model."""

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
    """Returns blends of each example with another one, with weights from Beta(alpha, alpha) (arXiv 1710.09412).

    Batches are in random order already, so the other example is the one at the mirrored index of the batch.
    """
    weight = jax.random.beta(key, alpha, alpha, (inputs.shape[0],))
    return _blend(inputs, weight[:, None, None, None].astype(inputs.dtype)), _blend_targets(targets, weight)


def mix(
    key: PRNGKeyArray,
    inputs: Inputs,
    targets: Targets,
    *,
    mixup: float,
    cutmix: float,
    probability: float,
    switch: float,
    per_batch: bool,
) -> tuple[Inputs, Targets]:
    """Returns the examples after mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899).

    Each example is mixed with the one at the mirrored index of the batch.

    Args:
        key: random key.
        inputs: normalized images.
        targets: class probabilities, one array or a tree of arrays.
        mixup: alpha of mixup; 0 disables it.
        cutmix: alpha of cutmix; 0 disables it.
        probability: probability that an example, or a batch, is mixed.
        switch: probability of cutmix when both are enabled.
        per_batch: sample once for the whole batch instead of once per example.
    """
    draw = functools.partial(_draw_weights, inputs.shape[:3], mixup, cutmix, probability, switch, per_batch)
    weights, target_weights = no_fuse(draw)(key)
    return no_fuse(_blend)(inputs, weights.astype(inputs.dtype)), _blend_targets(targets, target_weights)


def _draw_weights(
    shape: tuple[int, ...],
    mixup: float,
    cutmix: float,
    probability: float,
    switch: float,
    per_batch: bool,
    key: PRNGKeyArray,
) -> tuple[Float[Array, "_ height width 1"], Float[Array, " batch"]]:
    """Draws the weight of each pixel of the example itself, and the weight of its targets."""
    batch, height, width = shape
    draws = 1 if per_batch else batch
    mixed_key, switch_key, mixup_key, cutmix_key, position_key = jax.random.split(key, 5)
    cuts = jax.random.uniform(switch_key, (draws,)) < (switch if mixup and cutmix else float(cutmix > 0))
    blended = jax.random.beta(mixup_key, mixup, mixup, (draws,)) if mixup else jnp.ones(draws)
    kept = jax.random.beta(cutmix_key, cutmix, cutmix, (draws,)) if cutmix else jnp.ones(draws)
    mixed = jax.random.uniform(mixed_key, (draws,)) < probability
    box = _box(position_key, kept, height, width)
    target_weights = jnp.where(cuts, 1 - box.mean((1, 2)), blended)
    target_weights = jnp.broadcast_to(jnp.where(mixed, target_weights, 1.0), (batch,))
    # One weight per pixel, 0 or 1 for cutmix, so that both methods are the same blend.
    weights = jnp.where(cuts[:, None, None], 1.0 - box, blended[:, None, None])
    return jnp.where(mixed[:, None, None], weights, 1.0)[..., None], target_weights


def _box(
    key: PRNGKeyArray, kept: Float[Array, " draws"], height: int, width: int
) -> Bool[Array, "draws {height} {width}"]:
    """Draws rectangles with the image's aspect ratio and the area 1 - kept, and clips them at the edges."""
    positions = jax.random.uniform(key, (2, *kept.shape))
    side = jnp.sqrt(1 - kept)

    def interval(position: jax.Array, size: int) -> jax.Array:
        half = jnp.floor(size * side).astype(jnp.int32) // 2
        centre = jnp.floor(position * size).astype(jnp.int32)
        pixels = jnp.arange(size)
        return (pixels >= (centre - half)[:, None]) & (pixels < (centre + half)[:, None])

    return interval(positions[0], height)[:, :, None] & interval(positions[1], width)[:, None, :]


def _blend(values: jax.Array, weights: jax.Array) -> jax.Array:
    return weights * values + (1 - weights) * values[::-1]


def _blend_targets(targets: Any, weights: jax.Array) -> Any:
    return jax.tree.map(lambda target: _blend(target, weights[:, None]), targets)


def erase(
    key: PRNGKeyArray,
    inputs: Inputs,
    *,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: float = 10 / 3,
    noise: bool = False,
) -> Inputs:
    """Returns the images with a random rectangle replaced by 0, the mean, or by noise (arXiv 1708.04896; as in timm).

    Ten rectangles are drawn per image and the first that fits is used.

    Args:
        key: random key.
        inputs: normalized images.
        probability: probability that an image is erased.
        area: minimum and maximum area as a fraction of the image; sampled uniformly.
        ratio: maximum ratio of height to width; its logarithm is sampled uniformly from -log(ratio) to log(ratio).
        noise: fill with noise of mean 0 and standard deviation 1 per pixel.
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
    erased_key, area_key, ratio_key, position_key = jax.random.split(key, 4)
    pixels = height * width * jax.random.uniform(area_key, (10, batch), minval=area[0], maxval=area[1])
    ratios = jnp.exp(jax.random.uniform(ratio_key, (10, batch), minval=-math.log(ratio), maxval=math.log(ratio)))
    heights, widths = jnp.round(jnp.sqrt(pixels * ratios)), jnp.round(jnp.sqrt(pixels / ratios))
    fits = (heights < height) & (widths < width)
    first = fits.argmax(0)[None]
    positions = jax.random.uniform(position_key, (2, batch))

    def interval(sizes: jax.Array, position: jax.Array, size: int) -> jax.Array:
        side = jnp.take_along_axis(sizes, first, 0)[0]
        start = jnp.minimum(jnp.floor(position * (size - side + 1)), size - side)
        pixels = jnp.arange(size)
        return (pixels >= start[:, None]) & (pixels < (start + side)[:, None])

    erased = (jax.random.uniform(erased_key, (batch,)) < probability) & fits.any(0)
    rectangle = interval(heights, positions[0], height)[:, :, None] & interval(widths, positions[1], width)[:, None, :]
    return rectangle & erased[:, None, None]


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Dtype) -> Inputs:
    """Returns normal noise with 16 random bits per value, from a hash of the value's index and the key.

    Threefry would take as long as the rest of the augmentation, and noise that replaces pixels needs no better random
    numbers. The hash is lowbias32 (https://nullprogram.com/blog/2018/07/31/), applied twice.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    indices = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    bits = _hash(_hash(indices + first) ^ second) >> 16
    return jnp.asarray(_quantiles(), dtype).at[bits.astype(jnp.int32)].get(mode="promise_in_bounds")


def _hash(bits: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


@functools.cache
def _quantiles() -> Float[np.ndarray, " 65536"]:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((k + 0.5) / 2**16) for k in range(2**16)], np.float32)
