"""What the commands share: exit status, config and its overrides, flags that select a trained run, opening that run."""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import paths, terminal
from vit_jax.checkpoint import orbax_logging, run_files
from vit_jax.errors import UserError, few
from vit_jax.runtime import cpu_allocator

if TYPE_CHECKING:
    from vit_jax.classifier import Classifier
    from vit_jax.training.setup import Experiment
    from vit_jax.training.state import TrainState

TEST = "test"
SPLITS = ("train", "validation", TEST)
# The flags of commands without a config for what elsewhere are its options.
DATA_FLAGS = {
    "data.dir": "--data_dir",
    "data.image_size": "--image_size",
    "data.labels": "--label",
    "data.skip_broken": None,
}


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


def _ends_process(run: Callable[[Callable], int]) -> Callable[[Callable], int]:
    """Makes the process of a command end with it, without waiting for threads or for what a signal interrupts.

    After a failed save, threads of Orbax wait for minutes, and the interpreter would wait for them at its exit.
    """

    @functools.wraps(run)
    def run_and_exit(action: Callable[[], int | None]) -> int:
        if terminal.program() is None:  # called by another program
            return run(action)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by vit_jax/__init__.py
            signal.signal(signal.SIGINT, _interrupt)
        status = run(action)
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
                stream.flush()
        os._exit(status)

    return run_and_exit


def _interrupt(*_: object) -> None:
    """Raises KeyboardInterrupt at the first Ctrl-C; a second one ends the process at once, without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


@_ends_process
def finish(action: Callable[[], int | None]) -> int:
    """Runs a command as `terminal.finish` does, in a process that computes with JAX; returns its exit status."""
    cpu_allocator.keep_memory()  # before JAX is imported
    orbax_logging.hide_background_errors()
    return terminal.finish(action)


def start_jax() -> None:
    """Starts JAX's devices, for commands that do not train; settings that the code does not support are overridden.

    Raises:
        UserError: the devices do not start.
    """
    from vit_jax.sharding import devices

    devices.override_settings()
    devices.start()


def take_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the config overrides among a command's arguments, as 'section.key=value', and the other arguments."""
    overrides, rest = [], []
    remaining = list(reversed(arguments))
    while remaining:
        argument = remaining.pop()
        if argument.startswith("--config."):
            name = argument.removeprefix("--config.")
            has_value = "=" not in name and remaining and not remaining[-1].startswith("--")
            overrides.append(f"{name}={remaining.pop()}" if has_value else name)
        else:
            rest.append(argument)
    return overrides, rest


def make_config(spec: str | ConfigDict, overrides: list[str], workdir: Path | None = None) -> ConfigDict:
    """Returns the config of 'CONFIG' or 'CONFIG:ARG' (`load_config`) with overrides, complete and checked.

    What the config takes from its initial weights or from a folder of images is taken from the run in `workdir`
    instead, if one has begun there.

    Raises:
        UserError: the file or an option is wrong.
    """
    # These import JAX, which --help must not wait for.
    from vit_jax.config.check import check_config
    from vit_jax.models import variants
    from vit_jax.sharding import devices
    from vit_jax.training import folder_config, init_from, run_directory

    if workdir is not None:
        run_directory.check_path(workdir)
    config = load_config(spec)
    devices.override_settings()
    read_in_file = options.read_options(config)
    typed, notes = options.override_all(config, overrides)
    if not _is_run_config(spec):
        options.adapt(spec, config, typed)
    read_in_file |= options.read_options(config)
    options.override_all(config, overrides)  # the command line wins
    init_from.complete_config(config, workdir)
    folder_config.complete_config(config, workdir)
    # What the file sets and the command line makes pointless, such as mix_probability with mixup=0, is no mistake.
    options.reset_unread(config, read_in_file - typed)
    check_config(config)
    # As a number in config.json, also of earlier versions.
    config.model.pre_logits = variants.fields_of_options(config.model.to_dict()).get("pre_logits")
    for note in notes:
        terminal.say(note)
    return config


def load_config(spec: str | ConfigDict) -> ConfigDict:
    """Returns the config of 'CONFIG' or 'CONFIG:ARG', of the config.json of a run, or a copy of a config; unchecked.

    Raises:
        UserError: as `config.load`, or config.json cannot be read.
    """
    if _is_run_config(spec):
        return options.from_dict(run_files.read_config(paths.expand(spec, "--config").parent))
    return options.load(spec)


