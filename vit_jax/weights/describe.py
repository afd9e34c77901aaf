"""The description of a file of weights, made from names and shapes alone: its model, and rules for its arrays."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vit_jax.data.normalization import Statistics
from vit_jax.errors import UserError, few
from vit_jax.models.vit import VisionTransformer, pixels_per_patch
from vit_jax.weights import other_arrays
from vit_jax.weights.rules import Rule

OVERRIDE = "override"
SHOWN = 6

# Heads of published models have 64 channels, except at these widths: H, g, G and So400m.
HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclasses.dataclass(frozen=True)
class Decision:
    """An option of the model that the arrays do not determine: its value, and where that comes from."""

    field: str
    value: Any
    source: str


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file contains.

    Attributes:
        label: the naming convention, in words.
        model: the model.
        channels: number of channels of its images.
        grid: rows and columns of patches of its position embedding; None if it has none.
        rules: how its arrays become the model's parameters.
        ignored: names of other arrays, each with the reason for which it is ignored.
        decisions: options of the model that the arrays do not determine.
        notes: what else a user should know.
        head_refusal: why the file's head cannot be loaded, if so; the model then has no head.
        head_name: name of its only head in a model with several, if known.
        normalization: of the images it was trained on, a value of `config.data.normalization`.
        statistics: mean and std of each channel of these images; None if unknown, for a run without its dataset.
        assumed: a line on what mean and std were assumed and why, if they are not recorded; else ''.
        class_names: of its only head, if they are known.
        recorded_size: height and width of its images, if recorded beside the parameters.
        evaluation: other recorded options of evaluation (`preprocessing.EVALUATION`), such as 'crop_pct' and 'loss'.
        zeros: paths of parameters that are zero, as the file's layers have none, each with the reason.
        resampling: how position embeddings are resampled for other images, one of `resampling.METHODS`: as by the
            library that the file is for.
    """

    label: str
    model: VisionTransformer
    channels: int
    grid: tuple[int, int] | None
    rules: tuple[Rule, ...]
    ignored: Mapping[str, str]
    decisions: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = ()
    head_refusal: str | None = None
    head_name: str | None = None
    normalization: str = "half"
    statistics: Statistics | None = None
    assumed: str = ""
    class_names: tuple[str, ...] | None = None
    recorded_size: tuple[int, int] | None = None
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zeros: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resampling: str = "bilinear"

    def image_size(self) -> tuple[int, int] | None:
        """Height and width of its images: recorded, or those that the position embedding is for; None if unknown."""
        if self.grid is None or self.recorded_size is not None:
            return self.recorded_size
        pixels = pixels_per_patch(self.model)
        return self.grid[0] * pixels, self.grid[1] * pixels


class Names:
    """The shapes of the arrays of a file whose names start with a prefix, by the rest of their names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], prefix: str, label: str):
        self.prefix, self.label = prefix, label
        self._shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def any(self, pattern: str) -> bool:
        """Whether the pattern matches the start of a name."""
        return any(re.match(pattern, name) for name in self._shapes)

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group matches at the start of a name.

        Raises:
            UserError: the number is larger than that of the arrays.
        """
        found = ((re.match(pattern, name), name) for name in self._shapes)
        count, name = max(((int(match[1][:9]) + 1, name) for match, name in found if match), default=(0, ""))
        # A file must not make us generate rules for billions of blocks.
        if count > len(self._shapes) + 1:
            raise UserError(
                f"{self.prefix}{name} has too large a number: the file has only {len(self._shapes)} arrays\n"
                "  use a complete file of the model"
            )
        return count

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of an array that exists."""
        return self._shapes[name]

    def axes(self, name: str) -> int:
        """The number of axes of an array."""
        return len(self._shapes[name])

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of an array.

        Raises:
            UserError: the array does not exist, or has another number of axes.
        """
        if name not in self._shapes:
            raise UserError(
                f"{self.prefix}{name} is missing: the file's other names follow {self.label}"
                f"{other_arrays.hint([name], self._shapes)}\n"
                "  use a complete file of the model"
            )
        shape = self._shapes[name]
        if len(shape) != axes or 0 in shape:
            raise UserError(
                f"{self.prefix}{name} has shape {list(shape)}, but {self.label} needs {axes} axes, none of size 0\n"
                "  use a complete file of the model"
            )
        return shape


def odd_head(names: Names, start: str, bias: bool = True) -> str | None:
    """Returns why a head is not read: it is something else than one linear layer; None if it is one, or there is none.

    Args:
        names: of the file.
        start: of the head's names: 'head.'.
        bias: whether it must have a bias.
    """
    own = sorted(name for name in names if name.startswith(start))
    layer = [f"{start}weight"] if own == [f"{start}weight"] and not bias else [f"{start}bias", f"{start}weight"]
    plain = own == layer and [names.axes(name) for name in own] == [1, 2][-len(own) :]
    if not own or (plain and 0 not in names.shape_of(own[-1])):
        return None
    shown = few(f"{name} {list(names.shape_of(name))}" for name in own)
    return f"its head is not one linear layer with a bias ({shown}), which is not supported"


