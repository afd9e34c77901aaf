"""Configs from files, from the command line and from config.json; differences between configs."""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from vit_jax.arguments import plain, shown
from vit_jax.config import module
from vit_jax.config.option import FIXED, RESUME, ListKind, Option
from vit_jax.config.schema import OPTIONS, REMOVED
from vit_jax.errors import UserError, nearest

# Former key -> key; a key is renamed within its section.
ALIASES = {alias: key for keys in OPTIONS.values() for key, one in keys.items() for alias in one.aliases}


class Section(ConfigDict):
    """A section of a config, in which renamed options can also be set and read by their former names."""

    def __setitem__(self, key: str, value: Any) -> None:
        key = ALIASES.get(key, key)
        if self.is_locked and key not in self:
            removed = [remedy for name, remedy in REMOVED.items() if name.endswith(f".{key}")]
            near = [f"nearest: {one}" for one in nearest(key, self.keys())] or [f"allowed: {', '.join(self.keys())}"]
            raise KeyError(f"option {key} {f'has been removed: {removed[0]}' if removed else f'({near[0]})'}")
        try:
            super().__setitem__(key, value if isinstance(value, config_dict.FieldReference) else plain(value))
        except TypeError:
            known = [keys[key].allowed() for keys in OPTIONS.values() if key in keys and keys.keys() >= {*self}]
            if not known:
                raise
            raise TypeError(f"option {key} is {shown(value)}; allowed: {known[0]}") from None

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(ALIASES.get(key, key))


class ListReference(config_dict.FieldReference):
    """The field of an option with values of several types, such as a list: converts what is assigned to it."""

    def __init__(self, one: Option) -> None:
        self._option = one
        super().__init__(one.default, field_type=object)

    def set(self, value: Any, type_safe: bool = True) -> None:
        """Sets the value, converted if it is a text or a list."""
        super().set(self._option.convert(value), type_safe)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._option = state["_option"]
        super().__setstate__(state)


def _field(one: Option) -> Any:
    if isinstance(one.kind, ListKind) or one.words:  # values of two types
        return ListReference(one)
    # A placeholder is None with a type, so that an int assigned to a float option becomes a float.
    return config_dict.placeholder(one.kind) if one.default is None else one.default


def default() -> ConfigDict:
    """Returns a config with every option at its default, locked: assigning a misspelled option raises an error."""
    sections = {name: Section({key: _field(one) for key, one in keys.items()}) for name, keys in OPTIONS.items()}
    return ConfigDict(sections).lock()


def names() -> list[str]:
    """Returns all options, as 'section.key'."""
    return [f"{section}.{key}" for section, keys in OPTIONS.items() for key in keys]


def option(name: str) -> Option | None:
    """Returns the option 'section.key', or None if there is no such option."""
    section, _, key = name.partition(".")
    return OPTIONS.get(section, {}).get(key)


def upgrade(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns a config's values with today's option names and types: renamed, without removed options, lists as tuples.

    Unknown options and values that are not allowed stay as they are.
    """
    upgraded = {}
    for section, keys in values.items():
        upgraded[section] = made = {}
        for key, value in keys.items():
            key = ALIASES.get(key, key)
            if (name := f"{section}.{key}") not in REMOVED:
                made[key] = value if option(name) is None else option(name).convert(value)
    return upgraded


def complete(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns `upgrade`d values, with the default of every option that is missing."""
    upgraded = upgrade(values)
    for section, keys in OPTIONS.items():
        upgraded[section] = {key: one.default for key, one in keys.items()} | upgraded.get(section, {})
    return upgraded


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """Returns the config of a config.json or of nested dictionaries; missing options have their defaults.

    Each value is checked by itself; `vit_jax.config.check.check_config` checks the config as a whole.

    Raises:
        UserError: an option does not exist, or a value is not allowed.
    """
    config = default()
    for section, keys in upgrade(values).items():
        for key, value in keys.items():
            find_option(f"{section}.{key}", value).check(f"{section}.{key}", value)
            config[section][key] = value
    return config


def load(spec: str) -> ConfigDict:
    """Returns the config of 'CONFIG' or 'CONFIG:ARG': what `get_config()` or `get_config(ARG)` of that file returns.

    Args:
        spec: the name of a shipped config, such as 'cifar10:cpu', or the path of a Python file.

    Raises:
        UserError: no such file, an error in it, an argument that it does not accept, an option that does not exist or
            is missing, or a value that is not allowed.
    """
    config = module.call(spec)
    if isinstance(config, config_dict.FrozenConfigDict):
        config = config.as_configdict()
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={spec}: get_config returned {type(config).__name__}, not an ml_collections.ConfigDict\n"
            "  start from vit_jax.config.default(), change its options, and return it"
        )
    check_values(config)
    # A config made by `default` is kept, with the references between its fields.
    is_ours = all(isinstance(section, Section) for section in config.values())
    return config if is_ours else from_dict(config.to_dict())


