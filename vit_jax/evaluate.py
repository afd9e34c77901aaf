"""The command: python -m vit_jax.evaluate --workdir=DIR [--split=test] [--step=N | --best | --weights=FILE]."""

import argparse
import json
import sys
from typing import Any

from vit_jax import commands

DESCRIPTION = """\
Scores a trained model on every example of a split, once each, and prints one JSON line.

  python -m vit_jax.evaluate --workdir=runs/digits
  python -m vit_jax.evaluate --workdir=runs/cifar10 --split=validation --best
  python -m vit_jax.evaluate --workdir=runs/cifar10 --split='train[:1000]'
  python -m vit_jax.evaluate --workdir=runs/cifar10 --weights=mean.safetensors
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's flags; --help and mistakes end the process, the latter with status 2."""
    parser = commands.parser("evaluate", DESCRIPTION)
    commands.add_flags(parser)
    parser.add_argument("--weights", metavar="FILE", help="score these parameters of the run's model, not a checkpoint")
    flags = parser.parse_args(arguments)
    if flags.weights is not None and (flags.best or flags.step is not None):
        parser.error("--weights goes with neither --step nor --best")
    return flags


def evaluate(flags: argparse.Namespace) -> dict[str, Any]:
    """The metrics of a checkpoint or a file on a split, with the step or the file they are of.

    Raises:
        UserError: as `commands.open_run`.
    """
    from vit_jax.evaluation import exact

    trained = commands.open_run(flags)
    run, state = trained.run, trained.state
    scorer = exact.make_scorer(run.applied, run.augment, run.mesh, run.objective)
    how = (run.feeds(flags.split), run.evaluation_batch_size(), flags.split)
    metrics = exact.evaluate(scorer, state.for_evaluation(), *how, objective=run.objective)
    which = {"step": int(state.step)} if flags.weights is None else {"weights": flags.weights}
    return {**which, **metrics}


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    flags = parse(arguments)
    return commands.finish(lambda: print(json.dumps(evaluate(flags))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
