"""Augmentation on the device: batched, and a pure function of (key, images, labels)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

from vit_jax.data import geometry, mixing, operations
from vit_jax.data.mixing import mixup
from vit_jax.data.no_fuse import no_fuse
from vit_jax.data.operations import CODES, Chain
from vit_jax.data.policies import POLICIES, Settings
from vit_jax.errors import UserError

Images = UInt8[Array, "batch height width channels"]
Inputs = Float[Array, "batch height width channels"]
Targets = PyTree[Float[Array, "batch _"]]

# Numbers of the keys that are folded in, beside the four that the key is split into.
_POLICY, _RESIZED_CROP, _JITTER, _ERASING = range(4)


@dataclasses.dataclass(frozen=True)
class Augment:
    """What training does to a batch of images; evaluation does `normalize` alone, or `views`.

    The order is: crop, flip, the policy's operations, colour jitter, normalise, erase, mix. Of an image's geometric
    operations one look-up is made, in front of the operations on pixels; those act on the picture and leave alone what
    was filled in around it.

    Attributes:
        mean: of each channel, in [0, 1], over the training split.
        std: likewise.
        crop_padding: pixels added a side before a crop of the old size is taken at random; 0 for none.
        crop_border: what they are: 'black', or 'reflect' for the mirrored image.
        resized_crop: take a window of random area and ratio instead, and scale it to the old size.
        min_crop_area, max_crop_area: share of the area that it has.
        crop_ratio: largest ratio of its sides, either way.
        flip: mirror half of the images left to right.
        rotation: largest angle of a random turn, degrees; 0 for none.
        scaling: largest share by which an image is enlarged or shrunk at random; 0 for none.
        policy: one of `POLICIES`, or 'none'.
        policy_operations, policy_magnitude, policy_std, policy_probability: see `policies.Settings`.
        fill: what a policy's geometric operations bring in from outside: 'mean', 'black' or 'grey'.
        brightness, contrast, saturation: colour jitter by factors of 1 - x to 1 + x, in random order; 0 for none.
        hue: colour jitter by so much of the circle either way, at most 0.5.
        erasing: share of the images that lose a rectangle.
        erasing_mode: 'constant' for the mean in its place, 'noise' for normal noise.
        min_erasing_area, max_erasing_area: share of the area that it has.
        erasing_ratio: largest ratio of its sides, either way.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        mix_probability: with which an example, or a batch, is mixed at all.
        mix_switch: share of cutmix where both are on.
        mix_per: 'example' for draws of each its own, 'batch' for one that all share.
        repeats: how often each example stands in a batch, each time augmented anew (made by the pipeline).
        test_flip: evaluation averages over the image and its mirror image.
        test_shift: evaluation averages over the image and itself shifted by so many pixels in four directions.
        arrange: what is done to the inputs last, such as cutting them into patches; None for nothing.
        dtype: of the result.
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

    def __call__(
        self, key: PRNGKeyArray, images: Images, targets: Targets
    ) -> tuple[Float[Array, "batch ..."], Targets]:
        """Augments, normalises and mixes; targets are class probabilities, one array or a tree of them."""
        crop_key, flip_key, turn_key, mix_key = jax.random.split(key, 4)
        chain = self._draw(jax.random.fold_in(key, _POLICY), images)
        images, inside = self._move(key, crop_key, flip_key, turn_key, images, chain)
        images = self._change(jax.random.fold_in(key, _JITTER), images, inside, chain)
        inputs = no_fuse(self._normalize)(images)
        if self.erasing:
            inputs = mixing.erase(
                jax.random.fold_in(key, _ERASING),
                inputs,
                probability=self.erasing,
                area=(self.min_erasing_area, self.max_erasing_area),
                ratio=self.erasing_ratio,
                noise=self.erasing_mode == "noise",
            )
        inputs, targets = self._mix(mix_key, inputs, targets)
        return self._arrange(inputs), targets

    def normalize(self, images: Images) -> Float[Array, "batch ..."]:
        """(x / 255 - mean) / std, a channel; then arranged as the model takes it."""
        return self._arrange(self._normalize(images))

    def views(self, images: Images) -> list[Float[Array, "batch ..."]]:
        """The normalised images as evaluation looks at them: themselves alone, or with shifts and mirror images."""
        height, width = images.shape[1:3]
        views = [images]
        if self.test_shift:
            padded, shift = pad(images, self.test_shift, "reflect"), self.test_shift
            places = [(0, shift), (shift, 0), (shift, 2 * shift), (2 * shift, shift)]
            views += [padded[:, top : top + height, left : left + width] for top, left in places]
        if self.test_flip:
            views += [view[:, :, ::-1] for view in views]
        return [self.normalize(view) for view in views]

    def _normalize(self, images: Images) -> Inputs:
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        # One product and one sum a pixel, in float32 before it is rounded to `dtype`.
        return (images.astype(jnp.float32) * (1 / (255 * std)) - mean / std).astype(self.dtype)

    def _arrange(self, inputs: Inputs) -> Float[Array, "batch ..."]:
        return inputs if self.arrange is None else self.arrange(inputs)

    def _draw(self, key: PRNGKeyArray, images: Images) -> Chain | None:
        if self.policy == "none":
            return None
        settings = Settings(self.policy_operations, self.policy_magnitude, self.policy_std, self.policy_probability)
        return no_fuse(lambda key: POLICIES[self.policy].draw(key, *images.shape[:3], settings))(key)

    def _move(
        self,
        key: PRNGKeyArray,
        crop_key: PRNGKeyArray,
        flip_key: PRNGKeyArray,
        turn_key: PRNGKeyArray,
        images: Images,
        chain: Chain | None,
    ) -> tuple[Images, Bool[Array, "batch height width"]]:
        """All that is geometric; and which pixels are of the picture, not of the filling."""
        batch, height, width, _ = images.shape
        names = POLICIES[self.policy].names if chain else ()
        if not self.resized_crop and not operations.moves(names):
            # Whole shifts and mirror images need no look-up between pixels.
            if self.crop_padding:
                images = pad_and_crop(crop_key, images, self.crop_padding, self.crop_border)
            if self.flip:
                images = flip(flip_key, images)
            if self.rotation or self.scaling:
                images = turn_and_scale(turn_key, images, self.rotation, self.scaling)
            return images, jnp.ones((batch, height, width), bool)
        windows, maps, moved = geometry.whole(batch, height, width), [], jnp.zeros(batch, bool)
        if self.resized_crop:
            area = self.min_crop_area, self.max_crop_area
            key = jax.random.fold_in(key, _RESIZED_CROP)
            windows = geometry.resized_crop(key, batch, height, width, area, self.crop_ratio)
        elif self.crop_padding:
            top, left = _offsets(crop_key, batch, self.crop_padding).T
            windows = dataclasses.replace(windows, top=top, left=left)
            images = pad(images, self.crop_padding, self.crop_border)
        if self.flip:
            windows = dataclasses.replace(windows, mirrored=_mirrored(flip_key, batch))
        if self.rotation or self.scaling:
            angle, factor = _turns(turn_key, batch, self.rotation, self.scaling)
            maps.append(geometry.similarity(jnp.cos(angle) / factor, jnp.sin(angle) / factor, height, width))
        if operations.moves(names):
            layers = zip(chain.codes, chain.arguments, strict=True)
            maps += [operations.maps(*layer, names, height, width) for layer in layers]
            moved = operations.moved(chain.codes)
        images, inside = geometry.look_up(images, windows, maps, moved, height, width)
        return no_fuse(jnp.where)(inside[..., None], images, self._filling()), inside

    def _filling(self) -> UInt8[Array, " channels"]:
        values = {"mean": [round(255 * mean) for mean in self.mean], "black": [0], "grey": [128]}[self.fill]
        return jnp.broadcast_to(jnp.asarray(values, jnp.uint8), (len(self.mean),))

    def _change(
        self, key: PRNGKeyArray, images: Images, inside: Bool[Array, "batch height width"], chain: Chain | None
    ) -> Images:
        """All that changes the values of pixels where they are."""
        changed = images
        if chain:
            for layer in zip(chain.codes, chain.arguments, strict=True):
                changed = operations.apply(changed, inside, *layer, POLICIES[self.policy].names)
        jitter = no_fuse(lambda key: self._draw_jitter(key, len(images)))(key)
        if jitter:
            names = tuple(name for name, strength in self._jitters().items() if strength)
            for layer in zip(jitter.codes, jitter.arguments, strict=True):
                changed = operations.apply(changed, inside, *layer, names)
        return jnp.where(inside[..., None], changed, images)

    def _jitters(self) -> dict[str, float]:
        return {"brightness": self.brightness, "contrast": self.contrast, "color": self.saturation, "hue": self.hue}

    def _draw_jitter(self, key: PRNGKeyArray, batch: int) -> Chain | None:
        """Each of the four operations once, in an order of each image's own (torchvision's ColorJitter)."""
        used = [(CODES[name], strength) for name, strength in self._jitters().items() if strength]
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
            alike=self.mix_per == "batch",
        )


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

    def views(self, inputs: Float[Array, "batch *example"]) -> list[Float[Array, "batch *example"]]:
        """Inputs as they are: features cannot be looked at in other ways."""
        return [inputs]


