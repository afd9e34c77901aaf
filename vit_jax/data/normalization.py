"""The statistics that images are normalized with: mean and standard deviation per channel."""

from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

# Of ImageNet's red, green and blue channels, as most published models use them.
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONSTANTS = ("half", "imagenet")
NAMES = ("set", *CONSTANTS)  # statistics of the train split of the dataset; 0.5 and 0.5; ImageNet's
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


def constants(name: str, channels: int, option: str = OPTION) -> Statistics | None:
    """Returns mean and standard deviation of pixels in [0, 1] for a name; None for 'set', which depends on the source.

    Args:
        name: one of `NAMES`.
        channels: number of channels of the images.
        option: the option that the name comes from, for error messages.

    Raises:
        UserError: an unknown name, or 'imagenet' for images that do not have three channels.
    """
    if name not in NAMES:
        raise UserError(f"{option} is {name!r}\n  allowed: {', '.join(NAMES)}")
    if name == "set":
        return None
    if name == "half":
        return (0.5,) * channels, (0.5,) * channels
    if channels != len(IMAGENET[0]):
        raise UserError(f"{option} is 'imagenet', and the images have {channels} channels\n  allowed: set, half")
    return IMAGENET


def of_source(name: str, source: Source, option: str = OPTION) -> Statistics:
    """Returns `constants`, or for 'set' the mean and the `divisors` of the source.

    Raises:
        UserError: as `constants`.
    """
    return constants(name, len(source.mean), option) or (source.mean, divisors(source.std))
