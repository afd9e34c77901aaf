"""What the commands on a trained run share: their flags, the way from those to model and data, their exit status."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax import config as options
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.training.run import Run
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
    try:
        return action() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


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
        UserError: no run in the folder, no such checkpoint or split, or data that cannot be had.
    """
    from vit_jax.training import run, workdir
    from vit_jax.training.checkpoint import FOLDER, Checkpoints

    folder = folder_of(flags.workdir)
    saved = workdir.read_config(folder)
    if saved is None or not (folder / FOLDER).is_dir():
        raise UserError(
            f"--workdir={flags.workdir} holds no run\n  train one: python -m vit_jax.main --workdir=DIR ..."
        )
    config = options.from_dict(saved)
    config.mesh.devices = config.data.features = None  # all devices, and images also where features were trained on
    config.data.dir = flags.data_dir or config.data.dir
    if flags.batch_size is not None:
        if flags.batch_size < 1:
            raise UserError(f"--batch_size is {flags.batch_size}\n  allowed: a whole number of at least 1")
        config.train.evaluation_batch_size = flags.batch_size
    split = config.data.get(flags.split) if flags.split in SPLITS else flags.split
    if split is None:
        raise UserError(
            f"--split={flags.split}: this run has no {flags.split} split\n  allowed: train, test, or an expression"
        )
    parts = run.build(config, run.check_data(config, [split]), {"train": config.data.train, flags.split: split})
    with Checkpoints(folder, read_only=True) as checkpoints:
        best = checkpoints.best()
        if flags.best and best is None:
            raise UserError(f"--best: {folder} has no checkpoint that was validated\n  leave --best out: the newest")
        state = checkpoints.restore(parts.abstract_state(), best[0] if flags.best else flags.step)
    return Trained(folder, parts, state)


def folder_of(text: str) -> Path:
    """The folder that --workdir names.

    Raises:
        UserError: it begins with the home of a user that there is not.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"--workdir={text}: {error}") from None


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser in the style of the house."""
    return argparse.ArgumentParser(
        prog=f"python -m vit_jax.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