def pad_and_crop(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channels"], padding: int, border: str = "black"
) -> UInt8[Array, "batch height width channels"]:
    """Shifts each image by up to `padding` pixels either way on both axes; see `pad` for what comes in from outside."""
    batch, height, width, channels = images.shape
    padded = pad(images, padding, border)
    offsets = _offsets(key, batch, padding)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def pad(
    images: UInt8[Array, "batch height width channels"], padding: int, border: str
) -> UInt8[Array, "batch padded_height padded_width channels"]:
    """Adds so many pixels a side: of the border 'black', or 'reflect' for the image mirrored at its edge."""
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jnp.pad(images, sides, mode={"black": "constant", "reflect": "reflect"}[border])


def _offsets(key: PRNGKeyArray, batch: int, padding: int) -> Int[Array, "batch 2"]:
    return jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)


def flip(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channels"]
) -> UInt8[Array, "batch height width channels"]:
    """Mirrors each image left to right with probability one half."""
    return jnp.where(_mirrored(key, len(images))[:, None, None, None], images[:, :, ::-1], images)


def _mirrored(key: PRNGKeyArray, batch: int) -> Bool[Array, " batch"]:
    return jax.random.bernoulli(key, 0.5, (batch, 1, 1, 1))[:, 0, 0, 0]