def override(config: ConfigDict, assignment: str) -> str:
    """Applies one 'section.key=value' of the command line to `config`; returns the name of the option.

    Raises:
        UserError: no such option, or a value that is not allowed.
    """
    name, equals, text = assignment.partition("=")
    section, _, key = name.partition(".")
    name = f"{section}.{ALIASES.get(key, key)}"
    if name in REMOVED:
        raise UserError(f"config.{name} has been removed\n  omit it: {REMOVED[name]}")
    one = find_option(name, text if equals else None)
    if not equals:
        raise UserError(f"config.{name} has no value\n  allowed: {one.allowed()}")
    value = one.parse(name, text)
    one.check(name, value)
    config[section][ALIASES.get(key, key)] = value
    return name


def read_options(config: ConfigDict) -> set[str]:
    """Returns the options, as 'section.key', that have an effect under the others."""
    return {name for name in names() if option(name).unread_reason(name, config) is None}


def reset_unread(config: ConfigDict, among: Collection[str]) -> None:
    """Resets those of the options `among` to their defaults that have no effect under the others."""
    for name in set(among) - read_options(config):
        section, _, key = name.partition(".")
        config[section][key] = option(name).default


def find_option(name: str, value: Any) -> Option:
    """Returns the option 'section.key'.

    Raises:
        UserError: there is none; the one that may be meant is named, or else those of the section.
    """
    if (found := option(name)) is not None:
        return found
    known = OPTIONS.get(name.partition(".")[0], {})
    if near := nearest_options(name):
        way_out = f"nearest: config.{near[0]}: {option(near[0]).doc}"
    else:
        way_out = f"allowed: {', '.join(known)}" if known else f"allowed: options of {', '.join(OPTIONS)}"
    text = "" if value is None else f" (given: {shown(value)})"
    raise UserError(f"config.{shown(name.rstrip('.'))[1:-1]} does not exist{text}\n  {way_out}")


def nearest_options(name: str) -> list[str]:
    """Returns the options, as 'section.key', that a name which is none may mean; the most similar first."""
    section, _, key = name.partition(".")
    key, known = key or section, OPTIONS.get(section, {})
    # A name in the wrong section, or without one, is as frequent a mistake as a misspelled one.
    near = [one for one in names() if one.split(".")[1] == key]
    near += [f"{section}.{one}" for one in nearest(key, known)]
    similar = nearest(key, [one.split(".")[1] for one in names()])
    return near + [one for one in names() if one.split(".")[1] in similar]


def check_values(config: ConfigDict) -> None:
    """Checks that a config has every option, no other, and for each a value that the option allows by itself.

    Raises:
        UserError: an unknown or missing option, or a value that is not allowed.
    """
    for section, keys in config.items():
        if section not in OPTIONS or not isinstance(keys, ConfigDict):
            near = [one for one in nearest(section, OPTIONS) if one != section]
            way_out = f"nearest: config.{near[0]}" if near else f"allowed: {', '.join(OPTIONS)}"
            raise UserError(f"config.{section} is not a section\n  {way_out}")
    values = upgrade(_plain(config))
    for section, keys in values.items():
        for key, value in keys.items():
            find_option(f"{section}.{key}", value).check(f"{section}.{key}", value)
    missing = [name for name in names() if name.split(".")[1] not in values.get(name.split(".")[0], {})]
    if missing:
        raise UserError(
            f"config.{missing[0]} is missing\n  start from vit_jax.config.default(), which has every option"
        )


def _plain(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Returns a config as nested dictionaries.

    Raises:
        UserError: an option is a required placeholder without a value.
    """
    try:
        return config.to_dict()
    except config_dict.RequiredValueError as error:
        for section, keys in config.items():
            for key in keys:
                try:
                    keys[key]
                except config_dict.RequiredValueError:
                    raise UserError(
                        f"config.{section}.{key} is a required placeholder without a value\n  set it in get_config"
                    ) from error
        raise


def differences(old: Mapping, new: Mapping, resume: Collection[str] = RESUME) -> list[str]:
    """Returns the options that differ between two configs, as nested dictionaries: 'train.steps: 100 -> 200', sorted.

    Args:
        old: one config; options by their former names and lists as text are understood.
        new: another.
        resume: the resume policies of the options that are compared; an unknown option is "fixed".
    """
    old, new = upgrade(old), upgrade(new)
    rows = []
    for section in sorted({*old, *new}):
        before, after = old.get(section, {}), new.get(section, {})
        for key in sorted({*before, *after}):
            one = option(f"{section}.{key}")
            if before.get(key) != after.get(key) and (one.resume if one else FIXED) in resume:
                text = str if one is None else one.text
                rows.append(f"{section}.{key}: {text(before.get(key))} -> {text(after.get(key))}")
    return rows
