"""Policies: which operations are drawn for each image, and how strong they are.

Each draws a `Chain` from a key; `operations.py` applies it. Where a policy of a published library takes a whole number
(bits, thresholds, pixels), so does ours, rounded as there.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vit_jax.data.operations import CODES, Chain

MAGNITUDES = 10  # of RandAugment: the strongest
WIDE_STEPS = 31  # of TrivialAugment: strengths from 0 on
TRANSLATION = 150 / 331  # of AutoAugment: largest shift, as a share of the image

Strength = Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A way to draw operations.

    Attributes:
        draw: of (key, batch, height, width, settings) the batch's chain.
        names: the operations that may be drawn.
    """

    draw: Callable[[PRNGKeyArray, int, int, int, "Settings"], Chain]
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What RandAugment leaves open; the other policies have no settings.

    Attributes:
        layers: operations an image, the n of RandAugment.
        magnitude: 0 to 10, its m.
        std: standard deviation of a normal magnitude; the result is cut to 0 .. 10.
        probability: with which each of the operations is done.
    """

    layers: int = 2
    magnitude: float = 9.0
    std: float = 0.5
    probability: float = 0.5


# --- RandAugment ----------------------------------------------------------------------------------------------------


def _increasing(level: Strength, sign: Strength, height: int, width: int) -> dict[str, Strength]:
    """The argument of each operation at a level of 0 to 10, of timm's set whose effects all grow with it."""
    share = level / MAGNITUDES
    # Whole numbers are rounded down after a hair: 0.9 * 10 is 9 whatever float32 makes of it.
    down = lambda value: jnp.floor(value + 1e-4)  # noqa: E731
    factor = jnp.maximum(1 + 0.9 * share * sign, 0.1)
    return {
        "auto_contrast": share,
        "equalize": share,
        "invert": share,
        "rotate": 30 * share * sign,
        "posterize": 4 - down(4 * share),
        "solarize": 256 - down(256 * share),
        "solarize_add": down(110 * share),
        "color": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
        "shear_x": 0.3 * share * sign,
        "shear_y": 0.3 * share * sign,
        "translate_x": 0.45 * share * sign * width,
        "translate_y": 0.45 * share * sign * height,
    }


def _names(arguments: Callable[[Strength, Strength], dict[str, Strength]]) -> tuple[str, ...]:
    """The operations of a set, in its order; found without a device, which at import must not be touched yet."""
    names: list[str] = []
    number = jax.ShapeDtypeStruct((), jnp.float32)
    jax.eval_shape(lambda *numbers: names.extend(arguments(*numbers)), number, number)
    return tuple(names)


INCREASING = _names(lambda level, sign: _increasing(level, sign, 1, 1))


def rand_augment(key: PRNGKeyArray, batch: int, height: int, width: int, settings: Settings) -> Chain:
    """`layers` operations, each any of the set with equal odds, done or left out (arXiv 1909.13719; timm's `inc1`)."""
    shape = (settings.layers, batch)
    name_key, done_key, level_key, sign_key = jax.random.split(key, 4)
    chosen = jax.random.randint(name_key, shape, 0, len(INCREASING))
    done = jax.random.bernoulli(done_key, settings.probability, shape)
    level = settings.magnitude + settings.std * jax.random.normal(level_key, shape)
    arguments = _increasing(jnp.clip(level, 0, MAGNITUDES), _sign(sign_key, shape), height, width)
    return _pick(INCREASING, arguments, jnp.where(done, chosen, -1))


# --- TrivialAugment -------------------------------------------------------------------------------------------------


def _wide(step: Strength, sign: Strength) -> dict[str, Strength]:
    """The argument of each operation at a step of 0 to 30 (arXiv 2103.10158, the wide space; torchvision's numbers)."""
    share = step / (WIDE_STEPS - 1)
    factor, shift = 1 + 0.99 * share * sign, jnp.trunc(32 * share * sign)
    return {
        "identity": share,
        "shear_x": 0.99 * share * sign,
        "shear_y": 0.99 * share * sign,
        "translate_x": shift,
        "translate_y": shift,
        "rotate": 135 * share * sign,
        "brightness": factor,
        "color": factor,
        "contrast": factor,
        "sharpness": factor,
        "posterize": 8 - jnp.round(6 * share),
        "solarize": 255 * (1 - share),
        "auto_contrast": share,
        "equalize": share,
    }