def _is_run_config(spec: str | ConfigDict) -> bool:
    return isinstance(spec, str) and Path(spec).name == run_files.CONFIG and Path(spec).is_file()


def default_workdir(spec: str) -> Path:
    """Returns the default run directory of a config: runs/cifar10-cpu for cifar10:cpu; that of a run's config.json."""
    if Path(spec).name == run_files.CONFIG:
        directory = Path(spec).parent
        return directory if directory.name not in ("", "..") else Path(os.path.abspath(directory))
    path, argument = options.split(spec)
    words = re.split(r"\s*,\s*", argument.replace("/", "_")) if argument else []
    return Path("runs") / "-".join([Path(path).name.removesuffix(".py"), *words])


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns an empty parser for the command of the module `name`; it prints the description as it is written.

    In the description, %(prog)s stands for how the command was started, and %% for a percent sign.
    """
    return terminal.Parser(
        prog=terminal.prog(f"vit_jax.{name}"),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_flags(parser: argparse.ArgumentParser, init: bool = False) -> None:
    """Adds the flags that select a run, a checkpoint and a split; with `init`, also those for weights in its place."""
    source = parser.add_mutually_exclusive_group(required=True) if init else parser
    source.add_argument("--workdir", metavar="DIR", required=not init, help="run directory")
    if init:
        source.add_argument("--init", metavar="FILE", help="or weights: a file, URL or name (docs/weights.md)")
        add_image_flags(parser)
    parser.add_argument(
        "--split",
        default=None if init else TEST,
        help="train, validation or test as in the run's config, or a split expression such as 'train[:1000]' "
        f"(default: {TEST})",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="use the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="use the checkpoint with the best validation result")
    parser.add_argument(
        "--batch_size", type=int, help="examples per batch; does not change the result (default: the run's)"
    )
    parser.add_argument("--data_dir", metavar="DIR", help="directory of the dataset (default: the run's)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that select a run and a checkpoint, or weights in its place."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="run directory of the model")
    source.add_argument("--init", metavar="FILE", help="or its weights: a file, URL or name (docs/weights.md)")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--step", type=int, help="with --workdir: use the checkpoint of this step (default: the newest)")
    step.add_argument(
        "--best", action="store_true", help="with --workdir: use the checkpoint with the best validation result"
    )


def images_below(named: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Returns the paths of images, those below directories included, and notes about what was left out.

    Raises:
        UserError: there are none.
    """
    from vit_jax.data import user_images

    notes: list[str] = []
    images = list(user_images.expand((paths.expand(path, "IMAGE_OR_DIRECTORY") for path in named), notes.append))
    if not images:
        left_out = f"{few(notes)}\n  " if notes else ""
        raise UserError(f"no images found below {few(named)}\n  {left_out}allowed: image files or directories")
    return images, notes


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that replace what weights record of their images."""
    parser.add_argument(
        "--image_size", type=int, metavar="N", help="with --init: side in pixels (default: that of the weights)"
    )
    parser.add_argument(
        "--normalize",
        help="with --init: normalize images by mean and std 0.5 (half), those of ImageNet (imagenet) or CLIP (clip), "
        "or numbers, 0.5,0.5,0.5/0.25,0.25,0.25 (default: as the file says, or as its family was trained)",
    )


def add_classes_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that replace the class names of weights, or name the classes of those that embed texts."""
    parser.add_argument(
        "--classes",
        metavar="TXT",
        help="with --init: text file with one class name per line, imagenet, or names as in cat,dog (default: those of "
        "the file); for models that embed texts, any names, or a prompt for those of ImageNet",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="with --init, for models that embed texts: a text with {} for the class name; several times for the mean "
        "of several (default: 'a photo of a {}')",
    )


def classifier_of(flags: argparse.Namespace) -> "Classifier":
    """Returns the model of --init, with the preprocessing and class names of the other flags.

    Raises:
        UserError: as `zero_shot.of_file`, or the file of --classes cannot be read.
    """
    from vit_jax import zero_shot

    named = zero_shot.flag_values(flags.classes, flags.prompt)
    return zero_shot.of_file(flags.init, **named, image_size=flags.image_size, normalize=flags.normalize)


