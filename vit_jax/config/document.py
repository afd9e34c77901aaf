"""The documentation of the options, from the schema: docs/options.md, and the help on a config.

    python -m vit_jax.config.document

writes docs/options.md.
"""

import sys
import textwrap
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import terminal
from vit_jax.config.module import shipped_arguments
from vit_jax.config.option import Option
from vit_jax.config.schema import OPTIONS, REMOVED

PATH = Path(__file__).resolve().parents[2] / "docs" / "options.md"
WIDTH = 100
INDENT = 38
SECTIONS = {
    "model": "the Vision Transformer",
    "data": "dataset, splits and input pipeline",
    "augment": "training augmentation, and test-time views",
    "optimizer": "optimizer, learning-rate schedule, and which parameters are trained",
    "train": "training length, batch size, objective, evaluation and seeds",
    "decoder": "decoder of the masked autoencoder",
    "checkpoint": "saving checkpoints, and initial parameters",
    "mesh": "devices",
    "log": "logging and profiling",
}
INTRODUCTION = """\
# Options

Set an option in a config file (`config.train.steps = 1000`) or on the command line (`--config.train.steps=1000`).
`vit-jax train --config=CONFIG --help` shows the options of a config with the values that they have there.

* **Config files** are Python modules: they may import modules of their own directory, also relatively in a package.
  `get_config()`, or `get_config(ARG)` for `--config=FILE.py:ARG`, returns the config.
* **On resume**: whether the option may change when a run resumes. *fixed*: no. *changeable*: yes, while steps are left
  to train with it; the change is printed and recorded in `changes.jsonl`. *free*: yes, silently.
* **Only with**: the settings under which the option has an effect. With other settings, any value but the default is
  refused; what a config file sets and an override makes pointless is reset to its default.

`python -m vit_jax.config.document` generates this page from `vit_jax/config/schema.py`.
"""


def markdown() -> str:
    """Returns the text of docs/options.md: a table per section."""
    parts = [INTRODUCTION]
    for section, keys in OPTIONS.items():
        rows = ["| Option | Default | Allowed | Meaning | On resume | Only with |", "|---|---|---|---|---|---|"]
        for key, option in keys.items():
            cells = (f"`{key}`", f"`{_shown(option, option.default)}`", option.allowed(), option.doc, option.resume)
            rows.append(f"| {' | '.join(map(_escaped, cells))} | {_escaped(_conditions(option))} |")
        title = SECTIONS[section][0].upper() + SECTIONS[section][1:]
        parts.append("\n".join([f"## {section}", "", f"{title}.", "", *rows, ""]))
    former = [
        f"* `{section}.{alias}`: now `{section}.{key}`"
        for section, keys in OPTIONS.items()
        for key, option in keys.items()
        for alias in option.aliases
    ]
    former += [f"* `{name}`: removed; {remedy}" for name, remedy in REMOVED.items()]
    parts.append("\n".join(["## Former names", "", *former, ""]))
    return "\n".join(parts)


def _conditions(option: Option) -> str:
    return " and ".join(f"`{condition.describe()}`" for condition in option.conditions)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _shown(option: Option, value: object) -> str:
    """Returns a value as it is written on the command line; numbers with at most six digits."""
    return f"{value:.6g}" if isinstance(value, float) else option.text(value)


def shipped_configs() -> str:
    """Returns the names of the shipped configs, each with its title and arguments; at most 100 columns wide."""
    lines = []
    for name, (title, arguments) in shipped_arguments().items():
        lines.append(f"  {name}")
        for text in filter(None, (title, arguments and f"ARG: {arguments}")):
            indents = {"initial_indent": "    ", "subsequent_indent": "      "}
            lines += textwrap.wrap(text, WIDTH, break_on_hyphens=False, **indents)
    return "\n".join(lines)


def describe(config: ConfigDict, name: str) -> str:
    """Returns the options of a config by section, each with its value there and its meaning; at most 100 columns wide.

    A star marks values that differ from the default, which is shown too. Options that have no effect under the
    config's other settings are left out.

    Args:
        config: a config; it need not have passed `check_config`.
        name: of the config, for the title.
    """
    lines = [
        f"Options of {name}. Set one with --config.SECTION.OPTION=VALUE.",
        "* marks a value that differs from the default. Options without effect here are left out.",
    ]
    for section, keys in OPTIONS.items():
        rows = []
        for key, option in keys.items():
            value = config[section][key]
            changed = value != option.default
            if changed or option.unread_reason(f"{section}.{key}", config) is None:
                rows += _row(key, option, value, changed)
        if rows:
            lines += ["", f"{section}: {SECTIONS[section]}", *rows]
    return "\n".join(lines)


def _row(key: str, option: Option, value: object, changed: bool) -> list[str]:
    start = f"{'*' if changed else ' '} {key} = {_shown(option, value)}"
    doc = option.doc
    if option.choices:
        doc += f" ({', '.join(option.choices)})"
    if changed:  # with no-break spaces, so that it stays on one line
        doc += f" [default:\xa0{_shown(option, option.default)}]"
    lines = [line.replace("\xa0", " ") for line in textwrap.wrap(doc, WIDTH - INDENT, break_on_hyphens=False)]
    if len(start) >= INDENT:
        lines.insert(0, "")
    first, *rest = lines
    return [f"{start:<{INDENT}}{first}".rstrip(), *(" " * INDENT + line for line in rest)]


def main() -> int:
    """Writes docs/options.md."""
    PATH.write_text(markdown())
    terminal.say(f"wrote {PATH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
