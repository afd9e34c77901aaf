"""What a file of weights is found to be, before any of its arrays is read: a model, rules, and what was decided."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.resnet import stem_output
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights.rules import Rule

GIVEN = "given"
SHOWN = 6

# Heads are 64 channels wide, but in these widths of published models: H, g, G and So400m.
HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclasses.dataclass(frozen=True)
class Decision:
    """A field of the model that the arrays do not tell: its value, and who said so."""

    field: str
    value: Any
    source: str


@dataclasses.dataclass(frozen=True)
class Description:
    """A file as it was understood.

    Attributes:
        label: whose naming it is, in words.
        model: the model that the file is of.
        channels: of its images.
        grid: rows and columns of patches of its table of positions; None where it has none.
        rules: from its arrays to the model's parameters.
        ignored: names of other arrays, and why each is left alone.
        known: names that a file of this kind may have besides, for a hint where one is misspelt.
        decisions: what the arrays did not tell.
        notes: what else a user should know.
        head_refusal: why the file's own head cannot be had, where it has one that cannot; the model then has none.
        head_name: what its only head classifies, where that is known: the name it has beside others.
        normalization: of the images it was trained on, as `config.data.normalization` names it; of files of others,
            what Google's and most of timm's had.
    """

    label: str
    model: VisionTransformer
    channels: int
    grid: tuple[int, int] | None
    rules: tuple[Rule, ...]
    ignored: Mapping[str, str]
    known: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = ()
    head_refusal: str | None = None
    head_name: str | None = None
    normalization: str = "half"

    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the table of positions is for."""
        if self.grid is None:
            return None
        pixels = pixels_per_patch(self.model)
        return self.grid[0] * pixels, self.grid[1] * pixels


class Names:
    """The arrays of a file below a prefix, by the rest of their names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], prefix: str, label: str):
        self.prefix, self.label = prefix, label
        self._shapes = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def any(self, pattern: str) -> bool:
        """Whether a name begins with what the pattern matches."""
        return any(re.match(pattern, name) for name in self._shapes)

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group matches at the beginning of a name.

        Raises:
            UserError: there are not so many arrays.
        """
        found = ((re.match(pattern, name), name) for name in self._shapes)
        count, name = max(((int(match[1][:9]) + 1, name) for match, name in found if match), default=(0, ""))
        # Whoever numbers a block by the billion shall not make us look for all before it.
        if count > len(self._shapes) + 1:
            raise UserError(f"{self.prefix}{name} is numbered past all the {len(self._shapes)} arrays that there are")
        return count

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def axes(self, name: str) -> int:
        """The number of axes of an array that there is."""
        return len(self._shapes[name])

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of an array.

        Raises:
            UserError: there is no such array, or it has not so many axes.
        """
        if name not in self._shapes:
            raise UserError(
                f"{self.prefix}{name} is missing: the file's other names are those of {self.label}"
                f"{renamed([name], self._shapes)}"
            )
        shape = self._shapes[name]
        if len(shape) != axes or 0 in shape:
            raise UserError(
                f"{self.prefix}{name} has shape {list(shape)}, where {self.label} has {axes} axes, none empty"
            )
        return shape


def renamed(missing: Iterable[str], names: Iterable[str]) -> str:
    """A hint, or nothing: which of the names looks like a missing one."""
    pairs = [(name, difflib.get_close_matches(name, list(names), n=1, cutoff=0.85)) for name in missing]
    pairs = [(name, near[0]) for name, near in pairs if near and near[0] != name]
    return "".join(f"\n  {near} looks like {name} renamed" for name, near in pairs[:1])


def few(names: Iterable[str]) -> str:
    """Names for a message: the first of them and how many more."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_names(
    file: Iterable[str], rules: Iterable[Rule], ignored: Mapping[str, str], known: Iterable[str], label: str
) -> None:
    """Sees that every array of the file has its rule or its reason, and every rule its arrays.

    Raises:
        UserError: some are missing or left over; they are named, and what looks renamed is paired.
    """
    file, wanted = set(file), [name for rule in rules for name in rule.names]
    missing = [name for name in wanted if name not in file]
    left = sorted(file - set(wanted) - set(ignored))
    if not missing and not left:
        return
    parts = [f"missing: {few(missing)}"] if missing else []
    parts += [f"left over: {few(left)}"] if left else []
    look = renamed(missing, left) or renamed_back(left, [*known, *wanted])
    raise UserError(f"no whole model in {label}: {'; '.join(parts)}{look}")


