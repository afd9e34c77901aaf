"""The files of a run directory: their names, and readers of config.json and summary.json."""

import json
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, one_line

METRICS = "metrics.jsonl"
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
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
            raise ValueError("not a config")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {one_line(error)}\n"
            f"  restore it: python -m vit_jax.checkpoints restore-config {workdir}"
        ) from error
    return config


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """Returns the summary of a finished run; None if there is no readable summary.json."""
    try:
        return json.loads((workdir / SUMMARY).read_text())
    except (OSError, ValueError):
        return None
