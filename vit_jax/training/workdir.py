"""The folder of a run, and whether a config may go on in it."""

import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.errors import UserError
from vit_jax.training import records

# What changes neither the numbers of a run nor the meaning of its checkpoints may differ when it goes on.
READING = (
    "data.dir",
    "data.cache_dir",
    "data.resident",
    "data.decoded",
    "data.workers",
    "data.ahead",
    "data.worker_timeout",
)
FREE = ("log.", "checkpoint.", "mesh.", "train.steps_per_dispatch", *READING)
SHOWN = 4


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the folder where there is none, and sees that it is writable and not another run's.

    Raises:
        UserError: it cannot be written to, or it belongs to another config; what differs is named.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"--workdir={workdir} cannot be written to: {error.strerror}"
        raise UserError(f"{reason}\n  give another --workdir") from error
    old = read_config(workdir)
    if old is None:
        return
    rows = [row for row in options.differences(old, config.to_dict()) if not row.startswith(FREE)]
    if rows:
        more = f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        raise UserError(
            f"--workdir={workdir} belongs to a run of another config\n  differs: {'; '.join(rows[:SHOWN])}{more}\n"
            "  give another --workdir, or the same config"
        )


def read_config(workdir: Path) -> dict | None:
    """The config that a workdir was started with, or None in a fresh one.

    Raises:
        UserError: its config.json cannot be read.
    """
    try:
        return json.loads((workdir / records.CONFIG).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / records.CONFIG} cannot be read: {error}\n  give another --workdir") from error


def read_summary(workdir: Path) -> dict | None:
    """The summary of a finished run, or None."""
    try:
        return json.loads((workdir / records.SUMMARY).read_text())
    except (OSError, ValueError):
        return None
