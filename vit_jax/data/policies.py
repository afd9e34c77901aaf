"""Policies: which operations are drawn for each image, and with which arguments.

Each policy draws a `Chain` from a key; `operations.py` applies it. Integer arguments (bits, thresholds, pixels) are
rounded as in the library that the policy follows.

A policy draws an index into its own list of names, so the order of that list is part of the random stream: reordering
or inserting names changes what is drawn for a key.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vit_jax.data.operations import CODES, Chain

MAX_MAGNITUDE = 10  # of RandAugment
WIDE_STEPS = 31  # number of magnitudes of TrivialAugment
MAX_TRANSLATION = 150 / 331  # of AutoAugment, as a fraction of the image

Arguments = Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A way to draw operations.

    Attributes:
        draw: draw(key, batch, height, width, settings) returns the chain of a batch.
        names: the operations that can be drawn.
    """

    draw: Callable[[PRNGKeyArray, int, int, int, "Settings"], Chain]
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of RandAugment; the other policies have none.

    Attributes:
        layers: operations per image, N in the paper.
        magnitude: mean magnitude, 0 to 10, M in the paper.
        std: standard deviation of the magnitude, which is normally distributed and clipped to 0..10.
        probability: probability that each of the operations is applied.
    """

    layers: int = 2
    magnitude: float = 9.0
    std: float = 0.5
    probability: float = 0.5


# --- RandAugment ----------------------------------------------------------------------------------------------------


def _increasing(magnitude: Arguments, sign: Arguments, height: int, width: int) -> dict[str, Arguments]:
    """Returns the argument of each operation at a magnitude of 0 to 10, as in timm's increasing set."""
    share = magnitude / MAX_MAGNITUDE
    factor = jnp.maximum(1 + 0.9 * share * sign, 0.1)
    return {
        "auto_contrast": share,
        "equalize": share,
        "invert": share,
        "rotate": 30 * share * sign,
        "posterize": 4 - _floor(4 * share),
        "solarize": 256 - _floor(256 * share),
        "solarize_add": _floor(110 * share),
        "color": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
        "shear_x": 0.3 * share * sign,
        "shear_y": 0.3 * share * sign,
        "translate_x": 0.45 * share * sign * width,
        "translate_y": 0.45 * share * sign * height,
    }


def _floor(value: Arguments) -> Arguments:
    # A float32 product slightly below an integer counts as that integer: 0.9 * 10 is 9.
    return jnp.floor(value + 1e-4)


def _names(arguments: Callable[[Arguments, Arguments], dict[str, Arguments]]) -> tuple[str, ...]:
    """Returns the operations of a set in order, without computing anything: a device must not be used at import."""
    names: list[str] = []
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    jax.eval_shape(lambda *scalars: names.extend(arguments(*scalars)), scalar, scalar)
    return tuple(names)


INCREASING = _names(lambda magnitude, sign: _increasing(magnitude, sign, 1, 1))


def rand_augment(key: PRNGKeyArray, batch: int, height: int, width: int, settings: Settings) -> Chain:
    """Draws `layers` operations with equal probability, each applied or skipped (arXiv 1909.13719; timm's `inc1`)."""
    shape = (settings.layers, batch)
    name_key, applied_key, magnitude_key, sign_key = jax.random.split(key, 4)
    chosen = jax.random.randint(name_key, shape, 0, len(INCREASING))
    applied = jax.random.bernoulli(applied_key, settings.probability, shape)
    magnitude = settings.magnitude + settings.std * jax.random.normal(magnitude_key, shape)
    arguments = _increasing(jnp.clip(magnitude, 0, MAX_MAGNITUDE), _sign(sign_key, shape), height, width)
    return _pick(INCREASING, arguments, jnp.where(applied, chosen, -1))


# --- TrivialAugment -------------------------------------------------------------------------------------------------


