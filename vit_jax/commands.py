"""What the commands share: exit status, config and its overrides, flags that select a trained run, opening that run."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.checkpoint import orbax_logging
from vit_jax.errors import UserError
from vit_jax.runtime import cpu_allocator

if TYPE_CHECKING:
    from vit_jax.training.setup import Experiment
    from vit_jax.training.state import TrainState

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained run, opened for one split.

    Attributes:
        workdir: the run directory.
        run: its parts; the sources are 'train' and the requested split.
        state: of the requested checkpoint.
    """

    workdir: Path
    run: "Experiment"
    state: "TrainState"


def finish(action: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status; a `UserError` is printed and gives status 2."""
    cpu_allocator.keep_memory()  # before JAX is imported
    orbax_logging.hide_background_errors()
    try:
        status = action() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader closed the pipe; without this, the interpreter would fail again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def take_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the config overrides among a command's arguments, as 'section.key=value', and the other arguments."""
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
    """Returns the config of 'FILE' or 'FILE:ARG' with overrides, complete and checked.

    Raises:
        UserError: the file or an option is wrong.
    """
    # These import JAX, which --help must not wait for.
    from vit_jax.config.check import check_config
    from vit_jax.training import init_from

    config = options.load(spec)
    read_in_file = options.read_options(config)
    typed = {options.override(config, assignment) for assignment in overrides}
    init_from.complete_config(config)
    # What the file sets and the command line makes pointless, such as mix_probability with mixup=0, is no mistake.
    options.reset_unread(config, read_in_file - typed)
    check_config(config)
    return config


def default_workdir(spec: str) -> Path:
    """Returns the default run directory of a config: runs/cifar10-cpu for configs/cifar10.py:cpu."""
    path, _, argument = spec.partition(":")
    return Path("runs") / "-".join([Path(path).stem, *([argument.replace("/", "_")] if argument else [])])


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns an empty parser for `python -m vit_jax.<name>` that prints the description as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m vit_jax.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that select a run, a checkpoint and a split."""
    parser.add_argument("--workdir", metavar="DIR", required=True, help="run directory")
    parser.add_argument(
        "--split",
        default="test",
        help="train, validation or test as in the run's config, or a split expression such as 'train[:1000]' "
        "(default: %(default)s)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="use the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="use the checkpoint with the best validation result")
    parser.add_argument(
        "--batch_size", type=int, help="examples per batch; does not change the result (default: the run's)"
    )
    parser.add_argument("--data_dir", metavar="DIR", help="directory of the dataset (default: the run's)")


def open_run(flags: argparse.Namespace) -> Trained:
    """Returns the run that `add_flags`' flags select, with the data of its split and the state of its checkpoint.

    Raises:
        UserError: there is no run, checkpoint or split as requested, the data is missing, or `--weights` does not fit.
    """
    from vit_jax.checkpoint.manager import CheckpointManager
    from vit_jax.training import init_from, run_directory, setup

    workdir = expand_path(flags.workdir, "--workdir")
    config = run_directory.trained_config(workdir)
    config.mesh.devices = config.data.features = None  # all devices; images, even if the run used stored features
    config.data.dir = flags.data_dir or config.data.dir
    if flags.batch_size is not None:
        if flags.batch_size < 1:
            raise UserError(f"--batch_size is {flags.batch_size}\n  allowed: an integer of at least 1")
        config.train.evaluation_batch_size = flags.batch_size
    split = config.data.get(flags.split) if flags.split in SPLITS else flags.split
    if split is None:
        known = ", ".join(name for name in SPLITS if config.data.get(name) is not None)
        raise UserError(
            f"--split={flags.split}: this run has no {flags.split} split\n  allowed: {known}, or a split expression"
        )
    splits = {"train": config.data.train, flags.split: split}
    mesh, attention = setup.check_data(config, [split]), run_directory.attention_choice(workdir)
    run = setup.assemble(config, mesh, setup.load_sources(config, splits), attention=attention, training=False)
    with CheckpointManager(workdir, read_only=True) as checkpoints:
        state = init_from.restore(run, checkpoints, checkpoints.find("best" if flags.best else flags.step))
    weights_file = getattr(flags, "weights", None)  # a flag of some commands only
    if weights_file is not None:
        state = state.replace(parameters=_load_weights(weights_file, run), averaged=None)
    return Trained(workdir, run, state)


def _load_weights(path: str, run: "Experiment") -> Any:
    """Returns the parameters of a run's model from a file that has all of them, including the heads."""
    from vit_jax import weights

    parameters, report = weights.load_into(path, run.model, run.image_shape[:2], run.image_shape[2])
    missing = [row.paths[0] for row in report.rows if row.action == "initialized"]
    if missing:
        raise UserError(f"--weights={path} has no {missing[0]} for this run\n  use a file with the same classes")
    return parameters


def expand_path(text: str, flag: str) -> Path:
    """Returns a path given on the command line, with '~' and '~user' expanded.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{flag}={text}: {error}") from None


def parse_step(text: str | None) -> int | str | None:
    """Returns the checkpoint that `--step` selects: a step, 'best', or None for the newest.

    Raises:
        UserError: it is neither.
    """
    if text in (None, "best"):
        return text
    if not text.isdecimal():
        raise UserError(f"--step is {text!r}\n  allowed: an integer, or best")
    return int(text)
