"""The command: python -m vit_jax.evaluate --workdir=DIR [--split=test] [--step=N | --best]."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vit_jax import config as options
from vit_jax.errors import UserError

DESCRIPTION = """\
Scores a trained model on every example of a split, once each, and prints one JSON line.

  python -m vit_jax.evaluate --workdir=runs/digits
  python -m vit_jax.evaluate --workdir=runs/cifar10 --split=validation --best
  python -m vit_jax.evaluate --workdir=runs/cifar10 --split='train[:1000]'
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's flags; --help and mistakes end the process, the latter with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", metavar="DIR", required=True, help="the folder of a run")
    parser.add_argument(
        "--split",
        default="test",
        help="test, validation or train as the run has them, or any split expression of the set",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the best validation accuracy")
    parser.add_argument("--batch_size", type=int, help="examples at a time (default: the run's); changes no result")
    parser.add_argument("--data_dir", help="where TFDS keeps its sets (default: the run's)")
    return parser.parse_args(arguments)


def evaluate(flags: argparse.Namespace) -> dict[str, Any]:
    """The metrics of a checkpoint on a split, with the step they are of.

    Raises:
        UserError: no run in the folder, no such checkpoint or split, or data that cannot be had.
    """
    from vit_jax.training import evaluate, run, workdir
    from vit_jax.training.checkpoint import FOLDER, Checkpoints

    folder = Path(flags.workdir).expanduser()
    saved = workdir.read_config(folder)
    if saved is None or not (folder / FOLDER).is_dir():
        raise UserError(
            f"--workdir={flags.workdir} holds no run\n  train one: python -m vit_jax.main --workdir=DIR ..."
        )
    config = options.from_dict(saved)
    config.mesh.devices = None
    config.data.dir = flags.data_dir or config.data.dir
    if flags.batch_size is not None:
        if flags.batch_size < 1:
            raise UserError(f"--batch_size is {flags.batch_size}\n  allowed: a whole number of at least 1")
        config.train.evaluation_batch_size = flags.batch_size
    split = config.data.get(flags.split) if flags.split in ("train", "validation", "test") else flags.split
    if split is None:
        raise UserError(
            f"--split={flags.split}: this run has no {flags.split} split\n  allowed: train, test, or an expression"
        )
    mesh = run.check_data(config, [split])
    parts = run.build(config, mesh, {"train": config.data.train, flags.split: split})
    with Checkpoints(folder, read_only=True) as checkpoints:
        best = checkpoints.best()
        if flags.best and best is None:
            raise UserError(
                f"--best: {folder} has no checkpoint with a validation accuracy\n  leave --best out: the newest"
            )
        state = checkpoints.restore(parts.abstract_state(), best[0] if flags.best else flags.step)
    scorer = evaluate.make_scorer(parts.model, parts.augment, mesh)
    size = parts.evaluation_batch_size()
    metrics = evaluate.evaluate(scorer, state.for_evaluation(), parts.feeds(flags.split), size, flags.split)
    return {"step": int(state.step), **metrics}


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    flags = parse(arguments)
    try:
        print(json.dumps(evaluate(flags)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
