"""Augmentation on the device: batched, and a pure function of (key, images, targets).

To add an augmentation:

* an operation on pixel values: a function in `pixels.py` and an entry in `operations.py`;
* a geometric operation: a function in `geometry.py` that returns affine maps, and an entry in `operations.GEOMETRIC`;
* a policy that draws operations: a function and an entry of `POLICIES` in `policies.py`;
* a mixing method: a function in `mixing.py`, called in `Augment._mix`;
* an option of any of them: a field of `Augment`, and an option of the same name and default in the config section
  `augment`.

A new stage that draws random numbers appends a member to `_Stream`, so that existing streams stay the same.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

from vit_jax.data import geometry, mixing, normalization, operations
from vit_jax.data.mixing import mixup
from vit_jax.data.no_fuse import no_fuse
from vit_jax.data.operations import CODES, Chain
from vit_jax.data.policies import POLICIES, Settings
from vit_jax.errors import UserError

Images = UInt8[Array, "batch height width channels"]
Inputs = Float[Array, "batch height width channels"]
Targets = PyTree[Float[Array, "batch _"]]


class _Stream(enum.IntEnum):
    """The numbers that stages fold into the key of a step. Append only: a changed number changes every trained run.

    Crop, flip, rotation and mixing use the four keys that the key of the step is split into instead.
    """

    POLICY = 0
    RESIZED_CROP = 1
    JITTER = 2
    ERASING = 3


@dataclasses.dataclass(frozen=True)
class Augment:
    """Augmentation of training batches; evaluation uses only `normalize` or `views`.

    The stages are, in order: crop, flip, rotation, the policy's operations, color jitter, normalization, erasing,
    mixing. All geometric operations of an image are composed into one interpolation (`geometry.look_up`), which comes
    before the operations on pixel values; those leave alone the pixels that the interpolation filled in.

    Attributes:
        mean: per channel, of pixels scaled to [0, 1].
        std: likewise; replaced by its `normalization.divisors`.
        crop_padding: pixels of padding per side before a random crop to the original size; 0 disables it.
        crop_border: content of the padding: 'black', or 'reflect' for the mirrored image.
        resized_crop: crop a window of random area and aspect ratio, and resize it to the original size.
        min_crop_area, max_crop_area: range of the window's area, as a fraction of the image.
        crop_ratio: maximum aspect ratio of the window; the minimum is its inverse.
        flip: mirror images left to right with probability 1/2.
        rotation: maximum angle of a random rotation, degrees; 0 disables it.
        scaling: images are scaled by a random factor of 1 - scaling to 1 + scaling; 0 disables it.
        policy: one of `POLICIES`, or 'none'.
        policy_operations, policy_magnitude, policy_std, policy_probability: see `policies.Settings`.
        fill: value of pixels outside the image after interpolation: 'mean', 'black' or 'grey'.
        brightness, contrast, saturation: color jitter by factors of 1 - x to 1 + x, in random order; 0 disables each.
        hue: color jitter by a random rotation of the hue of up to this fraction of the circle, at most 0.5.
        erasing: probability that a rectangle of an image is erased.
        erasing_mode: content of the rectangle: 'constant' for the mean, 'noise' for normal noise.
        min_erasing_area, max_erasing_area: range of the rectangle's area, as a fraction of the image.
        erasing_ratio: maximum aspect ratio of the rectangle; the minimum is its inverse.
        mixup: alpha of mixup; 0 disables it.
        cutmix: alpha of cutmix; 0 disables it.
        mix_probability: probability that an example, or a batch, is mixed.
        mix_switch: probability of cutmix when both mixup and cutmix are enabled.
        mix_per: sample mixing weights per 'example' or per 'batch'.
        repeats: repeated augmentation: copies of each example in a batch, each augmented independently. Read by the
            training loop, which draws the indices of the batch (`pipeline.train_indices`).
        test_flip: evaluation averages over the image and its mirror image.
        test_shift: evaluation averages over the image and the image shifted by so many pixels in four directions.
        arrange: applied to the inputs last, such as cutting them into patches; None for nothing.
        dtype: dtype of the result.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    crop_border: str = "black"
    resized_crop: bool = False
    min_crop_area: float = 0.08
    max_crop_area: float = 1.0
    crop_ratio: float = 4 / 3
    flip: bool = False
    rotation: float = 0.0
    scaling: float = 0.0
    policy: str = "none"
    policy_operations: int = 2
    policy_magnitude: float = 9.0
    policy_std: float = 0.5
    policy_probability: float = 0.5
    fill: str = "mean"
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erasing: float = 0.0
    erasing_mode: str = "constant"
    min_erasing_area: float = 0.02
    max_erasing_area: float = 1 / 3
    erasing_ratio: float = 10 / 3
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    mix_switch: float = 0.5
    mix_per: str = "example"
    repeats: int = 1
    test_flip: bool = False
    test_shift: int = 0
    arrange: Callable[[jax.Array], jax.Array] | None = None
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "std", normalization.divisors(self.std))

    def __call__(
        self, key: PRNGKeyArray, images: Images, targets: Targets
    ) -> tuple[Float[Array, "batch ..."], Targets]:
        """Returns augmented, normalized and mixed inputs and their targets.

        Args:
            key: key of the step.
            images: batch of images.
            targets: class probabilities, one array or a tree of arrays.
        """
        crop_key, flip_key, rotation_key, mix_key = jax.random.split(key, 4)
        chain = self._draw_policy(jax.random.fold_in(key, _Stream.POLICY), images)
        images, inside = self._apply_geometry(key, crop_key, flip_key, rotation_key, images, chain)
        images = self._apply_pixel_operations(jax.random.fold_in(key, _Stream.JITTER), images, inside, chain)
        inputs = no_fuse(self._normalize)(images)
        if self.erasing:
            inputs = mixing.erase(
                jax.random.fold_in(key, _Stream.ERASING),
                inputs,
                probability=self.erasing,
                area=(self.min_erasing_area, self.max_erasing_area),
                ratio=self.erasing_ratio,
                noise=self.erasing_mode == "noise",
            )
        inputs, targets = self._mix(mix_key, inputs, targets)
        return self._arrange(inputs), targets

    def normalize(self, images: Images) -> Float[Array, "batch ..."]:
        """Returns (x / 255 - mean) / std per channel, arranged as the model expects it."""
        return self._arrange(self._normalize(images))

    @property
    def num_views(self) -> int:
        """Number of views that evaluation averages over."""
        return (5 if self.test_shift else 1) * (2 if self.test_flip else 1)

    def views(self, images: Images) -> list[Float[Array, "batch ..."]]:
        """Returns the normalized views that evaluation averages over, the unchanged image first."""
        height, width = images.shape[1:3]
        views = [images]
        if self.test_shift:
            padded, shift = pad(images, self.test_shift, "reflect"), self.test_shift
            corners = [(0, shift), (shift, 0), (shift, 2 * shift), (2 * shift, shift)]
            views += [padded[:, top : top + height, left : left + width] for top, left in corners]
        if self.test_flip:
            views += [view[:, :, ::-1] for view in views]
        return [self.normalize(view) for view in views]

    def _normalize(self, images: Images) -> Inputs:
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        # One multiplication and one addition per value, in float32, then one rounding to `dtype`.
        return (images.astype(jnp.float32) * (1 / (255 * std)) - mean / std).astype(self.dtype)

    def _arrange(self, inputs: Inputs) -> Float[Array, "batch ..."]:
        return inputs if self.arrange is None else self.arrange(inputs)

    def _draw_policy(self, key: PRNGKeyArray, images: Images) -> Chain | None:
        if self.policy == "none":
            return None
        settings = Settings(self.policy_operations, self.policy_magnitude, self.policy_std, self.policy_probability)
        return no_fuse(lambda key: POLICIES[self.policy].draw(key, *images.shape[:3], settings))(key)

    def _apply_geometry(
        self,
        key: PRNGKeyArray,
        crop_key: PRNGKeyArray,
        flip_key: PRNGKeyArray,
        rotation_key: PRNGKeyArray,
        images: Images,
        chain: Chain | None,
    ) -> tuple[Images, Bool[Array, "batch height width"]]:
        """Applies all geometric operations; the mask is True where a pixel comes from inside the image."""
        batch, height, width, _ = images.shape
        names = POLICIES[self.policy].names if chain else ()
        if not self.resized_crop and not operations.any_geometric(names):
            # Shifts by whole pixels and mirror images need no interpolation.
            if self.crop_padding:
                images = pad_and_crop(crop_key, images, self.crop_padding, self.crop_border)
            if self.flip:
                images = flip(flip_key, images)
            if self.rotation or self.scaling:
                images = rotate_and_scale(rotation_key, images, self.rotation, self.scaling)
            return images, jnp.ones((batch, height, width), bool)
        windows, maps, moved = geometry.full_windows(batch, height, width), [], jnp.zeros(batch, bool)
        if self.resized_crop:
            area = self.min_crop_area, self.max_crop_area
            key = jax.random.fold_in(key, _Stream.RESIZED_CROP)
            windows = geometry.resized_crop(key, batch, height, width, area, self.crop_ratio)
        elif self.crop_padding:
            top, left = _draw_offsets(crop_key, batch, self.crop_padding).T
            windows = dataclasses.replace(windows, top=top, left=left)
            images = pad(images, self.crop_padding, self.crop_border)
        if self.flip:
            windows = dataclasses.replace(windows, mirrored=_draw_flips(flip_key, batch))
        if self.rotation or self.scaling:
            angle, factor = _draw_rotations(rotation_key, batch, self.rotation, self.scaling)
            maps.append(geometry.similarity(jnp.cos(angle) / factor, jnp.sin(angle) / factor, height, width))
        if operations.any_geometric(names):
            layers = zip(chain.codes, chain.arguments, strict=True)
            maps += [operations.affine_maps(*layer, names, height, width) for layer in layers]
            moved = operations.is_geometric(chain.codes)
        images, inside = geometry.look_up(images, windows, maps, moved, height, width)
        return no_fuse(jnp.where)(inside[..., None], images, self._fill_value()), inside

    def _fill_value(self) -> UInt8[Array, " channels"]:
        values = {"mean": [round(255 * mean) for mean in self.mean], "black": [0], "grey": [128]}[self.fill]
        return jnp.broadcast_to(jnp.asarray(values, jnp.uint8), (len(self.mean),))

    def _apply_pixel_operations(
        self, key: PRNGKeyArray, images: Images, inside: Bool[Array, "batch height width"], chain: Chain | None
    ) -> Images:
        """Applies the operations on pixel values: those of the policy, then color jitter."""
        changed = images
        if chain:
            for layer in zip(chain.codes, chain.arguments, strict=True):
                changed = operations.apply(changed, inside, *layer, POLICIES[self.policy].names)
        jitter = no_fuse(lambda key: self._draw_jitter(key, len(images)))(key)
        if jitter:
            names = tuple(name for name, strength in self._jitter_strengths().items() if strength)
            for layer in zip(jitter.codes, jitter.arguments, strict=True):
                changed = operations.apply(changed, inside, *layer, names)
        return jnp.where(inside[..., None], changed, images)

    def _jitter_strengths(self) -> dict[str, float]:
        # The position in this dictionary decides which random numbers an operation gets: append only.
        return {"brightness": self.brightness, "contrast": self.contrast, "color": self.saturation, "hue": self.hue}

    def _draw_jitter(self, key: PRNGKeyArray, batch: int) -> Chain | None:
        """Draws each enabled operation once per image, in an order of the image's own (torchvision's ColorJitter)."""
        used = [(CODES[name], strength) for name, strength in self._jitter_strengths().items() if strength]
        if not used:
            return None
        order_key, strength_key = jax.random.split(key)
        shape = (len(used), batch)
        order = jax.random.uniform(order_key, shape).argsort(0)
        codes, strengths = (jnp.asarray(values)[order] for values in zip(*used, strict=True))
        draws = strengths * jax.random.uniform(strength_key, shape, minval=-1.0)
        arguments = jnp.where(codes == CODES["hue"], draws, jnp.maximum(1 + draws, 0.0))
        return Chain(codes, arguments.astype(jnp.float32))

    def _mix(self, key: PRNGKeyArray, inputs: Inputs, targets: Targets) -> tuple[Inputs, Targets]:
        if not self.mixup and not self.cutmix:
            return inputs, targets
        if not self.cutmix and self.mix_probability == 1 and self.mix_per == "example":
            return mixup(key, inputs, targets, self.mixup)
        return mixing.mix(
            key,
            inputs,
            targets,
            mixup=self.mixup,
            cutmix=self.cutmix,
            probability=self.mix_probability,
            switch=self.mix_switch,
            per_batch=self.mix_per == "batch",
        )


