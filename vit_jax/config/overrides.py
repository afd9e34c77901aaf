"""Options set on the command line, and what becomes of a config file's other options because of them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_jax.config.load import ALIASES, find_option, names, option, removed
from vit_jax.config.schema import REMOVED
from vit_jax.errors import UserError

# An option that is set on the command line -> options of the config file that would defeat it: they are reset to their
# defaults, unless they are set on the command line too.
RESETS = {
    "model.variant": ("model.width", "model.depth", "model.heads", "model.mlp_width"),
    "train.steps": ("train.epochs",),
    "train.epochs": ("train.steps",),
}
# An option whose value on the command line differs from the file's -> options whose values in the file were chosen for
# the file's value: they stay, and a note names them.
CHOSEN_FOR = {
    "optimizer.name": ("optimizer.learning_rate", "optimizer.weight_decay"),
    "data.name": ("data.train", "data.validation", "data.test"),
}


def override(config: ConfigDict, assignment: str) -> str:
    """Applies one 'section.key=value' of the command line to `config`, alone; returns the name of the option.

    Raises:
        UserError: no such option, or a value that is not allowed.
    """
    name, equals, text = assignment.partition("=")
    section, _, key = name.partition(".")
    key = ALIASES.get(key, key)
    name = f"{section}.{key}"
    if name in REMOVED:
        raise removed(name)
    one = find_option(name, text if equals else None)
    if not equals:
        raise UserError(f"config.{name} has no value\n  allowed: {one.allowed()}")
    value = one.parse(name, text)
    one.check(name, value)
    config[section][key] = value
    return name


class Applied(NamedTuple):
    """What `override_all` has done.

    Attributes:
        typed: the options, as 'section.key', that are set on the command line.
        notes: lines that name the options of the file that were chosen for what the command line changes.
    """

    typed: set[str]
    notes: list[str]


def override_all(config: ConfigDict, assignments: Sequence[str]) -> Applied:
    """Applies the overrides of a command line, in any order, and resets what the config file sets against them.

    Options of the file that have no effect under the overrides stay; see `reset_unread`.

    Args:
        config: of a config file; changed in place.
        assignments: 'section.key=value', ...

    Raises:
        UserError: as `override`.
    """
    before = {name: _value(config, name) for name in CHOSEN_FOR}
    typed = {override(config, assignment) for assignment in assignments}
    for name in typed & RESETS.keys():
        if _value(config, name):  # None and 0 mean "not set", as in --config.train.epochs=None
            for other in {*RESETS[name]} - typed:
                _reset(config, other)
    return Applied(typed, _notes(config, before, typed))


def _notes(config: ConfigDict, before: Mapping[str, Any], typed: set[str]) -> list[str]:
    notes = []
    for name, others in CHOSEN_FOR.items():
        kept = [other for other in others if other not in typed and _value(config, other) != option(other).default]
        if kept and before[name] != _value(config, name):
            values = " and ".join(f"{other}={option(other).quoted(_value(config, other))}" for other in kept)
            notes.append(f"note: the config file sets {values} for {name}={option(name).quoted(before[name])}")
    return notes


def read_options(config: ConfigDict) -> set[str]:
    """Returns the options, as 'section.key', that have an effect under the others."""
    return {name for name in names() if option(name).unread_reason(name, config) is None}


def reset_unread(config: ConfigDict, among: Collection[str]) -> None:
    """Resets those of the options `among` to their defaults that have no effect under the others."""
    for name in set(among) - read_options(config):
        _reset(config, name)


def _reset(config: ConfigDict, name: str) -> None:
    section, _, key = name.partition(".")
    config[section][key] = option(name).default


def _value(config: ConfigDict, name: str) -> Any:
    section, _, key = name.partition(".")
    return config[section][key]
