"""What an option is: default, kind, allowed values, documentation, resume policy, and what it depends on."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vit_jax.arguments import plain, shown
from vit_jax.errors import UserError

# May an option differ when a run resumes? "fixed": no, the run directory is refused. "changeable": yes, while steps are
# left to train with it; the change is printed and recorded. "free": yes, silently, since no result depends on it.
FIXED, CHANGEABLE, FREE = RESUME = ("fixed", "changeable", "free")
MAX_SEED = 2**31 - 1
MAX_INTEGER = 2**31 - 1  # steps and indices are int32 on the device
MAX_NUMBER = float(np.finfo(np.float32).max)


def _items(value: Any, separator: str = ",") -> tuple[Any, ...]:
    """Returns the elements of a list option, given as text ('a,b'; 'a,' has one) or as a list or tuple."""
    if isinstance(value, str):
        value = [item.strip() for item in value.strip().removesuffix(separator).split(separator)]
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(value)
    return tuple(value)


def _whole(item: Any) -> int:
    if isinstance(item, str) and item.isascii() and item.isdigit():
        return int(item)
    if isinstance(item, int) and not isinstance(item, bool):
        return item
    raise ValueError(item)


def _to_names(value: Any) -> tuple[str, ...]:
    names = _items(value)
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(value)
    return names


def _to_weights(value: Any) -> tuple[tuple[str, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else _items(value)
    weights = []
    for pair in pairs:
        name, number = _items(pair, "=")
        weight = float(number)
        if not isinstance(name, str) or not name or not 0 <= weight < math.inf:
            raise ValueError(value)
        weights.append((name, weight))
    return tuple(weights)


def _to_steps(value: Any) -> tuple[int, int]:
    start, stop = map(_whole, _items(value, ":"))
    if not 0 <= start < stop:
        raise ValueError(value)
    return start, stop


def _to_seeds(value: Any) -> int | tuple[int, ...]:
    if not isinstance(value, (list, tuple)) and "," not in str(value):
        count = _whole(value.strip() if isinstance(value, str) else value)
        if not 1 <= count <= MAX_SEED + 1:
            raise ValueError(value)
        return count
    seeds = tuple(map(_whole, _items(value)))
    if len(set(seeds)) < len(seeds) or not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise ValueError(value)
    return seeds


def _to_statistics(value: Any) -> str:
    mean, std = (tuple(map(float, _items(part))) for part in _items(value, "/"))
    if len(mean) != len(std) or not all(map(math.isfinite, mean)) or not all(0 < one < math.inf for one in std):
        raise ValueError(value)
    return "/".join(",".join(map(repr, part)) for part in (mean, std))


def _seeds_text(value: int | tuple[int, ...]) -> str:
    return str(value) if isinstance(value, int) else ",".join(map(str, value)) + ("," if len(value) == 1 else "")


@dataclasses.dataclass(frozen=True)
class ListKind:
    """The kind of an option that is a list.

    Attributes:
        allowed: the syntax, for messages.
        convert: the value of a text or a list; raises ValueError or TypeError.
        text: a value as it is written on the command line.
    """

    allowed: str
    convert: Any
    text: Any


NAMES = ListKind("names, separated by commas", _to_names, ",".join)
WEIGHTS = ListKind(
    "weights of at least 0 by name, for example label=1,coarse_label=0.5",
    _to_weights,
    lambda value: ",".join(f"{name}={weight:g}" for name, weight in value),
)
STEPS = ListKind("START:STOP, for example 100:110 for ten steps", _to_steps, lambda value: "{}:{}".format(*value))
SEEDS = ListKind(f"a number of seeds (5), or different seeds from 0 to {MAX_SEED} (0,3,7)", _to_seeds, _seeds_text)
STATISTICS = ListKind("MEAN/STD of each channel, as 0.5,0.5,0.5/0.25,0.25,0.25", _to_statistics, str)

Kind = type | ListKind
_KINDS = {int: "an integer", float: "a number", str: "a string"}


class When:
    """A condition on another option: it has one of `values`, or lies `above` a number, or is not None, or is another.

    Args:
        option: 'section.key'.
        values: the values under which the condition holds.
        above: it holds for larger numbers.
        is_set: it holds for anything but None.
        other_than: it holds for anything but these.
    """

    def __init__(
        self,
        option: str,
        *values: Any,
        above: float | None = None,
        is_set: bool = False,
        other_than: tuple[Any, ...] = (),
    ) -> None:
        self.option, self.values, self.above, self.is_set, self.other_than = option, values, above, is_set, other_than

    def holds(self, config: ConfigDict) -> bool:
        """Returns whether it holds in a config."""
        value = _value(config, self.option)
        if self.above is not None:
            return value is not None and value > self.above
        if self.is_set:
            return value is not None
        return value not in self.other_than if self.other_than else value in self.values

    def describe(self) -> str:
        """Returns 'optimizer.name='adamw' or 'adam''."""
        if self.above is not None:
            return f"{self.option} above {self.above:g}"
        if self.is_set:
            return f"{self.option} set"
        if self.other_than:
            return f"{self.option} other than {' or '.join(map(repr, self.other_than))}"
        return f"{self.option}={' or '.join(map(repr, self.values))}"

    def failing(self, config: ConfigDict) -> str:
        """Returns the setting because of which it does not hold."""
        return f"{self.option}={shown(_value(config, self.option))}"


class AnyOf:
    """A condition that holds where one of several does."""

    def __init__(self, *conditions: When) -> None:
        self.conditions = conditions

    def holds(self, config: ConfigDict) -> bool:
        """Returns whether it holds in a config."""
        return any(condition.holds(config) for condition in self.conditions)

    def describe(self) -> str:
        """Returns the conditions with 'or' between them."""
        return " or ".join(condition.describe() for condition in self.conditions)

    def failing(self, config: ConfigDict) -> str:
        """Returns the settings because of which it does not hold."""
        return " and ".join(condition.failing(config) for condition in self.conditions)


def _value(config: ConfigDict, name: str) -> Any:
    section, key = name.split(".")
    return config[section][key]


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a config.

    Attributes:
        default: its value where a config does not set it. None is then allowed, and means "not set".
        kind: bool, int, float, str, or the `ListKind` of a list.
        doc: one line on what it does, with the unit.
        min: smallest number allowed.
        max: largest number allowed.
        above: numbers must be larger than this.
        below: numbers must be smaller than this.
        choices: the values allowed, where there are few.
        words: strings allowed in addition to the kind.
        optional: None is allowed although it is not the default.
        resume: "fixed", "changeable" or "free", see `RESUME`.
        read_by: the conditions, all of them, under which anything reads the option; () where something always does.
        aliases: former names of the key; still accepted.
    """

    default: Any
    kind: Kind
    doc: str
    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    optional: bool = False
    resume: str = FIXED
    read_by: When | AnyOf | tuple[When | AnyOf, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def conditions(self) -> tuple[When | AnyOf, ...]:
        """`read_by` as a tuple."""
        return self.read_by if isinstance(self.read_by, tuple) else (self.read_by,)

    def may_be_none(self) -> bool:
        """Returns whether None is allowed."""
        return self.optional or self.default is None

    def allowed(self) -> str:
        """Returns the allowed values, in words."""
        kind = self.kind.allowed if isinstance(self.kind, ListKind) else _KINDS.get(self.kind)
        bounds = ""
        if self.min is not None and self.max is not None:
            bounds = f"from {self.min} to {self.max}"
        elif self.min is not None:
            bounds = f"of at least {self.min:g}"
        elif self.above is not None:
            bounds = f"above {self.above:g}"
        if self.below is not None:
            bounds = f"{bounds} and below {self.below:g}"
        values = self.choices or ((True, False) if self.kind is bool else ())
        listed = [repr(value) for value in values] or [f"{kind} {bounds}".rstrip()]
        *others, last = [*listed, *map(repr, self.words)]
        return (f"{', '.join(others)} or {last}" if others else last) + ", or None" * self.may_be_none()

    def parse(self, name: str, text: str) -> Any:
        """Returns the value of text from the command line.

        Raises:
            UserError: it is not of the option's kind.
        """
        if text == "None" and self.may_be_none():
            return None
        if text in self.words:
            return text
        try:
            if self.kind is bool:
                return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            if self.kind is int:
                number = float(text) if not text.lstrip("+-").isdigit() else int(text)
                if number != int(number):
                    raise ValueError(text)
                return int(number)
            return self.kind.convert(text) if isinstance(self.kind, ListKind) else self.kind(text)
        except (ValueError, TypeError, KeyError, OverflowError):
            raise UserError(f"config.{name} is {shown(text)}\n  allowed: {self.allowed()}") from None

    def convert(self, value: Any) -> Any:
        """Returns a list option's value as a tuple, and `arguments.plain` values.

        Config files and config.json may thus have text, a list or a tuple. Values that cannot be converted are returned
        unchanged; `check` refuses them.
        """
        value = plain(value)
        if value is None or not isinstance(self.kind, ListKind):
            return value
        try:
            return self.kind.convert(value)
        except (ValueError, TypeError):
            return value

    def check(self, name: str, value: Any) -> None:
        """Checks a value by the option alone.

        Raises:
            UserError: it has the wrong type or is not allowed.
        """
        if self._is_allowed(value):
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        limit = ""
        if self.kind in (int, float) and is_number and abs(value) > (largest := self._largest()):
            limit = f", at most {largest:.8g}" if self.kind is float else f", at most {largest}"
        raise UserError(f"config.{name} is {shown(value)}\n  allowed: {self.allowed()}{limit}")

    def _largest(self) -> float:
        return MAX_INTEGER if self.kind is int else MAX_NUMBER

    def _is_allowed(self, value: Any) -> bool:
        if value is None:
            return self.may_be_none()
        if isinstance(value, str) and value in self.words:
            return True
        if isinstance(self.kind, ListKind):
            try:
                return self.kind.convert(value) == value
            except (ValueError, TypeError):
                return False
        kinds = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            return False
        return value in self.choices if self.choices else self.kind not in (int, float) or self._is_in_range(value)

    def _is_in_range(self, value: float) -> bool:
        return (
            abs(value) <= self._largest()  # false for nan
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def text(self, value: Any) -> str:
        """Returns a value as it is written on the command line."""
        if isinstance(self.kind, ListKind) and value is not None and self._is_allowed(value):
            return self.kind.text(value)
        return str(value)

    def quoted(self, value: Any) -> str:
        """Returns a value as messages show it: strings and lists in quotes."""
        return shown(self.text(value) if isinstance(value, tuple) else value)

    def unread_reason(self, name: str, config: ConfigDict) -> str | None:
        """Returns why nothing reads the option in a config, and what is allowed; None if it is read."""
        failing = [condition for condition in self.conditions if not condition.holds(config)]
        if not failing:
            return None
        value, default = map(self.quoted, (_value(config, name), self.default))
        reason = " and ".join(condition.failing(config) for condition in failing)
        remedy = " with ".join(condition.describe() for condition in failing)
        return (
            f"config.{name} is {value}, which has no effect with {reason}\n"
            f"  allowed: {default} (the default), or {remedy}"
        )


# Options that may differ when a run resumes, see `RESUME`.
changeable = functools.partial(Option, resume=CHANGEABLE)
free = functools.partial(Option, resume=FREE)