WIDE = _names(_wide)


def trivial_augment(key: PRNGKeyArray, batch: int, height: int, width: int, settings: Settings) -> Chain:
    """One operation of equal odds, as strong as chance has it: TrivialAugment, the wide space (arXiv 2103.10158)."""
    name_key, step_key, sign_key = jax.random.split(key, 3)
    step = jax.random.randint(step_key, (1, batch), 0, WIDE_STEPS)
    chosen = jax.random.randint(name_key, (1, batch), 0, len(WIDE))
    return _pick(WIDE, _wide(step.astype(jnp.float32), _sign(sign_key, (1, batch))), chosen)


# --- AutoAugment ----------------------------------------------------------------------------------------------------

# Table 7 of arXiv 1805.09501: two operations a policy, each with its probability and its magnitude of 0 to 9.
CIFAR10 = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("auto_contrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("auto_contrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 1)),
)


def _searched(magnitude: Strength, sign: Strength, height: int, width: int) -> dict[str, Strength]:
    """The argument of each operation at a magnitude of 0 to 9, as torchvision has AutoAugment's ranges."""
    share = magnitude / 9
    factor = 1 + 0.9 * share * sign
    return {
        "auto_contrast": share,
        "equalize": share,
        "invert": share,
        "rotate": 30 * share * sign,
        "posterize": 8 - jnp.round(4 * share),
        "solarize": 255 * (1 - share),
        "color": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
        "shear_y": 0.3 * share * sign,
        "translate_x": jnp.trunc(TRANSLATION * width * share * sign),
        "translate_y": jnp.trunc(TRANSLATION * height * share * sign),
    }


SEARCHED = _names(lambda level, sign: _searched(level, sign, 1, 1))


def auto_augment(key: PRNGKeyArray, batch: int, height: int, width: int, settings: Settings) -> Chain:
    """One of the 25 policies found on CIFAR-10 (arXiv 1805.09501): two operations with their own odds."""
    policy_key, done_key, sign_key = jax.random.split(key, 3)
    policy = jax.random.randint(policy_key, (batch,), 0, len(CIFAR10))
    table = [[(SEARCHED.index(name), odds, magnitude) for name, odds, magnitude in pair] for pair in CIFAR10]
    chosen, odds, magnitudes = jnp.asarray(table, jnp.float32)[policy].T
    done = jax.random.uniform(done_key, (2, batch)) < odds
    sign = _sign(sign_key, (2, batch))
    arguments = _searched(magnitudes, sign, height, width)
    return _pick(SEARCHED, arguments, jnp.where(done, chosen.astype(jnp.int32), -1))


# --- 3-Augment ------------------------------------------------------------------------------------------------------

THREE = ("grayscale", "solarize", "blur")


def three_augment(key: PRNGKeyArray, batch: int, height: int, width: int, settings: Settings) -> Chain:
    """Grey, solarised from 128 on, or blurred by 0.1 to 2 pixels, with equal odds (arXiv 2204.07118, section 3.2)."""
    name_key, radius_key = jax.random.split(key)
    radius = jax.random.uniform(radius_key, (1, batch), minval=0.1, maxval=2.0)
    arguments = {"grayscale": radius, "solarize": jnp.full_like(radius, 128), "blur": radius}
    return _pick(THREE, arguments, jax.random.randint(name_key, (1, batch), 0, len(THREE)))


def _sign(key: PRNGKeyArray, shape: tuple[int, ...]) -> Strength:
    return jnp.where(jax.random.bernoulli(key, 0.5, shape), 1.0, -1.0)


def _pick(names: tuple[str, ...], arguments: dict[str, Strength], chosen: jax.Array) -> Chain:
    """The chain of the operations at the places `chosen` in `names`; -1 is none."""
    codes = jnp.asarray([CODES[name] for name in names], jnp.int32)
    picked = jnp.select([chosen == k for k in range(len(names))], [arguments[name] for name in names], 0.0)
    return Chain(jnp.where(chosen < 0, CODES["identity"], codes[chosen]), picked.astype(jnp.float32))


POLICIES = {
    "rand_augment": Policy(rand_augment, INCREASING),
    "trivial_augment": Policy(trivial_augment, WIDE),
    "auto_augment": Policy(auto_augment, SEARCHED),
    "three_augment": Policy(three_augment, THREE),
}
