"""Whether a checkpoint is what was written, and that of the model at hand."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_jax import integrity
from vit_jax.errors import UserError

SHOWN = 3  # names, of many


class Damaged(Exception):
    """A checkpoint is not what was written; says how."""


def digests(path: Path, read: Callable[[], Any]) -> dict[str, str]:
    """The digest of every array that `read` returns; Damaged where it cannot read them."""
    try:
        return integrity.digests(read())
    except Exception as error:  # Orbax and TensorStore raise many kinds for files that they cannot understand
        raise Damaged(f"{path} is damaged: it cannot be read ({one_line(error)})") from error


def compare(path: Path, written: dict[str, str], found: dict[str, str]) -> None:
    """Raises Damaged where an array is missing or other than it was; more than were written are none's concern."""
    changed = [name for name, text in written.items() if found.get(name) != text]
    if changed:
        raise Damaged(f"{path} is damaged: {few(changed)} {'is' if len(changed) == 1 else 'are'} not as written")


def check_kinds(path: Path, stored: dict[str, str], wanted: dict[str, Any]) -> None:
    """Raises UserError where a whole checkpoint is that of another model, optimiser or version."""
    wanted = {name: integrity.kind(leaf) for name, leaf in integrity.names_and_leaves(wanted).items()}
    rows = [
        f"{name}: {stored.get(name, 'not there')} -> {wanted.get(name, 'not there')}"
        for name in sorted({*stored, *wanted})
        if stored.get(name) != wanted.get(name)
    ]
    if rows:
        raise UserError(
            f"{path} is the state of another model or optimiser\n  saved -> wanted: {few(rows)}\n"
            "  give the config that it was saved with, or another --workdir"
        )


def few(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bearable length."""
    while error.__cause__ is not None:  # what the outer ones only wrap
        error = error.__cause__
    text = " ".join(str(error).split())
    number = re.search(r"\[os_error_code='(\d+)'\]", text)  # TensorStore's, behind lines of paths
    if number:
        text = str(OSError(int(number[1]), os.strerror(int(number[1]))))
    return text[:200] or type(error).__name__
