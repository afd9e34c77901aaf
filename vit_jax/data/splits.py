"""Split expressions in TFDS's syntax, such as `train[:98%]+test`, parsed without TFDS."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from vit_jax import arguments
from vit_jax.errors import UserError

_PART = re.compile(r"^(?P<split>[\w-]+)(\[(?P<slice>[\d\w%:.-]+)\])?$")
_BOUND = re.compile(r"^((?P<value>-?[\d_.]+)(?P<unit>%|shard)?)?$")


class EmptySplit(UserError):
    """A split expression selects no example; `sizes` are the numbers of examples of the stored splits."""

    sizes: Mapping[str, int]


class UnknownSplit(UserError):
    """A split expression names a split that is not stored: `split`; `sizes` are those of the stored splits."""

    split: str
    sizes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Piece:
    """The examples from `start` to `stop` (exclusive) of one stored split."""

    split: str
    start: int
    stop: int


def parse(expression: str, sizes: Mapping[str, int], notes: Mapping[str, str] | None = None) -> tuple[Piece, ...]:
    """Returns the non-empty pieces that a split expression selects, in order.

    Syntax and rounding are those of https://www.tensorflow.org/datasets/splits: a percentage is rounded to the closest
    example (`round(percent * examples / 100)`), negative bounds count from the end, and `all` selects every split.
    Adjacent pieces are merged: `train[:50%]+train[50%:]` is one piece.

    Args:
        expression: for example `train`, `train[:98%]`, `train[500:]`, `train[:-500]`, `train[10%:20%]+test`.
        sizes: number of examples of each stored split.
        notes: what was left out of each split, for the error of a split that does not exist.

    Raises:
        UserError: the expression is malformed, names an unknown split, exceeds a split, or selects no example.
    """
    pieces: list[Piece] = []
    expression = arguments.text("split", expression)
    for part in re.split(r"\s*\+\s*", expression):
        for piece in _parse_part(part, expression, sizes, notes or {}):
            if piece.start >= piece.stop:
                continue
            if pieces and (pieces[-1].split, pieces[-1].stop) == (piece.split, piece.start):
                pieces[-1] = dataclasses.replace(pieces[-1], stop=piece.stop)
            else:
                pieces.append(piece)
    if not pieces:
        error = EmptySplit(str(_error(expression, "it selects no example", sizes)))
        error.sizes = sizes
        raise error
    return tuple(pieces)


def names(expression: str) -> set[str]:
    """Returns the names of the stored splits in an expression; of a malformed one, those of its well-formed parts."""
    matches = (_PART.match(part) for part in re.split(r"\s*\+\s*", expression))
    return {match["split"] for match in matches if match}


def overlap(one: Sequence[Piece], other: Sequence[Piece]) -> int:
    """Returns the number of different examples that both select."""
    shared = {piece.split for piece in one} & {piece.split for piece in other}
    return sum(len(np.intersect1d(_indices(one, split), _indices(other, split))) for split in shared)


def _indices(pieces: Sequence[Piece], split: str) -> Int[np.ndarray, " examples"]:
    return np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces if piece.split == split])


def _parse_part(part: str, expression: str, sizes: Mapping[str, int], notes: Mapping[str, str]) -> list[Piece]:
    match = _PART.match(part)
    if not match:
        raise _error(expression, f"{part!r} does not have the form train, train[:98%] or train[500:]", sizes)
    split, bounds = match["split"], match["slice"]
    if split == "all" and bounds is None:
        return [Piece(name, 0, size) for name, size in sizes.items()]
    if split not in sizes:
        note = notes.get(split) or notes.get("train")  # where what is outside all splits is named
        reason = f"there is no split {split!r}" + (f" ({note})" if note else "")
        error = UnknownSplit(str(_error(expression, reason, sizes)))
        error.split, error.sizes = split, sizes
        raise error
    size = sizes[split]
    if bounds is None:
        return [Piece(split, 0, size)]
    matches = [_BOUND.match(bound) for bound in bounds.split(":")]
    if len(matches) != 2 or not all(matches) or bounds == ":":
        raise _error(expression, f"[{bounds}] does not have the form [start:stop], in examples or in %", sizes)
    unit = matches[0]["unit"] or matches[1]["unit"]  # as in TFDS, one % applies to both bounds
    try:
        start, stop = (_bound(match["value"], unit, size) for match in matches)
    except ValueError as error:
        raise _error(expression, str(error), sizes) from None
    return [Piece(split, start or 0, size if stop is None else stop)]


def _bound(text: str | None, unit: str | None, size: int) -> int | None:
    """Returns a bound as an index from the start, or None if it is empty; raises ValueError with the reason."""
    if unit == "shard":
        raise ValueError("slices by shard are not supported; use examples or %")
    if text is None:
        return None
    try:
        value = float(text) if unit == "%" else int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if unit == "%":
        if abs(value) > 100:
            raise ValueError(f"{text}% is not between -100% and 100%")
        value = round(value * size / 100.0)
    if abs(value) > size:
        raise ValueError(f"{text} exceeds the {size:,} examples")
    return value + size if value < 0 else value


def _error(expression: str, reason: str, sizes: Mapping[str, int]) -> UserError:
    known = ", ".join(f"{name} ({size:,} examples)" for name, size in sizes.items())
    return UserError(
        f"split {expression!r}: {reason}\n  allowed: {known}, and slices such as train[:98%] or train[500:]"
    )
