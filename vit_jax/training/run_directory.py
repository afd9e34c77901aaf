"""The run directory: whether a config may start or resume a run in it, and the config that it was trained with."""

import contextlib
import errno
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import atomic, objectives
from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.errors import UserError, few, one_line
from vit_jax.runtime.attention_choice import Choice
from vit_jax.training import describe, initial_weights

MAX_SHOWN = 4  # differences in an error message


def finished(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
    """Returns the summary of the run if it is finished and the config has not changed, else None; reads only.

    None also if options have changed and steps are left to train with them.

    Raises:
        UserError: as `changes`; or options have changed and no step is left.
    """
    check_path(workdir)
    summary, newest = run_files.read_summary(workdir), newest_metadata(workdir)
    steps = None if summary is None else summary.get("steps")
    if not isinstance(steps, int) or (newest is not None and newest[0] > steps):
        return None  # the process was killed after it saved more steps, and before it removed the summary
    changed = changes(workdir, config)
    if not changed:
        return summary
    length = config.train.steps
    if length is None and not any(row.startswith(("train.steps:", "train.epochs:")) for row in changed):
        length = steps
    if length is None or length > steps:
        return None  # steps are left, or only the data tell how many
    is_finished = f"is finished: {describe.result(objectives.make(config), summary)}"
    raise no_step_left(workdir, config, changed, steps, is_finished)


def check_steps_left(workdir: Path, config: ConfigDict, num_steps: int) -> None:
    """Raises UserError if options have changed, and the newest checkpoint has all `num_steps` steps of the config."""
    newest, changed = newest_metadata(workdir), changes(workdir, config)
    if changed and newest is not None and newest[0] >= num_steps:
        raise no_step_left(workdir, config, changed, newest[0])


def no_step_left(
    workdir: Path, config: ConfigDict, changed: list[str], step: int, state: str | None = None
) -> UserError:
    """Returns the error for a config that differs from the one that the steps were trained with, and adds no step.

    Args:
        workdir: the run directory.
        config: the new config.
        changed: the options that differ, from `changes`.
        step: to which the run was trained.
        state: 'is finished: ...'; None if the last checkpoint was saved, but the run did not finish.
    """
    names = {row.partition(":")[0] for row in changed}
    splits = [config.data[role] for role in ("test", "validation") if f"data.{role}" in names and config.data[role]]
    if splits and names <= {"data.test", "data.validation"}:
        where = f"--workdir={shlex.quote(str(workdir))} --split={shlex.quote(splits[0])}"
        way_out = f"to score it on that split: python -m vit_jax.evaluate {where}"
    else:
        finish = "" if state else "the same config finishes it; "
        way_out = (
            f"{finish}for another experiment use another --workdir; to train on, set more than {step:,} steps: "
            "--config.train.steps=N"
        )
    state = state or f"was trained to step {step:,}, and no step is left to train with another config"
    return UserError(f"{workdir} {state}\n  differs: {_few_rows(changed)}\n  {way_out}")


def _few_rows(rows: list[str]) -> str:
    more = f"; and {len(rows) - MAX_SHOWN} more" if len(rows) > MAX_SHOWN else ""
    return f"{'; '.join(rows[:MAX_SHOWN])}{more}"


def claim(workdir: Path, config: ConfigDict) -> list[str]:
    """Creates the run directory if it does not exist, and returns the `changes` of the config.

    Raises:
        UserError: it cannot be written to, or as `changes`.
    """
    _check_writable(workdir)
    return changes(workdir, config)


def changes(workdir: Path, config: ConfigDict) -> list[str]:
    """Returns the options that differ from those that the run was trained with, and may: 'train.steps: 100 -> 200'.

    Raises:
        UserError: the directory holds a run with another config, whose differences are named.
    """
    old = recorded_config(workdir)
    if old is None:
        return []
    # Options that did not exist when the run began are at their defaults.
    old, new = options.complete(old), config.to_dict()
    if initial_weights.is_same(workdir, old["checkpoint"]["init_from"], new["checkpoint"]["init_from"]):
        new["checkpoint"]["init_from"] = old["checkpoint"]["init_from"]
    if refused := options.differences(old, new, resume=("fixed",)):
        raise UserError(
            f"--workdir={workdir} holds a run with another config\n"
            f"  differs: {_few_rows(refused)}\n  use another --workdir, or the same config"
        )
    return options.differences(old, new, resume=("changeable",))


def recorded_config(workdir: Path) -> dict[str, Any] | None:
    """Returns the config of the run that has begun in a directory, as nested dictionaries; None if there is no run.

    It is that of the newest checkpoint, even if config.json was removed or edited. It is config.json before the first
    checkpoint, and if the last one of a finished run is lost.

    Raises:
        UserError: config.json is needed and cannot be read.
    """
    newest, summary = newest_metadata(workdir), run_files.read_summary(workdir)
    is_lost = newest is not None and summary is not None and summary.get("steps", 0) > newest[0]
    if newest is not None and newest[1].get("config") is not None and not is_lost:
        return newest[1]["config"]
    config = run_files.read_config(workdir)
    # Without records or checkpoints there is nothing to lose: the config may change freely.
    return config if has_begun(workdir) else None


def newest_metadata(workdir: Path) -> tuple[int, dict[str, Any]] | None:
    """Returns the step and the metadata of the newest checkpoint whose metadata is intact; None if there is none."""
    checkpoints = CheckpointManager(workdir, read_only=True)
    with contextlib.suppress(UserError):  # the checkpoints are read, and their damage reported, later
        for step in reversed(checkpoints.steps()):
            if checkpoints.has(step):
                return step, checkpoints.metadata(step)
    return None


def check_path(workdir: Path) -> None:
    """Raises UserError if there can be no directory of this name: it is too long, below a file, or a loop of links."""
    try:
        if not stat.S_ISDIR(os.stat(workdir).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}\n  use another --workdir") from error


def _check_writable(workdir: Path) -> None:
    try:
        atomic.make_directory(workdir)
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
    has_records = (metrics.exists() and metrics.stat().st_size > 0) or (workdir / run_files.SUMMARY).exists()
    begun = has_records or any(
        (workdir / name).is_dir() and any((workdir / name).iterdir())
        for name in (run_files.CHECKPOINTS, run_files.DAMAGED)
    )
    return begun or any(has_begun(run) for run in workdir.glob("seed-*"))  # the runs of several seeds


def attention_choice(workdir: Path) -> Choice | None:
    """Returns the attention backend that environment.json records, or None if it records none or is damaged.

    Raises:
        UserError: the operating system cannot read environment.json.
    """
    try:
        return Choice(**run_files.read_json(workdir / run_files.ENVIRONMENT)["attention"])
    except (KeyError, TypeError):
        return None


@contextlib.contextmanager
def invalid_config_explained(workdir: Path) -> Iterator[None]:
    """Turns the ValueError of a model that config.json describes and that cannot be built into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"{workdir / run_files.CONFIG} is not valid: {one_line(error)}\n"
            f"  restore it: python -m vit_jax.checkpoints restore-config {workdir}"
        ) from error


def trained_config(workdir: Path) -> ConfigDict:
    """Returns the config of a run directory with checkpoints.

    Raises:
        UserError: it holds no run or the runs of several seeds, or its config cannot be read.
    """
    above = [one for one in list(Path(os.path.abspath(workdir)).parents)[:2] if run_files.has_checkpoints(one)]
    if above and not run_files.has_checkpoints(workdir):
        raise UserError(f"{workdir} is a part of the run {above[0]}\n  use that directory; step selects a checkpoint")
    has_steps = any(workdir.glob(f"{run_files.CHECKPOINTS}/[0-9]*"))
    # A config.json beside weights is of another project.
    if workdir.is_file() or (any(workdir.glob("*.safetensors")) and not has_steps):
        what = "is a file" if workdir.suffix == ".json" else "holds weights"
        raise UserError(
            f"{workdir} {what}, not a run\n"
            f"  use --init={workdir} with vit_jax.predict and vit_jax.transfer, or --weights with vit_jax.evaluate\n"
            f"  from Python: Predictor(of_file({str(workdir)!r}))"
        )
    saved = run_files.read_config(workdir)
    if saved is None and newest_metadata(workdir) is not None:
        raise UserError(
            f"{workdir / run_files.CONFIG} is missing\n"
            f"  restore it: python -m vit_jax.checkpoints restore-config {workdir}"
        )
    if saved is None or not run_files.has_checkpoints(workdir):
        if below := sorted(path.parent.name for path in workdir.glob(f"*/{run_files.CHECKPOINTS}")):
            several = "holds the runs of several seeds" if below[0].startswith("seed-") else "holds no run itself"
            raise UserError(f"{workdir} {several}\n  use one of those in it: {few(below)}")
        raise UserError(f"{workdir} holds no run\n  train one: python -m vit_jax.main --workdir=DIR ...")
    return options.from_dict(saved)
