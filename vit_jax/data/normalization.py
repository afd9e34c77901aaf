"""The statistics that images are normalized with: mean and standard deviation per channel."""

import math

import numpy as np

from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

# Of red, green and blue: those of ImageNet, and those that OpenAI's CLIP was trained with.
RED_GREEN_BLUE: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
IMAGENET = RED_GREEN_BLUE["imagenet"]
CONSTANTS = ("half", *RED_GREEN_BLUE)
NAMES = ("set", *CONSTANTS)  # statistics of the train split of the dataset; 0.5 and 0.5; those above
PER_CHANNEL = "MEAN/STD of each channel, as 0.5,0.5,0.5/0.25,0.25,0.25"
OPTION = "config.data.normalization"
MIN_STD = 1e-5  # of pixels in [0, 1]: a channel that varies less is constant, up to the rounding of its statistics


def divisors(std: tuple[float, ...]) -> tuple[float, ...]:
    """Returns what the pixels of each channel are divided by: its standard deviation, or 1 if it is constant.

    Every normalization of pixels divides by this, so a channel that is the same everywhere becomes 0.
    """
    return tuple(value if value >= MIN_STD else 1.0 for value in std)


def note(mean: tuple[float, ...], std: tuple[float, ...]) -> str | None:
    """Returns a line that names the constant channels of a dataset, or None if there are none."""
    constant = [f"{channel} (always {255 * mean[channel]:.4g})" for channel, value in enumerate(std) if value < MIN_STD]
    return f"constant channels, not divided by their std of 0: {', '.join(constant)}" if constant else None


def text(statistics: Statistics) -> str:
    """Returns the name of mean and std if they have one, else their numbers: '0.1,0.2,0.3/0.4,0.5,0.6'."""
    for name in CONSTANTS:
        is_possible = name not in RED_GREEN_BLUE or len(statistics[0]) == 3
        if is_possible and np.allclose(statistics, constants(name, len(statistics[0])), rtol=0, atol=1e-3):
            return name
    return "/".join(",".join(map(repr, part)) for part in statistics)


def constants(name: str, channels: int, option: str = OPTION) -> Statistics | None:
    """Returns mean and standard deviation of pixels in [0, 1] for a name; None for 'set', which depends on the source.

    Args:
        name: one of `NAMES`, or numbers as `text` writes them.
        channels: number of channels of the images.
        option: the option that the name comes from, for error messages.

    Raises:
        UserError: an unknown name, or statistics of another number of channels than that of the images.
    """
    if name == "set":
        return None
    if name == "half":
        return (0.5,) * channels, (0.5,) * channels
    found = RED_GREEN_BLUE.get(name) or _parsed(name)
    if found is None:
        raise UserError(f"{option} is {name!r}\n  allowed: {', '.join(NAMES)}, or {PER_CHANNEL}")
    if channels != len(found[0]):
        raise UserError(
            f"{option} is {name!r}, and the images have {channels} channels\n  allowed: set, half, or {PER_CHANNEL}"
        )
    return found


def _parsed(text: str) -> Statistics | None:
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
    except ValueError:
        return None
    is_valid = len(mean) == len(std) and all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)
    return (mean, std) if is_valid else None


def of_source(name: str, source: Source, option: str = OPTION) -> Statistics:
    """Returns `constants`, or for 'set' the mean and the `divisors` of the source.

    Raises:
        UserError: as `constants`.
    """
    return constants(name, len(source.mean), option) or (source.mean, divisors(source.std))