def check_names(
    file: Iterable[str], rules: Iterable[Rule], ignored: Mapping[str, str], known: Iterable[str], label: str
) -> None:
    """Checks that every array of the file has a rule or a reason to be ignored, and every rule its arrays.

    Args:
        file: names of the file's arrays.
        rules: the rules.
        ignored: names of ignored arrays.
        known: other names of this kind of file, to recognise a misspelt one.
        label: the naming convention, in words.

    Raises:
        UserError: arrays are missing or left over; names them, and the pairs that look renamed.
    """
    file, wanted = set(file), [name for rule in rules for name in rule.names]
    missing = [name for name in wanted if name not in file]
    left = sorted(file - set(wanted) - set(ignored))
    if not missing and not left:
        return
    parts = [f"missing: {few(missing, SHOWN)}"] if missing else []
    parts += [f"unexpected: {few(left, SHOWN)}"] if left else []
    look = other_arrays.hint(missing, left, [name for name in known if name not in file])
    raise UserError(f"not a complete model in {label}: {'; '.join(parts)}{look}\n  use a complete file of one model")


class Choices:
    """Decides options that the arrays do not determine, and records where each value comes from."""

    def __init__(self, overrides: Mapping[str, Any]):
        self.overrides, self.made = overrides, []

    def decide(
        self, field: str, convention: Any, recorded: Any = None, by: str = "config.json", family: str = ""
    ) -> Any:
        """Returns the user's override, else the value in the file's config, else the convention of the family."""
        if field in self.overrides:
            value, source = self.overrides[field], OVERRIDE
        elif recorded is not None:
            value, source = recorded, by
        else:
            value, source = convention, f"convention of {family}"
        self.made.append(Decision(field, value, source))
        return value

    def heads(
        self, width: int, recorded: int | None, family: str, by: str = "config.json", usual: int | None = None
    ) -> int:
        """The number of attention heads; by default `usual`, else with 64 channels each.

        Raises:
            UserError: the number is unknown and the width is not a multiple of 64; or it does not divide the width.
        """
        usual = usual or HEADS_OF_WIDTH.get(width, width // 64 if width % 64 == 0 else None)
        if "heads_otherwise" in self.overrides:
            usual, family = self.overrides["heads_otherwise"], "the model that it is loaded into"
        heads = self.decide("heads", usual, recorded, by, family)
        if heads is None:
            raise UserError(
                f"the file does not determine how many attention heads share its width of {width}\n"
                "  pass heads=N, or put the model's config.json next to the file"
            )
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise UserError(
                f"heads is {heads!r}, which does not divide the file's width of {width}\n"
                "  allowed: a divisor of the width"
            )
        return heads

    def grid(self, rows: int, patch_size: int, recorded: Any = None) -> tuple[int, int]:
        """Rows and columns of patches of a position embedding: from the config's image size, else a square.

        Args:
            rows: number of rows of the table.
            patch_size: height and width of a patch in pixels of the image.
            recorded: image size in the config, if any.

        Raises:
            UserError: `rows` is not a square, and neither config nor the given image size determines the grid.
        """
        side = math.isqrt(max(rows, 0))
        guesses = [(hint(recorded, patch_size), "config.json")]
        guesses += [((side, side), "a square, from the number of rows")] if rows > 0 and side * side == rows else []
        guesses += [(hint(self.overrides.get("image_size"), patch_size), OVERRIDE)]
        for grid, source in guesses:
            if grid is not None and grid[0] * grid[1] == rows:
                self.made.append(Decision("grid", f"{grid[0]}x{grid[1]}", source))
                return grid
        raise UserError(
            f"the position embedding has {rows} patches, which do not form a square\n"
            "  pass image_size=(height, width) of the file, or put the model's config.json next to the file"
        )


def config_value(config: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value of a config.json; None if it has none.

    Raises:
        UserError: the value has another type.
    """
    value = config.get(key)
    kinds = (int, float) if kind is float else kind
    if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool)):
        raise UserError(
            f"config.json has {key} {value!r}: it must be of type {kind.__name__}\n  correct it, or remove config.json"
        )
    return value


def check_config(values: Mapping[str, tuple[Any, Any]]) -> None:
    """Checks that a config.json belongs to the file next to it.

    Args:
        values: for each key, the value in the config and that of the file.

    Raises:
        UserError: they differ; names the first difference.
    """
    for key, (recorded, actual) in values.items():
        if recorded is not None and recorded != actual:
            raise UserError(
                f"config.json is of another model: it has {key} {recorded!r}, but the file has {actual!r}\n"
                "  put the config.json of this model next to the file, or remove it"
            )


def pair(size: Any) -> tuple[int, int] | None:
    """(height, width) from an int or a pair; None for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int for side in size):
        return tuple(size)
    return None


def hint(size: Any, patch_size: int) -> tuple[int, int] | None:
    """The grid of patches of an image size; None if it is unknown or the patch size does not divide it."""
    size = pair(size)
    if size is None or size[0] % patch_size or size[1] % patch_size:
        return None
    return size[0] // patch_size, size[1] // patch_size