def _wide(step: Arguments, sign: Arguments) -> dict[str, Arguments]:
    """Returns the argument of each operation at a step of 0 to 30 (arXiv 2103.10158, wide space; as torchvision)."""
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
    """Draws one operation and its magnitude uniformly: TrivialAugment, wide space (arXiv 2103.10158)."""
    name_key, step_key, sign_key = jax.random.split(key, 3)
    step = jax.random.randint(step_key, (1, batch), 0, WIDE_STEPS)
    chosen = jax.random.randint(name_key, (1, batch), 0, len(WIDE))
    return _pick(WIDE, _wide(step.astype(jnp.float32), _sign(sign_key, (1, batch))), chosen)


# --- AutoAugment ----------------------------------------------------------------------------------------------------

# Table 7 of arXiv 1805.09501: two operations per sub-policy, each with its probability and a magnitude of 0 to 9.
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


def _searched(magnitude: Arguments, sign: Arguments, height: int, width: int) -> dict[str, Arguments]:
    """Returns the argument of each operation at a magnitude of 0 to 9, with torchvision's ranges of AutoAugment."""
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
        "translate_x": jnp.trunc(MAX_TRANSLATION * width * share * sign),
        "translate_y": jnp.trunc(MAX_TRANSLATION * height * share * sign),
    }


SEARCHED = _names(lambda magnitude, sign: _searched(magnitude, sign, 1, 1))


def auto_augment(key: PRNGKeyArray, batch: int, height: int, width: int, settings: Settings) -> Chain:
    """Draws one of the 25 sub-policies found on CIFAR-10 (arXiv 1805.09501), of two operations each."""
    policy_key, applied_key, sign_key = jax.random.split(key, 3)
    policy = jax.random.randint(policy_key, (batch,), 0, len(CIFAR10))
    table = [[(SEARCHED.index(name), *values) for name, *values in pair] for pair in CIFAR10]
    chosen, probability, magnitudes = jnp.asarray(table, jnp.float32)[policy].T
    applied = jax.random.uniform(applied_key, (2, batch)) < probability
    sign = _sign(sign_key, (2, batch))
    arguments = _searched(magnitudes, sign, height, width)
    return _pick(SEARCHED, arguments, jnp.where(applied, chosen.astype(jnp.int32), -1))


# --- 3-Augment ------------------------------------------------------------------------------------------------------

THREE = ("grayscale", "solarize", "blur")


def three_augment(key: PRNGKeyArray, batch: int, height: int, width: int, settings: Settings) -> Chain:
    """Draws grayscale, solarize at 128, or blur with a radius of 0.1 to 2 pixels (arXiv 2204.07118, section 3.2)."""
    name_key, radius_key = jax.random.split(key)
    radius = jax.random.uniform(radius_key, (1, batch), minval=0.1, maxval=2.0)
    arguments = {"grayscale": radius, "solarize": jnp.full_like(radius, 128), "blur": radius}
    return _pick(THREE, arguments, jax.random.randint(name_key, (1, batch), 0, len(THREE)))


def _sign(key: PRNGKeyArray, shape: tuple[int, ...]) -> Arguments:
    return jnp.where(jax.random.bernoulli(key, 0.5, shape), 1.0, -1.0)


def _pick(names: tuple[str, ...], arguments: dict[str, Arguments], chosen: jax.Array) -> Chain:
    """Returns the chain of the operations at the indices `chosen` into `names`; -1 is the identity."""
    codes = jnp.asarray([CODES[name] for name in names], jnp.int32)
    picked = jnp.select([chosen == k for k in range(len(names))], [arguments[name] for name in names], 0.0)
    return Chain(jnp.where(chosen < 0, CODES["identity"], codes[chosen]), picked.astype(jnp.float32))


POLICIES = {
    "rand_augment": Policy(rand_augment, INCREASING),
    "trivial_augment": Policy(trivial_augment, WIDE),
    "auto_augment": Policy(auto_augment, SEARCHED),
    "three_augment": Policy(three_augment, THREE),
}
