"""Arguments of public functions: Python's types, and those of NumPy and JAX that mean the same, or an error."""

import enum
import math
import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vit_jax.errors import UserError, one_line


def shown(value: Any) -> str:
    """Returns a value as messages show it: in one line, and an array by its shape and dtype."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        return f"an array of {value.dtype} with shape {list(value.shape)}"
    try:
        return one_line(repr(value), 80)
    except ValueError:  # Python converts no integer of thousands of digits
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1} or more"


def plain(value: Any) -> Any:
    """Returns a value with Python's types in place of those of NumPy, JAX, `enum` and `pathlib`; a dtype by its name.

    Values of other types are returned unchanged.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, list | tuple | range):
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if hasattr(value, "tolist") and isinstance(getattr(value, "dtype", None), np.dtype):  # an array or a scalar
        return value.tolist()
    is_scalar_type = isinstance(value, type) and (
        issubclass(value, np.generic) or isinstance(getattr(value, "dtype", None), np.dtype)
    )
    return np.dtype(value).name if is_scalar_type or isinstance(value, np.dtype) else value


def integer(name: str, value: Any, minimum: int | None = 1, words: tuple[Any, ...] = ()) -> Any:
    """Returns an integer of Python's for one of Python, NumPy or JAX; one of `words` is returned unchanged.

    Raises:
        UserError: it is neither, or below the minimum.
    """
    if any(value is word or (isinstance(value, str) and value == word) for word in words):
        return value
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (minimum is not None and number < minimum):
        kind = "an integer" if minimum is None else f"an integer of at least {minimum}"
        more = "".join(f", or {word!r}" for word in words)
        raise UserError(f"{name} is {shown(value)}\n  allowed: {kind}{more}")
    return number


def size(name: str, value: Any) -> int | tuple[int, int]:
    """Returns pixels, an integer or (height, width), with integers of Python's.

    Raises:
        UserError: it is neither.
    """
    is_pair = isinstance(value, list | tuple | np.ndarray) and np.ndim(value) == 1 and len(value) == 2
    try:
        sides = tuple(integer(name, side) for side in (value if is_pair else [value]))
    except UserError:
        text = f"{name} is {shown(value)}\n  allowed: an integer of at least 1, or two such as (height, width)"
        raise UserError(text) from None
    return sides if is_pair else sides[0]


def pair(name: str, value: Any) -> tuple[int, int]:
    """Returns (rows, columns) or (height, width), also of one integer for both.

    Raises:
        UserError: it is neither an integer nor two of them.
    """
    sides = size(name, value)
    return (sides, sides) if isinstance(sides, int) else sides


def number(name: str, value: Any, minimum: float = 0.0) -> float:
    """Returns a finite float for a number of Python, NumPy or JAX.

    Raises:
        UserError: it is none, or below the minimum.
    """
    try:
        result = math.nan if isinstance(value, bool | np.bool_ | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not (math.isfinite(result) and result >= minimum):
        raise UserError(f"{name} is {shown(value)}\n  allowed: a number of at least {minimum:g}")
    return result


def boolean(name: str, value: Any) -> bool:
    """Returns a boolean of Python's for one of Python or NumPy.

    Raises:
        UserError: it is none; 0 and 1 are not taken for booleans.
    """
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} is {shown(value)}\n  allowed: True or False")
    return bool(value)


def text(name: str, value: Any) -> str:
    """Returns a string.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} is {shown(value)}\n  allowed: a string")
    return str(value)


def classes(name: str, value: Any) -> int | dict[str, int] | None:
    """Returns numbers of classes: an integer, a mapping from names to integers, or None.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(value, Mapping):
        return {text(f"a name in {name}", key): integer(f"{name}[{key!r}]", count) for key, count in value.items()}
    try:
        return integer(name, value, words=(None,))
    except UserError:
        allowed = "an integer of at least 1, a mapping from names to such integers, or None"
        raise UserError(f"{name} is {shown(value)}\n  allowed: {allowed}") from None


