"""Configs from files, from the command line and from config.json; differences between configs."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from vit_jax.arguments import plain, shown
from vit_jax.config import module, synonyms
from vit_jax.config.option import FIXED, RESUME, ListKind, Option
from vit_jax.config.schema import OPTIONS, REMOVED
from vit_jax.errors import UserError, nearest

# Former key -> key; a key is renamed within its section.
ALIASES = {alias: key for keys in OPTIONS.values() for key, one in keys.items() for alias in one.aliases}


class UnknownOption(KeyError):
    """An option or a section that does not exist is set or read in Python, with the message of a UserError."""

    def __init__(self, error: UserError) -> None:
        super().__init__(str(error).replace("\n  ", "; "))

    __str__ = Exception.__str__  # KeyError's puts the message in quotes


class Config(ConfigDict):
    """A config: sections of options."""

    def __setitem__(self, key: str, value: Any) -> None:
        self._check(key)
        super().__setitem__(key, value)

    def __getitem__(self, key: str) -> Any:
        self._check(key)
        return super().__getitem__(key)

    def _check(self, key: str) -> None:
        if self.is_locked and key.partition(".")[0] not in self and not key.startswith("_"):
            raise UnknownOption(_no_section(key))


class Section(ConfigDict):
    """A section of a config, in which renamed options can also be set and read by their former names."""

    def __setitem__(self, key: str, value: Any) -> None:
        key = self._known(key)
        try:
            super().__setitem__(key, value if isinstance(value, config_dict.FieldReference) else plain(value))
        except TypeError:
            known = [keys[key].allowed() for keys in OPTIONS.values() if key in keys and keys.keys() >= {*self}]
            if not known:
                raise
            raise TypeError(f"option {key} is {shown(value)}; allowed: {known[0]}") from None

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._known(key))

    def _known(self, key: str) -> str:
        """Returns a key by its present name."""
        key = ALIASES.get(key, key)
        if self.is_locked and key not in self and not key.startswith("_"):
            section = next((name for name, keys in OPTIONS.items() if keys.keys() == {*self}), "")
            name = f"{section}.{key}"
            raise UnknownOption(removed(name) if name in REMOVED else _no_option(name))
        return key


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
    return Config(sections).lock()


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


def load(spec: str | ConfigDict) -> ConfigDict:
    """Returns the config of 'CONFIG' or 'CONFIG:ARG': what `get_config()` or `get_config(ARG)` of that file returns.

    Args:
        spec: the name of a shipped config, such as 'cifar10:cpu', or the path of a Python file; or a config, which is
            checked and copied.

    Raises:
        UserError: no such file, an error in it, an argument that it does not accept, an option that does not exist or
            is missing, or a value that is not allowed.
    """
    config = module.call(spec) if isinstance(spec, str) else copy.deepcopy(spec)
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


def adapt(spec: str | ConfigDict, config: ConfigDict, typed: Collection[str]) -> None:
    """Applies `adapt(config, typed)` of the Python file of 'FILE' or 'FILE:ARG', if it has that function, to a config.

    It sets what depends on options that the command line may set, such as `checkpoint.init_from` or `data.dir`; `typed`
    are the names of those that it has set. A config in place of `spec` has no such function.

    Raises:
        UserError: an error in it, an option that does not exist, or a value that is not allowed.
    """
    if isinstance(spec, str):
        module.call_adapt(spec, config, set(typed))
        check_values(config)


def find_option(name: str, value: Any) -> Option:
    """Returns the option 'section.key'.

    Raises:
        UserError: there is none; the one that may be meant is named, or else those of the section.
    """
    if (found := option(name)) is None:
        raise _no_option(name, value)
    return found


def removed(name: str) -> UserError:
    """Returns the error for an option of `REMOVED`."""
    return UserError(f"config.{name} has been removed\n  omit it: {REMOVED[name]}")


def _no_option(name: str, value: Any = None) -> UserError:
    known = OPTIONS.get(name.partition(".")[0], {})
    way_out = f"allowed: {', '.join(known)}" if known else f"allowed: options of {', '.join(OPTIONS)}"
    if near := synonyms.nearest_options(name):
        way_out = f"nearest: config.{near[0]}: {option(near[0]).doc}"
    if note := synonyms.note(name):
        way_out = note
    text = "" if value is None else f" (given: {shown(value)})"
    return UserError(f"config.{shown(name.rstrip('.'))[1:-1]} does not exist{text}\n  {way_out}")


def _no_section(name: str) -> UserError:
    near = [one for one in nearest(name, OPTIONS) if one != name] or synonyms.nearest_options(name)
    way_out = f"nearest: config.{near[0]}" if near else f"allowed: {', '.join(OPTIONS)}"
    if note := synonyms.note(name):
        way_out = note
    return UserError(f"config.{name} is not a section\n  {way_out}")


def check_values(config: ConfigDict) -> None:
    """Checks that a config has every option, no other, and for each a value that the option allows by itself.

    Raises:
        UserError: an unknown or missing option, or a value that is not allowed.
    """
    for section, keys in config.items():
        if section not in OPTIONS or not isinstance(keys, ConfigDict):
            raise _no_section(section)
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
