"""The command: python -m vit_jax.sweep --config=FILE[:ARG] --rates=R,R,... [--workdir=DIR] [--config....=...]."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import commands
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.objectives.base import Objective

DESCRIPTION = """\
Finds the learning rate: trains each on a part of the training split, judges it by the rest, and trains the best one on
all of it. The test split is read once, by that last run. The same command again goes on where it stopped.

  python -m vit_jax.sweep --config=configs/cifar10.py:cpu --rates=.0005,.001,.002,.004
  python -m vit_jax.sweep --config=configs/finetune.py:oxford_iiit_pet --rates=.001,.003,.01,.03 --held_out=10 \\
      --config.checkpoint.init_from=ViT-B_16.npz

Any option can be set as in python -m vit_jax.main. Where the config has a validation split, that is what judges, and
the last run is trained on both. The results: sweep.md, sweep.png and sweep.json in the workdir, and a run's folder for
each rate and for the last run.
"""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's flags, and the overrides as 'section.key=value'; --help and mistakes end the process."""
    overrides, rest = commands.take_overrides(arguments)
    parser = commands.parser("sweep", DESCRIPTION)
    parser.add_argument("--config", metavar="FILE[:ARG]", required=True, help="as of python -m vit_jax.main")
    parser.add_argument("--rates", metavar="R,R,...", required=True, help="peak learning rates, in their order")
    parser.add_argument("--workdir", metavar="DIR", help="where results go (default: runs/<config name>-sweep)")
    parser.add_argument(
        "--held_out",
        metavar="PERCENT",
        type=float,
        default=2.0,
        help="of the training split, where the config has no validation split (default: 2)",
    )
    return parser.parse_args(rest), overrides


def read_rates(text: str) -> tuple[float, ...]:
    """The learning rates in '.001,.003,.01'.

    Raises:
        UserError: one of them is none, or is there twice.
    """
    try:
        rates = tuple(float(word) for word in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise UserError(f"--rates={text}\n  allowed: numbers above 0 with commas between them, as .001,.003,.01,.03")
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        raise UserError(f"--rates={text}\n  allowed: each rate once")
    return rates


def sweep(arguments: list[str]) -> None:
    """Runs the sweep that the arguments ask for, and prints its table.

    Raises:
        UserError: what is wrong, and the way out.
    """
    flags, overrides = parse(arguments)
    chosen = read_rates(flags.rates)
    if not 0 < flags.held_out < 100:
        raise UserError(f"--held_out={flags.held_out:g}\n  allowed: per cent, above 0 and below 100")
    config = commands.make_config(flags.config, overrides)
    # Imported only now: what is wrong with the line typed is said at once.
    from vit_jax.runtime import compilation_cache
    from vit_jax.sharding import multihost
    from vit_jax.training import lr_sweep

    compilation_cache.cache_compilations()
    multihost.initialize(config.mesh.distributed)
    say = print if multihost.is_rank_0() else lambda *_: None
    folder = commands.folder_of(flags.workdir) if flags.workdir else _default_workdir(flags.config)
    content = lr_sweep.sweep(lr_sweep.plan(config, chosen, flags.held_out), folder, lambda text: say(f"sweep: {text}"))
    if content is None:
        say("sweep: stopped; the same command goes on from here")
        return
    if multihost.is_rank_0():
        _report(folder, content)
    say(f"\n{table(content)}\nresults are in {folder}: sweep.md, sweep.png, sweep.json")


def _default_workdir(spec: str) -> Path:
    folder = commands.default_workdir(spec)
    return folder.with_name(f"{folder.name}-sweep")


def table(content: dict[str, Any]) -> str:
    """The results as Markdown: one row per learning rate, which was chosen, and the final run."""
    from vit_jax.training import progress, trainer

    objective = _objective(content)
    metrics = ["accuracy", "loss"] if objective.primary_metric == "accuracy" else ["loss"]
    rows = [
        f"| learning rate | {' | '.join(f'validation {name}' for name in metrics)} | steps | training |",
        "|---" * (len(metrics) + 3) + "|",
    ]
    for trial in content["trials"]:
        rate = f"{trial['learning_rate']:g}"
        rate = f"**{rate}**" if trial["learning_rate"] == content["best"] else rate
        if "failed" in trial:
            cells = [rate, trial["failed"], *[""] * (len(metrics) + 1)]
        else:
            cells = [rate, *(_shown(trial, name) for name in metrics)]
            cells += [f"{trial['steps']:,}", progress.clock(trial["seconds"])]
        rows.append("".join(f"| {cell} " if cell else "| " for cell in cells) + "|")
    final = {name: value for name, value in content["final"].items() if name != "folder"}
    splits, counts = content["splits"], {trial.get("validation/examples") for trial in content["trials"]} - {None}
    return "\n".join(
        [
            *rows,
            "",
            f"Trained on {splits['train']}, chosen by {splits['validation']} ({max(counts):,} examples): "
            f"{content['best']:g}. With it, on {splits['everything']}: {trainer.describe(objective, final)}.",
        ]
    )


def _objective(content: dict[str, Any]) -> "Objective":
    from vit_jax import config as options
    from vit_jax import objectives

    return objectives.make(options.from_dict(content["config"]))


def _value(trial: dict[str, Any], metric: str) -> float:
    """A validation metric; an accuracy in per cent."""
    return trial[f"validation/{metric}"] * (100 if metric == "accuracy" else 1)


def _shown(trial: dict[str, Any], metric: str) -> str:
    value = _value(trial, metric)
    return f"{value:.2f} %" if metric == "accuracy" else f"{value:.4f}"


def _report(folder: Path, content: dict[str, Any]) -> None:
    from vit_jax import chart

    metric = _objective(content).primary_metric
    finished = [trial for trial in content["trials"] if "failed" not in trial]
    points = [(trial["learning_rate"], _value(trial, metric)) for trial in finished]
    label = "validation accuracy, %" if metric == "accuracy" else f"validation {metric}"
    try:
        (folder / "sweep.md").write_text(table(content) + "\n")
        chart.draw(points, "learning rate", label, content["best"]).save(folder / "sweep.png")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}\n  make room there") from error


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: sweep(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
