"""What a trained model takes and returns, stored in its run directory, so that it works without its dataset."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from vit_jax import atomic
from vit_jax.checkpoint.run_files import DATA
from vit_jax.errors import UserError, one_line


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
        found = json.loads(path.read_text())
        classes = {kind: tuple(map(str, names)) for kind, names in found["classes"].items()}
        height, width, channels = map(int, found["image_shape"])
        mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
        if not len(mean) == len(std) == channels:
            raise ValueError(f"mean and std must have {channels} values, one per channel")
        return InputSpec(str(found["set"]), (height, width, channels), mean, std, classes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read: {one_line(error)}\n  remove it: its content is then taken from the dataset"
        ) from error