def turn_and_scale(
    key: PRNGKeyArray, images: UInt8[Array, "batch height width channels"], rotation: float, scaling: float
) -> UInt8[Array, "batch height width channels"]:
    """Turns each image about its centre by up to `rotation` degrees and scales it by up to 1 +- `scaling`.

    One bilinear look-up a pixel; what comes in from outside is black.
    """
    batch, height, width, _ = images.shape
    angle, factor = _turns(key, batch, rotation, scaling)
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


def _turns(key: PRNGKeyArray, batch: int, rotation: float, scaling: float) -> tuple[jax.Array, jax.Array]:
    """An angle in radians and a factor for each image."""
    angle, factor = jax.random.uniform(key, (2, batch), minval=-1.0)
    return jnp.deg2rad(rotation) * angle, 1 + scaling * factor


def check(config: Any) -> None:
    """Checks what no option of the section `augment` shows by itself.

    Raises:
        UserError: options that contradict each other, and which ones.
    """
    section, train = config.augment, config.train
    if section.crop_padding and section.resized_crop:
        raise UserError(
            f"config.augment.resized_crop is True, and crop_padding is {section.crop_padding}\n"
            "  allowed: one of the two crops"
        )
    for name in ("crop_area", "erasing_area"):
        minimum, maximum = section[f"min_{name}"], section[f"max_{name}"]
        if minimum > maximum:
            raise UserError(f"config.augment.min_{name} is {minimum:g}\n  allowed: at most max_{name}, {maximum:g}")
    if train.batch_size != "auto" and train.batch_size % section.repeats:
        raise UserError(
            f"config.augment.repeats is {section.repeats}\n"
            f"  allowed: a divisor of config.train.batch_size, {train.batch_size}"
        )


def check_shape(config: Any, shape: tuple[int, ...]) -> None:
    """Checks the section `augment` for images of (height, width, channels) `shape`.

    Raises:
        UserError: operations on colours for neither grey nor RGB images, or a border wider than the image.
    """
    section, side = config.augment, min(shape[:2])
    colours = [name for name in ("brightness", "contrast", "saturation", "hue") if section[name]]
    colours += ["policy"] if section.policy != "none" else []
    if colours and shape[2] not in (1, 3):
        raise UserError(
            f"config.augment.{colours[0]} is {section[colours[0]]}, and the images have {shape[2]} channels\n"
            "  allowed: with images of 1 or 3 channels"
        )
    for name in ("crop_padding", "test_shift"):
        if section[name] >= side and (name == "test_shift" or section.crop_border == "reflect"):
            raise UserError(f"config.augment.{name} is {section[name]}\n  allowed: less than the image's {side} pixels")
