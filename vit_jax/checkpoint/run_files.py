"""The files of a run directory: their names, readers, and what config.json and changes.jsonl have."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax import atomic
from vit_jax.errors import UserError, one_line

METRICS = "metrics.jsonl"
INIT_FROM = "init_from.json"
CONFIG = "config.json"
CHANGES = "changes.jsonl"
DATA = "data.json"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
DAMAGED = "checkpoints-damaged"  # corrupt checkpoints are moved here


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Returns the config that a run was started with, as nested dictionaries; None if there is no config.json.

    Raises:
        UserError: config.json cannot be read.
    """
    path = workdir / CONFIG
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
            raise ValueError("not a config")
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: {one_line(error)}\n"
            f"  restore it: python -m vit_jax.checkpoints restore-config {workdir}"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    return config


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """Returns the summary of a finished run; None if there is no summary.json, or it is damaged.

    Raises:
        UserError: there is one, and the operating system cannot read it.
    """
    summary = read_json(workdir / SUMMARY)
    return summary if isinstance(summary, dict) else None


def read_changes(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of changes.jsonl, oldest first: `step` from which the options differ, `time`, `changes`.

    Lines of older versions have no `step`. What is no JSON object is left out.

    Raises:
        UserError: the operating system cannot read it.
    """
    try:
        lines = (workdir / CHANGES).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(workdir / CHANGES, error) from error
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [change for change in found if isinstance(change, dict) and isinstance(change.get("changes"), list)]


def changes_until(workdir: Path, step: int, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the changes of the config, as `read_changes`, before a checkpoint: those that its metadata has.

    Checkpoints of older versions have none; then those of changes.jsonl.
    """
    if "changes" in metadata:
        return metadata["changes"]
    return [change for change in read_changes(workdir) if change.get("step", -1) < step]


def write_config(workdir: Path, config: Mapping[str, Any], changes: list[dict[str, Any]]) -> None:
    """Writes config.json and changes.jsonl, unless they have this content already; no changes: no changes.jsonl.

    Raises:
        OSError: a file cannot be written.
    """
    history = "".join(f"{atomic.to_json(change)}\n" for change in changes)
    for name, text in ((CHANGES, history), (CONFIG, f"{atomic.to_json(config, indent=2)}\n")):
        path, content = workdir / name, text.encode()
        before = path.read_bytes() if path.exists() else b""
        if content and content != before:
            atomic.write_bytes(path, content)
        elif before and not content:
            atomic.remove(path)


def has_checkpoints(workdir: Path) -> bool:
    """Returns whether a run directory has a directory of checkpoints; UserError if that cannot be looked up."""
    try:
        return (workdir / CHECKPOINTS).is_dir()
    except OSError as error:
        raise unreadable(workdir, error) from error


def is_step(name: str) -> bool:
    """Returns whether a file name is that of a checkpoint: a step as it is written, '100' but not '0100'."""
    return name.isdecimal() and str(int(name)) == name


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; None if there is no such file, or its bytes are no JSON.

    Raises:
        UserError: there is one, and the operating system cannot read it.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """Returns the error for a file that exists, and that the operating system cannot read."""
    return UserError(f"{path} cannot be read: {error.strerror or error}\n  fix that and run the same command again")
