"""The run directory: whether a config may start or resume a run in it, and what it records about the run."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import atomic
from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.errors import UserError
from vit_jax.runtime.attention_choice import Choice
from vit_jax.training import environment

CHANGES = "changes.jsonl"
MAX_SHOWN = 4  # differences in an error message


def claim(workdir: Path, config: ConfigDict) -> list[str]:
    """Creates the run directory if it does not exist, and checks that the config may be trained in it.

    Returns the options that have changed since the run began and may: 'train.steps: 100 -> 200', ...

    Raises:
        UserError: it cannot be written to, or it holds a run with another config, whose differences are named.
    """
    _check_writable(workdir)
    old = run_files.read_config(workdir)
    # Without records or checkpoints there is nothing to lose: the config may change freely.
    if old is None or not has_begun(workdir):
        return []
    # Options that did not exist when the run began are at their defaults.
    old, new = options.complete(old), config.to_dict()
    if refused := options.differences(old, new, resume=("fixed",)):
        more = f"; and {len(refused) - MAX_SHOWN} more" if len(refused) > MAX_SHOWN else ""
        raise UserError(
            f"--workdir={workdir} holds a run with another config\n"
            f"  differs: {'; '.join(refused[:MAX_SHOWN])}{more}\n  use another --workdir, or the same config"
        )
    return options.differences(old, new, resume=("changeable",))


def _check_writable(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written to: {error.strerror}\n  use another --workdir"
        ) from error


def has_begun(workdir: Path) -> bool:
    """Returns whether the directory holds records or checkpoints, which a run with another config must not touch."""
    metrics = workdir / run_files.METRICS
    begun = (metrics.exists() and metrics.stat().st_size > 0) or any(
        (workdir / name).is_dir() and any((workdir / name).iterdir())
        for name in (run_files.CHECKPOINTS, run_files.DAMAGED)
    )
    return begun or any(has_begun(run) for run in workdir.glob("seed-*"))  # the runs of several seeds


def check_length(changes: list[str], steps: int, saved: list[int]) -> None:
    """Raises UserError if a changed config ends before the newest of the `saved` checkpoints."""
    if changes and saved and saved[-1] > steps:
        raise UserError(
            f"config.train sets {steps:,} steps, but the newest checkpoint of this run is of step {saved[-1]:,}\n"
            f"  allowed: at least {saved[-1]:,} steps, or another --workdir"
        )


def record(
    workdir: Path,
    config: ConfigDict,
    changes: list[str],
    say: Callable[[str], None],
    attention: Choice | None = None,
) -> None:
    """Writes config.json and environment.json; prints changes and appends them to changes.jsonl.

    Args:
        workdir: the run directory.
        config: the run's config.
        changes: the options that have changed since the run began, from `claim`.
        say: prints a line.
        attention: the run's attention backend.

    Raises:
        UserError: a file cannot be written.
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
        raise UserError(
            f"{workdir} cannot be written to: {error.strerror}\n  free disk space or change its permissions"
        ) from error


def attention_choice(workdir: Path) -> Choice | None:
    """Returns the attention backend that environment.json records, or None if it records none."""
    try:
        return Choice(**json.loads((workdir / run_files.ENVIRONMENT).read_text())["attention"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trained_config(workdir: Path) -> ConfigDict:
    """Returns the config of a run directory with checkpoints.

    Raises:
        UserError: it holds no run or the runs of several seeds, or its config cannot be read.
    """
    saved = run_files.read_config(workdir)
    if saved is None or not (workdir / run_files.CHECKPOINTS).is_dir():
        if own := sorted(path.parent.name for path in workdir.glob(f"seed-*/{run_files.CHECKPOINTS}")):
            raise UserError(f"{workdir} holds the runs of several seeds\n  use one of them: {', '.join(own)}")
        raise UserError(f"{workdir} holds no run\n  train one: python -m vit_jax.main --workdir=DIR ...")
    return options.from_dict(saved)