def pad_and_crop(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channels"], padding: int, border: str = "black"
) -> UInt8[Array, "batch height width channels"]:
    """Returns random crops of the original size from the images padded by `pad`."""
    batch, height, width, channels = images.shape
    padded = pad(images, padding, border)
    offsets = _draw_offsets(key, batch, padding)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def pad(
    images: UInt8[Array, "batch height width channels"], padding: int, border: str
) -> UInt8[Array, "batch padded_height padded_width channels"]:
    """Returns the images with `padding` pixels added per side: 'black', or 'reflect' for the mirrored image."""
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jnp.pad(images, sides, mode={"black": "constant", "reflect": "reflect"}[border])


def _draw_offsets(key: PRNGKeyArray, batch: int, padding: int) -> Int[Array, "batch 2"]:
    return jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)


def flip(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channels"]
) -> UInt8[Array, "batch height width channels"]:
    """Returns the images, each mirrored left to right with probability 1/2."""
    return jnp.where(_draw_flips(key, len(images))[:, None, None, None], images[:, :, ::-1], images)


def _draw_flips(key: PRNGKeyArray, batch: int) -> Bool[Array, " batch"]:
    return jax.random.bernoulli(key, 0.5, (batch, 1, 1, 1))[:, 0, 0, 0]


def rotate_and_scale(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channels"], rotation: float, scaling: float
) -> UInt8[Array, "batch height width channels"]:
    """Returns images rotated about their centre and scaled by random amounts, with bilinear interpolation.

    Pixels from outside the image are black.

    Args:
        key: random key.
        images: batch of images.
        rotation: maximum angle either way, degrees.
        scaling: maximum relative change of size.
    """
    batch, height, width, _ = images.shape
    angle, factor = _draw_rotations(key, batch, rotation, scaling)
    rows, columns = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )

    def transform(image: jax.Array, angle: jax.Array, factor: jax.Array) -> jax.Array:
        # The source position of each pixel of the result: the inverse map.
        sine, cosine = jnp.sin(angle) / factor, jnp.cos(angle) / factor
        source = [cosine * rows - sine * columns + (height - 1) / 2, sine * rows + cosine * columns + (width - 1) / 2]

        def interpolate(plane: jax.Array) -> jax.Array:
            return jax.scipy.ndimage.map_coordinates(plane, source, order=1, mode="constant")

        return jax.vmap(interpolate, in_axes=2, out_axes=2)(image.astype(jnp.float32))

    return jnp.round(jax.vmap(transform)(images, angle, factor)).astype(jnp.uint8)


def _draw_rotations(key: PRNGKeyArray, batch: int, rotation: float, scaling: float) -> tuple[jax.Array, jax.Array]:
    """Draws an angle in radians and a scale factor per image."""
    angle, factor = jax.random.uniform(key, (2, batch), minval=-1.0)
    return jnp.deg2rad(rotation) * angle, 1 + scaling * factor


def check_shape(section: Any, shape: tuple[int, ...]) -> None:
    """Checks the config section `augment` for images of `shape` (height, width, channels).

    Raises:
        UserError: color operations on images that are neither grey nor RGB, or a shift as large as the image.
    """
    size = min(shape[:2])
    color = [name for name in ("brightness", "contrast", "saturation", "hue") if section[name]]
    color += ["policy"] if section.policy != "none" else []
    if color and shape[2] not in (1, 3):
        raise UserError(
            f"config.augment.{color[0]} is {section[color[0]]}, and the images have {shape[2]} channels\n"
            "  allowed: images with 1 or 3 channels"
        )
    for name in ("crop_padding", "test_shift"):
        if section[name] >= size and (name == "test_shift" or section.crop_border == "reflect"):
            raise UserError(
                f"config.augment.{name} is {section[name]}\n  allowed: less than the {size} pixels of the image"
            )
