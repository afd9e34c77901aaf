"""Augmentation on the device: batched, and a pure function of (key, images, labels)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, UInt8

Targets = PyTree[Float[Array, "batch _"]]


@dataclasses.dataclass(frozen=True)
class Augment:
    """What training does to a batch of images; evaluation does `normalize` alone.

    Attributes:
        mean: of each channel, in [0, 1], over the training split.
        std: likewise.
        crop_padding: black pixels added a side before a crop of the old size is taken at random; 0 for none.
        flip: mirror half of the images left to right.
        rotation: largest angle of a random turn, degrees; 0 for none.
        scaling: largest share by which an image is enlarged or shrunk at random; 0 for none.
        mixup: alpha of mixup; 0 for none.
        dtype: of the result.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    rotation: float = 0.0
    scaling: float = 0.0
    mixup: float = 0.0
    dtype: Dtype = jnp.float32

    def __call__(
        self,
        key: PRNGKeyArray,
        images: UInt8[Array, "batch height width channels"],
        targets: Targets,
    ) -> tuple[Float[Array, "batch height width channels"], Targets]:
        """Crops, flips, normalises and mixes; targets are class probabilities [batch, classes], or a tree of such."""
        crop_key, flip_key, turn_key, mix_key = jax.random.split(key, 4)
        if self.crop_padding:
            images = pad_and_crop(crop_key, images, self.crop_padding)
        if self.flip:
            images = flip(flip_key, images)
        if self.rotation or self.scaling:
            images = turn_and_scale(turn_key, images, self.rotation, self.scaling)
        inputs = self.normalize(images)
        return mixup(mix_key, inputs, targets, self.mixup) if self.mixup else (inputs, targets)

    def normalize(
        self, images: UInt8[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """(x / 255 - mean) / std, a channel."""
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        # One product and one sum a pixel, in float32 before it is rounded to `dtype`.
        return (images.astype(jnp.float32) * (1 / (255 * std)) - mean / std).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class AsTheyAre:
    """In place of `Augment` where the inputs are stored features: nothing is done to them."""

    def __call__(
        self, key: PRNGKeyArray, inputs: Float[Array, "batch *example"], targets: Targets
    ) -> tuple[Float[Array, "batch *example"], Targets]:
        """Inputs and targets as they are."""
        return inputs, targets

    def normalize(self, inputs: Float[Array, "batch *example"]) -> Float[Array, "batch *example"]:
        """Inputs as they are."""
        return inputs


def pad_and_crop(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channels"], padding: int
) -> UInt8[Array, "batch height width channels"]:
    """Shifts each image by up to `padding` pixels either way on both axes; what comes in from outside is black."""
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def flip(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channels"]
) -> UInt8[Array, "batch height width channels"]:
    """Mirrors each image left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def turn_and_scale(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channels"], rotation: float, scaling: float
) -> UInt8[Array, "batch height width channels"]:
    """Turns each image about its centre by up to `rotation` degrees and scales it by up to 1 +- `scaling`.

    One bilinear look-up a pixel; what comes in from outside is black.
    """
    batch, height, width, _ = images.shape
    angle, factor = jax.random.uniform(key, (2, batch), minval=-1.0)
    angle, factor = jnp.deg2rad(rotation) * angle, 1 + scaling * factor
    rows, columns = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )

    def one(image: jax.Array, angle: jax.Array, factor: jax.Array) -> jax.Array:
        # Where each pixel of the result comes from: the inverse map.
        sine, cosine = jnp.sin(angle) / factor, jnp.cos(angle) / factor
        source = [cosine * rows - sine * columns + (height - 1) / 2, sine * rows + cosine * columns + (width - 1) / 2]
        look_up = lambda plane: jax.scipy.ndimage.map_coordinates(plane, source, order=1, mode="constant")  # noqa: E731
        return jax.vmap(look_up, in_axes=2, out_axes=2)(image.astype(jnp.float32))

    return jnp.round(jax.vmap(one)(images, angle, factor)).astype(jnp.uint8)


def mixup(
    key: PRNGKeyArray,
    inputs: Float[Array, "batch height width channels"],
    targets: Targets,
    alpha: float,
) -> tuple[Float[Array, "batch height width channels"], Targets]:
    """Blends each example with another of the batch, in a share drawn from Beta(alpha, alpha) (arXiv 1710.09412).

    The order of a batch is random already, so the example at the mirrored place will do as the other.
    """
    share = jax.random.beta(key, alpha, alpha, (inputs.shape[0],))
    pixels = share[:, None, None, None].astype(inputs.dtype)
    inputs = pixels * inputs + (1 - pixels) * inputs[::-1]
    blend = lambda kind: share[:, None] * kind + (1 - share[:, None]) * kind[::-1]  # noqa: E731
    return inputs, jax.tree.map(blend, targets)
