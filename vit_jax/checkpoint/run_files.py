"""The files of a run directory: their names, and readers of config.json and summary.json."""

import json
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, one_line

METRICS = "metrics.jsonl"
INIT_FROM = "init_from.json"
CONFIG = "config.json"
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
