"""What images are normalised by: the mean and standard deviation of each channel, by the names that options use."""

from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

# Of ImageNet's red, green and blue, as most of its published models have them.
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONSTANTS = ("half", "imagenet")
NAMES = ("set", *CONSTANTS)  # of the data set's own train split; 0.5 and 0.5; ImageNet's
OPTION = "config.data.normalization"


def constants(name: str, channels: int, option: str = OPTION) -> Statistics | None:
    """Mean and standard deviation of pixels in [0, 1], where the name says them; None for 'set', which needs a source.

    Args:
        name: one of `NAMES`.
        channels: of the images.
        option: where the name was given, for messages.

    Raises:
        UserError: there is no such name, or it is of three channels and the images have others.
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
    """As `constants`; for 'set' the mean and standard deviation of the source. Of stored features, nothing.

    Raises:
        UserError: as `constants`.
    """
    if not source.mean:  # what was normalised are the images that the features are of
        return source.mean, source.std
    return constants(name, len(source.mean), option) or (source.mean, source.std)
