"""What a trained model takes and gives, written beside it: so that it can be used where its data set is not."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from vit_jax import atomic
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

FILE = "data.json"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The images that a model was trained on, and the names of its classes.

    Attributes:
        set: the data set's name.
        image_shape: height, width and channels.
        mean, std: of each channel, of pixels scaled to [0, 1], that images are normalised by.
        classes: the class names of each kind of label, the first one first.
    """

    set: str
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Mapping[str, tuple[str, ...]]


def of_source(source: Source, mean: tuple[float, ...], std: tuple[float, ...]) -> Inputs:
    """What a source of images has, and what they are normalised by."""
    names = {source.label: source.class_names, **{kind: one.class_names for kind, one in source.others.items()}}
    return Inputs(source.name, tuple(source.images.shape[1:]), tuple(mean), tuple(std), names)


def write(folder: Path, source: Source, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Writes data.json into a workdir; nothing where the source is stored features, which have no mean and std.

    Raises:
        UserError: it cannot be written.
    """
    if not source.mean:
        return
    try:
        atomic.write_json(folder / FILE, dataclasses.asdict(of_source(source, mean, std)))
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}\n  make room there") from error


def read(folder: Path) -> Inputs | None:
    """The data.json of a workdir, or None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found = json.loads((folder / FILE).read_text())
        classes = {kind: tuple(map(str, names)) for kind, names in found["classes"].items()}
        height, width, channels = map(int, found["image_shape"])
        mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
        if not len(mean) == len(std) == channels:
            raise ValueError("mean and std are not of its channels")
        return Inputs(str(found["set"]), (height, width, channels), mean, std, classes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / FILE} cannot be read: {' '.join(str(error).split())}\n  remove it: it is then made of the data"
        ) from error
