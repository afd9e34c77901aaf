"""The command `python -m vit_jax.evaluate`."""

import argparse
import math
import sys
from typing import Any

from vit_jax import atomic, commands, terminal
from vit_jax.errors import few

DESCRIPTION = """\
Evaluates a trained model on every example of a split, each exactly once, and prints the metrics as one JSON line.

  %(prog)s --workdir=runs/digits
  %(prog)s --workdir=runs/cifar10 --split=validation --best
  %(prog)s --workdir=runs/cifar10 --split='train[:1000]'
  %(prog)s --workdir=runs/cifar10 --weights=average.safetensors

If the run averages its parameters (config.optimizer.average_decay), the average is evaluated.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("evaluate", DESCRIPTION)
    commands.add_flags(parser)
    parser.add_argument("--weights", metavar="FILE", help="evaluate the parameters in this file, not a checkpoint")
    flags = parser.parse_args(arguments)
    if flags.weights is not None and (flags.best or flags.step is not None):
        parser.error("--weights cannot be combined with --step or --best")
    return flags


def evaluate(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the metrics on the split, and the checkpoint's step or the weights file.

    Raises:
        UserError: as `commands.open_run`.
    """
    trained = commands.open_run(flags)
    run, state = trained.run, trained.state
    metrics = run.evaluate(state.for_evaluation(), flags.split)
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
        terminal.warn(f"warning: {few(wrong)} is not finite: null in the result")
    evaluated = {"step": int(state.step)} if flags.weights is None else {"weights": flags.weights}
    return {**evaluated, **metrics}


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: terminal.output(atomic.to_json(evaluate(parse(arguments)))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