def path(name: str, value: Any) -> str:
    """Returns the text of a path: str, bytes or os.PathLike.

    Raises:
        UserError: it is none of these.
    """
    try:
        return os.fsdecode(value)
    except TypeError:
        raise UserError(f"{name} is {shown(value)}\n  allowed: a path, as str, bytes or os.PathLike") from None


def names(name: str, value: Any) -> tuple[str, ...]:
    """Returns several names as a tuple: of a list, tuple, array or generator, not one text.

    Raises:
        UserError: it is none of these, or something in it is no text.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        found = tuple(value)
        if all(isinstance(item, str) for item in found):
            return tuple(map(str, found))
        value = next(item for item in found if not isinstance(item, str))
        raise UserError(f"{name} has {shown(value)}\n  allowed: only str, for example [str(name) for name in {name}]")
    raise UserError(f"{name} is {shown(value)}\n  allowed: a list or tuple of str")


def matrix(name: str, value: Any) -> np.ndarray:
    """Returns features [examples, width] as a NumPy array of floats; arrays of NumPy are not copied.

    Raises:
        UserError: it has no two axes, or something in it is no number.
    """
    array = _array(name, value, "numbers [examples, width]")
    if array.ndim != 2 or 0 in array.shape or not (array.dtype.kind in "fiu" or array.dtype.name == "bfloat16"):
        raise UserError(f"{name} is {shown(array)}\n  allowed: numbers [examples, width], neither of them 0")
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def mask(name: str, value: Any, examples: int) -> np.ndarray:
    """Returns a boolean mask [examples] as a NumPy array.

    Raises:
        UserError: it is not boolean, such as indices, or there is not one value per example.
    """
    array = _array(name, value, "booleans [examples]")
    if array.dtype != bool or array.shape != (examples,):
        raise UserError(f"{name} is {shown(array)}\n  allowed: {examples} booleans, one per example")
    return array


def indices(name: str, value: Any, count: int) -> np.ndarray:
    """Returns indices as a NumPy array of np.intp.

    Raises:
        UserError: they are no integers, such as a mask, or out of range.
    """
    array = _array(name, value, "integers")
    if array.size and (array.dtype.kind not in "iu" or array.min() < -count or array.max() >= count):
        raise UserError(
            f"{name} is {shown(array)}\n  allowed: integers from 0 to {count - 1}; of a mask, pass np.flatnonzero(mask)"
        )
    return array.astype(np.intp)


def labels(name: str, value: Any, examples: int | None = None, classes: int | None = None) -> np.ndarray:
    """Returns labels [examples] as a NumPy array of integers.

    Args:
        name: of the argument.
        value: an array or a list.
        examples: number of examples; None for any.
        classes: number of classes; None for any.

    Raises:
        UserError: they are no integers in one axis, there are not as many as examples, or one is no class.
    """
    array = _array(name, value, "integers [examples]")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        way_out = f"np.argmax({name}, axis=1)" if array.ndim == 2 else f"np.asarray({name}, int)"
        raise UserError(f"{name} is {shown(array)}\n  allowed: integers [examples], one per example, such as {way_out}")
    if examples is not None and len(array) != examples:
        raise UserError(f"{name} has {len(array)} entries for {examples} examples\n  allowed: one per example")
    if len(array) and (array.min() < 0 or (classes is not None and array.max() >= classes)):
        wrong = array.min() if array.min() < 0 else array.max()
        upper = "" if classes is None else f" to {classes - 1}"
        raise UserError(f"{name} has the label {wrong}\n  allowed: integers from 0{upper}")
    return array


def _array(name: str, value: Any, allowed: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # rows of different lengths
        array = np.empty((), object)
    if array.dtype == object or array.dtype.kind in "USMm":
        raise UserError(f"{name} is {shown(value)}\n  allowed: an array or a list of {allowed}")
    return array