def renamed_back(left: Iterable[str], known: Iterable[str]) -> str:
    """The same hint, from what is left over."""
    known = list(known)
    for name in left:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        if near:
            return f"\n  {name} looks like {near[0]} renamed"
    return "\n  such parameters have no place in this model: nothing was loaded"


class Choices:
    """Fields that the arrays do not tell, decided one by one, each with who decided."""

    def __init__(self, given: Mapping[str, Any]):
        self.given, self.made = given, []

    def decide(self, field: str, convention: Any, said: Any = None, by: str = "config.json", family: str = "") -> Any:
        """What was given, else what the file's config says, else the family's convention."""
        if field in self.given:
            value, source = self.given[field], GIVEN
        elif said is not None:
            value, source = said, by
        else:
            value, source = convention, f"convention of {family}"
        self.made.append(Decision(field, value, source))
        return value

    def heads(self, width: int, said: int | None, family: str, by: str = "config.json") -> int:
        """Attention heads, of 64 channels each where nobody says otherwise.

        Raises:
            UserError: nobody says, and the width is no multiple of 64; or they do not divide it.
        """
        usual = HEADS_OF_WIDTH.get(width, width // 64 if width % 64 == 0 else None)
        if "heads_otherwise" in self.given:
            usual, family = self.given["heads_otherwise"], "the model that it is loaded into"
        heads = self.decide("heads", usual, said, by, family)
        if heads is None:
            raise UserError(
                f"the file does not tell how many attention heads share its width of {width}\n"
                "  give heads=N, or put the model's config.json beside the file"
            )
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise UserError(f"heads is {heads!r}, which does not divide the file's width of {width}")
        return heads

    def grid(self, rows: int, patch_size: int, said: Any = None) -> tuple[int, int]:
        """Rows and columns of a table of so many patches: as the config's image size has it, else a square.

        Args:
            rows: of the table.
            patch_size: pixels of an image that a patch stands for.
            said: image size in the config, if any.

        Raises:
            UserError: it is no square, and neither config nor the given image size says what it is.
        """
        side = math.isqrt(max(rows, 0))
        guesses = [(hint(said, patch_size), "config.json")]
        guesses += [((side, side), "a square, for the number of its rows")] if rows > 0 and side * side == rows else []
        guesses += [(hint(self.given.get("image_size"), patch_size), GIVEN)]
        for grid, source in guesses:
            if grid is not None and grid[0] * grid[1] == rows:
                self.made.append(Decision("grid", f"{grid[0]}x{grid[1]}", source))
                return grid
        raise UserError(
            f"the table of positions has {rows} patches, which make no square\n"
            "  give image_size=(height, width) as the file has it, or put the model's config.json beside the file"
        )


def pixels_per_patch(model: VisionTransformer) -> int:
    """Height and width, in pixels of the image, of what a patch stands for: with a stem more than its own."""
    if model.stem is None:
        return model.patch_size
    side = 2**12  # of an image that every stem shrinks evenly
    return model.patch_size * side // stem_output(model.stem, model.stem_width, (side, side))[0]


def said(config: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value of a config.json; None where it says none.

    Raises:
        UserError: it is not of that kind.
    """
    value = config.get(key)
    kinds = (int, float) if kind is float else kind
    if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool)):
        raise UserError(f"config.json says {key} {value!r}, where {kind.__name__} is meant")
    return value


def check_config(told: Mapping[str, tuple[Any, Any]]) -> None:
    """Sees that a config.json is of the file beside it: what it says of each of its keys, and what the file has.

    Raises:
        UserError: they differ; the first that does is named.
    """
    for key, (says, has) in told.items():
        if says is not None and says != has:
            raise UserError(f"config.json is of another model: it says {key} {says!r}, the file has {has!r}")


def pair(size: Any) -> tuple[int, int] | None:
    """(height, width) of an int, or of a pair in a config; None of anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int for side in size):
        return tuple(size)
    return None


def hint(size: Any, patch_size: int) -> tuple[int, int] | None:
    """The grid of an image size, where the patch divides it."""
    size = pair(size)
    if size is None or size[0] % patch_size or size[1] % patch_size:
        return None
    return size[0] // patch_size, size[1] // patch_size
