"""What the commands on a trained run share: their flags, the way from those to model and data, their exit status."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.errors import UserError
from vit_jax.runtime import cpu_allocator
from vit_jax.training import init_from

if TYPE_CHECKING:
    from vit_jax.training.setup import Run
    from vit_jax.training.state import TrainState

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained run, opened for one split.

    Attributes:
        folder: its workdir.
        run: its parts; sources are 'train' and what was asked for.
        state: of the checkpoint.
    """

    folder: Path
    run: "Run"
    state: "TrainState"


def finish(action: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status; what it cannot do ends in its message and status 2."""
    cpu_allocator.keep_memory()  # before anything imports JAX
    try:
        status = action() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has seen enough; the interpreter shall not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def take_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The overrides among a command's arguments, as 'section.key=value', and the other arguments."""
    overrides, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith("--config."):
            name = argument.removeprefix("--config.")
            overrides.append(name if "=" in name else f"{name}={next(remaining, '')}")
        else:
            rest.append(argument)
    return overrides, rest


def make_config(spec: str, overrides: list[str]) -> ConfigDict:
    """The config of 'FILE' or 'FILE:ARG' with overrides, complete and checked.

    Raises:
        UserError: what is wrong with it.
    """
    config = options.load(spec)
    for assignment in overrides:
        options.override(config, assignment)
    init_from.take_model(config)
    options.check(config)
    return config


def default_workdir(spec: str) -> Path:
    """runs/cifar10-cpu for configs/cifar10.py:cpu, below the current folder."""
    path, _, argument = spec.partition(":")
    return Path("runs") / "-".join([Path(path).stem, *([argument.replace("/", "_")] if argument else [])])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which run, which of its checkpoints, and which data."""
    parser.add_argument("--workdir", metavar="DIR", required=True, help="the folder of a run")
    parser.add_argument(
        "--split",
        default="test",
        help="test (the default), validation or train as the run has them, or any split expression of the set",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint that is best on validation")
    parser.add_argument("--batch_size", type=int, help="examples at a time (default: the run's); changes no result")
    parser.add_argument("--data_dir", help="where TFDS keeps its sets (default: the run's)")


def open_run(flags: argparse.Namespace) -> Trained:
    """The run of a workdir, its data for the split that is asked for, and the state of its checkpoint.

    Raises:
        UserError: no run in the folder, no such checkpoint or split, data that cannot be had, or other weights.
    """
    from vit_jax.checkpoint.manager import Checkpoints
    from vit_jax.training import run_directory, setup

    folder = folder_of(flags.workdir)
    config = run_directory.trained_config(folder)
    config.mesh.devices = config.data.features = None  # all devices, and images also where features were trained on
    config.data.dir = flags.data_dir or config.data.dir
    if flags.batch_size is not None:
        if flags.batch_size < 1:
            raise UserError(f"--batch_size is {flags.batch_size}\n  allowed: a whole number of at least 1")
        config.train.evaluation_batch_size = flags.batch_size
    split = config.data.get(flags.split) if flags.split in SPLITS else flags.split
    if split is None:
        known = ", ".join(name for name in SPLITS if config.data.get(name) is not None)
        raise UserError(
            f"--split={flags.split}: this run has no {flags.split} split\n  allowed: {known}, or an expression"
        )
    splits = {"train": config.data.train, flags.split: split}
    mesh, began_with = setup.check_data(config, [split]), run_directory.attention_choice(folder)
    parts = setup.build(config, mesh, splits, attention=began_with, training=False)
    with Checkpoints(folder, read_only=True) as checkpoints:
        best = checkpoints.best()
        if flags.best and best is None:
            raise UserError(f"--best: {folder} has no checkpoint that was validated\n  leave --best out: the newest")
        state = checkpoints.restore(parts.abstract_state(), best[0] if flags.best else flags.step)
    path = getattr(flags, "weights", None)  # not every command takes it
    if path is not None:
        state = state.replace(parameters=_weights(path, parts), averaged=None)
    return Trained(folder, parts, state)


def _weights(path: str, run: "Run") -> Any:
    """The parameters of a run's model from a file that has all of them, its heads included."""
    from vit_jax import weights

    parameters, report = weights.load_into(path, run.model, run.image_shape[:2], run.image_shape[2])
    missing = [row.paths[0] for row in report.rows if row.action == "initialised"]
    if missing:
        raise UserError(f"--weights={path} has no {missing[0]} for this run: the classes differ")
    return parameters


def folder_of(text: str) -> Path:
    """The folder that --workdir names.

    Raises:
        UserError: it begins with the home of a user that there is not.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"--workdir={text}: {error}") from None


def step_of(text: str | None) -> int | str | None:
    """The checkpoint that --step names: a step, 'best', or None for the newest.

    Raises:
        UserError: it is neither.
    """
    if text in (None, "best"):
        return text
    if not text.isdecimal():
        raise UserError(f"--step={text}\n  allowed: a whole number, or best")
    return int(text)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser in the style of the house."""
    return argparse.ArgumentParser(
        prog=f"python -m vit_jax.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
