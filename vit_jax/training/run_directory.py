"""The folder of a run, and whether a config may go on in it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import atomic
from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import DAMAGED, FOLDER
from vit_jax.errors import UserError
from vit_jax.runtime.attention_choice import Choice
from vit_jax.training import environment

# What changes neither the numbers of a run nor the meaning of its checkpoints may differ when it goes on.
FREE = (
    "log.",
    "checkpoint.every",
    "checkpoint.keep",
    "mesh.",
    "data.dir",
    "data.cache_dir",
    "data.resident",
    "data.decoded",
    "data.workers",
    "data.ahead",
    "data.worker_timeout",
    "train.steps_per_dispatch",
    "train.max_minutes",
    "train.seeds_at_once",
)
# What changes how it goes on, but not what its checkpoints hold, is taken, told of and recorded.
TAKEN = (
    "augment.",
    "data.test",
    "data.validation",
    "model.attention_dropout",
    "model.attention_kernel",
    "model.dropout",
    "model.dtype",
    "model.remat",
    "model.stochastic_depth",
    "optimizer.beta",
    "optimizer.epsilon",
    "optimizer.final_learning_rate",
    "optimizer.gradient_clip",
    "optimizer.layer_decay",
    "optimizer.learning_rate",
    "optimizer.momentum",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "train.accumulation",
    "train.epochs",
    "train.evaluat",
    "train.label_smoothing",
    "train.loss_weights",
    "train.steps",
)
CHANGES = "changes.jsonl"
SHOWN = 4


def claim(workdir: Path, config: ConfigDict) -> list[str]:
    """Makes the folder where there is none, and sees that it is writable and not another run's.

    Returns what is taken over from the config although the run was started otherwise: 'train.steps: 100 -> 200', ...

    Raises:
        UserError: it cannot be written to, or it belongs to another config; what differs is named.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        reason = f"--workdir={workdir} cannot be written to: {error.strerror}"
        raise UserError(f"{reason}\n  give another --workdir") from error
    old = read_config(workdir)
    # Of a run that never began nothing can be lost: its config may have been mended since.
    if old is None or not has_begun(workdir):
        return []
    # An option that there was not yet when the run began is at its default.
    old = {
        name: {**{key: option.default for key, option in keys.items()}, **old.get(name, {})}
        for name, keys in options.OPTIONS.items()
    }
    rows = [row for row in options.differences(old, config.to_dict()) if not row.startswith(FREE)]
    refused = [row for row in rows if not row.startswith(TAKEN)]
    if refused:
        more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        raise UserError(
            f"--workdir={workdir} belongs to a run of another config\n"
            f"  differs: {'; '.join(refused[:SHOWN])}{more}\n  give another --workdir, or the same config"
        )
    return rows


def has_begun(workdir: Path) -> bool:
    """Whether a run has left anything there that another config must not touch."""
    metrics = workdir / run_files.METRICS
    begun = (metrics.exists() and metrics.stat().st_size > 0) or any(
        (workdir / name).is_dir() and any((workdir / name).iterdir()) for name in (FOLDER, DAMAGED)
    )
    return begun or any(has_begun(own) for own in workdir.glob("seed-*"))  # of several seeds, see `seeds`


def check_length(changes: list[str], steps: int, saved: list[int]) -> None:
    """Raises UserError where a run is to be shorter than it is already."""
    if changes and saved and saved[-1] > steps:
        raise UserError(
            f"the run has made {saved[-1]:,} steps, and config.train asks for {steps:,}\n"
            "  allowed: as many or more, or another --workdir"
        )


def record(
    workdir: Path,
    config: ConfigDict,
    changes: list[str],
    say: Callable[[str], None],
    attention: Choice | None = None,
) -> None:
    """Writes config.json and environment.json; changes are printed, and added to changes.jsonl.

    Args:
        workdir: of the run.
        config: its config.
        changes: what differs from the config that it began with.
        say: prints a line.
        attention: its attention backend.

    Raises:
        UserError: they cannot be written.
    """
    try:
        if changes:
            say(f"the config has changed since this run began: {'; '.join(changes)}")
            (workdir / run_files.SUMMARY).unlink(missing_ok=True)
            with open(workdir / CHANGES, "a") as file:
                file.write(json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), "changes": changes}) + "\n")
        atomic.write_json(workdir / run_files.CONFIG, config.to_dict())
        atomic.write_json(workdir / run_files.ENVIRONMENT, environment.environment(attention))
    except OSError as error:
        raise UserError(f"{workdir} cannot be written to: {error.strerror}\n  make room there") from error


def read_config(workdir: Path) -> dict | None:
    """The config that a workdir was started with, or None in a fresh one.

    Raises:
        UserError: its config.json cannot be read.
    """
    try:
        config = json.loads((workdir / run_files.CONFIG).read_text())
        if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
            raise ValueError("it is no config")
        return config
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / run_files.CONFIG} cannot be read: {error}\n  give another --workdir") from error


def attention_choice(workdir: Path) -> Choice | None:
    """The choice of an attention backend in a run's environment.json; None where there is none."""
    try:
        return Choice(**json.loads((workdir / run_files.ENVIRONMENT).read_text())["attention"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trained_config(workdir: Path) -> ConfigDict:
    """The config of a workdir that holds checkpoints.

    Raises:
        UserError: there is no run in it, or its config cannot be read.
    """
    saved = read_config(workdir)
    if saved is None or not (workdir / FOLDER).is_dir():
        if own := sorted(path.parent.name for path in workdir.glob(f"seed-*/{FOLDER}")):
            raise UserError(f"{workdir} holds the runs of several seeds\n  give one: {', '.join(own)}")
        raise UserError(f"{workdir} holds no run\n  train one: python -m vit_jax.main --workdir=DIR ...")
    return options.from_dict(saved)


def read_summary(workdir: Path) -> dict | None:
    """The summary of a finished run, or None."""
    try:
        return json.loads((workdir / run_files.SUMMARY).read_text())
    except (OSError, ValueError):
        return None
