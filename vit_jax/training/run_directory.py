"""The run directory: whether a config may start or resume a run in it, and what it records about the run."""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import atomic
from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.errors import UserError, few, one_line
from vit_jax.runtime.attention_choice import Choice
from vit_jax.training import environment, initial_weights

CHANGES = "changes.jsonl"
MAX_SHOWN = 4  # differences in an error message


def finished(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
    """Returns the summary of the run if it is finished and the config has not changed, else None; reads only.

    Raises:
        UserError: as `changes`.
    """
    check_path(workdir)
    summary = run_files.read_summary(workdir)
    return None if summary is None or changes(workdir, config) else summary


def claim(workdir: Path, config: ConfigDict) -> list[str]:
    """Creates the run directory if it does not exist, and returns the `changes` of the config.

    Raises:
        UserError: it cannot be written to, or as `changes`.
    """
    _check_writable(workdir)
    return changes(workdir, config)


def changes(workdir: Path, config: ConfigDict) -> list[str]:
    """Returns the options that have changed since the run began and may: 'train.steps: 100 -> 200', ...

    Raises:
        UserError: the directory holds a run with another config, whose differences are named.
    """
    old, saved = run_files.read_config(workdir), _saved_config(workdir)
    old = saved if old is None else old
    # Without records or checkpoints there is nothing to lose: the config may change freely.
    if old is None or not has_begun(workdir):
        return []
    # Options that did not exist when the run began are at their defaults.
    old, saved, new = options.complete(old), options.complete(saved or old), config.to_dict()
    if initial_weights.is_same(workdir, old["checkpoint"]["init_from"], new["checkpoint"]["init_from"]):
        new["checkpoint"]["init_from"] = old["checkpoint"]["init_from"]
        saved["checkpoint"]["init_from"] = old["checkpoint"]["init_from"]
    if refused := options.differences(saved, new, resume=("fixed",)):
        more = f"; and {len(refused) - MAX_SHOWN} more" if len(refused) > MAX_SHOWN else ""
        raise UserError(
            f"--workdir={workdir} holds a run with another config\n"
            f"  differs: {'; '.join(refused[:MAX_SHOWN])}{more}\n  use another --workdir, or the same config"
        )
    return options.differences(old, new, resume=("changeable",))


def _saved_config(workdir: Path) -> dict[str, Any] | None:
    """The config in the newest checkpoint, which holds although config.json was removed or edited; None if none has."""
    checkpoints = CheckpointManager(workdir, read_only=True)
    with contextlib.suppress(UserError):  # the checkpoints are read, and their damage reported, later
        for step in reversed(checkpoints.steps()):
            if checkpoints.has(step):
                return checkpoints.metadata(step).get("config")
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
            atomic.remove(workdir / run_files.SUMMARY)
            path, line = workdir / CHANGES, {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "changes": changes}
            old = path.read_bytes() if path.exists() else b""
            atomic.write_bytes(path, old + atomic.to_json(line).encode() + b"\n")
        initial_weights.record(workdir, config.checkpoint.init_from)
        atomic.write_json(workdir / run_files.CONFIG, config.to_dict())
        atomic.write_json(workdir / run_files.ENVIRONMENT, environment.environment(attention))
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be written to: {error.strerror}\n  free disk space or change its permissions"
        ) from error


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
    if saved is None and _saved_config(workdir) is not None:
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
