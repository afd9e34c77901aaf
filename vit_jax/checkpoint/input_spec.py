"""What a trained model takes and returns, stored in its run directory, so that it works without its dataset."""

import dataclasses
import json
import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax import atomic
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.run_files import DATA
from vit_jax.errors import UserError, one_line

MAX_VALUES = 2**30  # of an image; more is no image that a model was trained on


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """The images that a model was trained on, and its class names.

    Attributes:
        set: name of the dataset.
        image_shape: height, width, channels.
        mean, std: per channel, of pixels scaled to [0, 1]; images are normalized with them.
        classes: class names of each kind of label, by the name of the kind; the primary kind first.
    """

    set: str
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Mapping[str, tuple[str, ...]]


def write(workdir: Path, spec: InputSpec) -> None:
    """Writes data.json into a run directory.

    Raises:
        UserError: it cannot be written.
    """
    try:
        atomic.write_json(workdir / DATA, dataclasses.asdict(spec))
    except OSError as error:
        raise UserError(
            f"{workdir / DATA} cannot be written: {error.strerror}\n  free disk space or change its permissions"
        ) from error


def read(workdir: Path) -> InputSpec | None:
    """Returns the content of data.json in a run directory; None if there is none.

    Raises:
        UserError: data.json cannot be read.
    """
    path = workdir / DATA
    try:
        return from_dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise run_files.unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(
            f"{path} cannot be read: {one_line(error)}\n  remove it: its content is then taken from the dataset"
        ) from error


def from_dict(found: Mapping[str, Any]) -> InputSpec:
    """Returns the spec of which `dataclasses.asdict` returned this dictionary.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: a value is missing or not valid.
    """
    classes = {kind: tuple(map(str, names)) for kind, names in found["classes"].items()}
    height, width, channels = map(int, found["image_shape"])
    mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
    if min(height, width, channels) < 1 or height * width * channels > MAX_VALUES:
        raise ValueError(f"image_shape is {height} x {width} x {channels}")
    is_valid = all(map(math.isfinite, mean)) and all(0 <= value < math.inf for value in std)
    if not len(mean) == len(std) == channels or not is_valid:
        raise ValueError(f"mean and std must have {channels} finite values, one per channel")
    return InputSpec(str(found["set"]), (height, width, channels), mean, std, classes)


def check_classes(workdir: Path, classes: Mapping[str, tuple[str, ...]]) -> None:
    """Checks that data has the classes that the run was trained with, in the same order; any Unicode form will do.

    Raises:
        UserError: it has others.
    """
    trained = read(workdir)
    for kind, names in classes.items() if trained is not None else ():
        before = trained.classes.get(kind, names)
        differ = [pair for pair in zip(before, names, strict=False) if len({_form(name) for name in pair}) > 1]
        if differ or len(before) != len(names):
            example = f", for example {differ[0][1]!r} in place of {differ[0][0]!r}" if differ else ""
            raise UserError(
                f"{workdir} was trained with other classes: {len(before)}, the data now has {len(names)}{example}\n"
                "  name the classes as before (data.json of the run), use another data directory, "
                "or train in another --workdir"
            )


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)