def check_flags(flags: argparse.Namespace, of_run: Sequence[str], of_init: Sequence[str]) -> None:
    """Checks the flags of a command that takes --workdir or --init.

    Args:
        flags: of `add_flags` and of the command.
        of_run: names of flags that only --workdir uses.
        of_init: names of flags that only --init uses.

    Raises:
        UserError: a flag of the other one is set, or a number is below 1.
    """
    for name in ("batch_size", "image_size"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} is {getattr(flags, name)}\n  allowed: an integer of at least 1")
    source, other = ("--workdir", "--init") if flags.workdir else ("--init", "--workdir")
    for name in of_init if flags.workdir else of_run:
        if getattr(flags, name) not in (None, False):
            raise UserError(f"--{name} cannot be combined with {source}\n  omit it, or use {other}")
    if flags.init:
        paths.check_source(flags.init, "--init")


def dataset_of(
    flags: argparse.Namespace, splits: Sequence[str]
) -> tuple[str, str | None, tuple[int, int] | None, float | None]:
    """Returns name and directory of the dataset of --data for --init, the image size of a run, and `data.held_out`.

    If --init is a run directory, the dataset is by default that of the run.

    Raises:
        UserError: --data is missing and --init is not a run.
    """
    from vit_jax.checkpoint import input_spec
    from vit_jax.training import folder_config, run_directory

    init = paths.expand(flags.init, "--init")
    config = run_directory.trained_config(init) if (init / run_files.CHECKPOINTS).is_dir() else None
    if config is None:
        if flags.data is None:
            raise UserError(f"--data is missing: {flags.init} is not a run directory\n  for example: --data=cifar10")
        return flags.data, flags.data_dir, None, folder_config.fraction(flags.data, flags.data_dir, splits)
    is_own = flags.data in (None, config.data.name)
    inputs = input_spec.read(init)
    size = inputs.image_shape[:2] if inputs else config.data.image_size and (config.data.image_size,) * 2
    name, data_dir = flags.data or config.data.name, flags.data_dir or (config.data.dir if is_own else None)
    return name, data_dir, size, config.data.held_out if is_own else folder_config.fraction(name, data_dir, splits)


def open_run(flags: argparse.Namespace) -> Trained:
    """Returns the run that `add_flags`' flags select, with the data of its split and the state of its checkpoint.

    Raises:
        UserError: there is no run, checkpoint or split as requested, the data is missing, or `--weights` does not fit.
    """
    from vit_jax.training import run_directory

    if getattr(flags, "weights", None) is not None:  # a flag of some commands only
        paths.check_source(flags.weights, "--weights")
    workdir = paths.expand(flags.workdir, "--workdir")
    start_jax()
    config = run_directory.trained_config(workdir)
    config.mesh.devices = config.data.features = None  # all devices; images, even if the run used stored features
    config.data.dir = flags.data_dir or config.data.dir
    with flags_named({"data.dir": "--data_dir"}):
        return _open_run(flags, workdir, config)


@contextlib.contextmanager
def flags_named(flags: Mapping[str, str | None]) -> Iterator[None]:
    """Names a command's own flags in error messages, for a command in which options of a config cannot be set.

    Args:
        flags: the flag of an option, by 'section.key'; None if there is none: the advice to set it is left out.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
        for name, flag in flags.items():
            if flag is None:
                message = re.sub(rf",? or set config\.{name}\b.*", "", message)
                continue
            message = re.sub(rf"(--)?config\.{name}\b", flag, message).replace(f"{flag} ({flag})", flag)
        raise UserError(message) from error


def _open_run(flags: argparse.Namespace, workdir: Path, config: ConfigDict) -> Trained:
    from vit_jax.checkpoint import input_spec
    from vit_jax.checkpoint.manager import CheckpointManager
    from vit_jax.training import init_from, run_directory, setup

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
    with CheckpointManager(workdir, read_only=True) as checkpoints:
        step = checkpoints.find("best" if flags.best else flags.step)
        with run_directory.invalid_config_explained(workdir):
            init_from.check_depth(config, checkpoints.content(step))
            mesh, attention = setup.check_data(config, [split]), run_directory.attention_choice(workdir)
            run = setup.assemble(config, mesh, setup.load_sources(config, splits), attention=attention, training=False)
        if run.objective.needs_labels:
            input_spec.check_classes(workdir, run.sources["train"].class_names_by_label())
        state = init_from.restore(run, checkpoints, step)
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
