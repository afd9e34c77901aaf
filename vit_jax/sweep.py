"""The command: python -m vit_jax.sweep --config=FILE[:ARG] --rates=R,R,... [--workdir=DIR] [--config....=...]."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import commands, paths, progress, terminal
from vit_jax import config as options
from vit_jax.errors import UserError

DESCRIPTION = """\
Finds the learning rate: trains with each one on a part of the training split, compares them on the rest, and trains
with the best one on the whole split. The test split is used once, by that final run. The same command again resumes.

  %(prog)s --config=cifar10:cpu --rates=.0005,.001,.002,.004
  %(prog)s --config=finetune:oxford_iiit_pet --rates=.001,.003,.01,.03 --held_out=10 \\
      --config.checkpoint.init_from=augreg-b16-in21k

All options of vit-jax train can be set. If the config has a validation split, learning rates are compared on
that, and the final run trains on both splits. The workdir holds the results (sweep.md, sweep.png and sweep.json) and a
run directory for each learning rate and for the final run.
"""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the overrides, as 'section.key=value'; exits for --help and for mistakes."""
    overrides, rest = commands.take_overrides(arguments)
    parser = commands.parser("sweep", DESCRIPTION)
    parser.add_argument("--config", metavar="CONFIG[:ARG]", required=True, help="config, as for training")
    parser.add_argument("--rates", metavar="R,R,...", required=True, help="peak learning rates, tried in this order")
    parser.add_argument("--workdir", metavar="DIR", help="directory of the results (default: runs/<config name>-sweep)")
    parser.add_argument(
        "--held_out",
        metavar="PERCENT",
        type=float,
        help="part of the training split to hold out, if the config has no validation split (default: 2)",
    )
    return parser.parse_args(rest), overrides


def read_rates(text: str) -> tuple[float, ...]:
    """Returns the learning rates in text such as '.001,.003,.01'.

    Raises:
        UserError: one of them is not a positive number, or is listed twice.
    """
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise UserError(f"--rates={text}\n  allowed: positive numbers separated by commas, such as .001,.003,.01,.03")
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        raise UserError(f"--rates={text}\n  allowed: different numbers")
    return rates


def sweep(arguments: list[str]) -> None:
    """Runs the sweep and prints its table.

    Raises:
        UserError: a mistake in the arguments, or as `lr_sweep.plan` and `lr_sweep.sweep`.
    """
    flags, overrides = parse(arguments)
    rates = read_rates(flags.rates)
    held_out = 2.0 if flags.held_out is None else flags.held_out
    if not 0 < held_out < 100:
        raise UserError(f"--held_out={flags.held_out:g}\n  allowed: a percentage above 0 and below 100")
    if any(override.startswith("optimizer.learning_rate=") for override in overrides):
        raise UserError(
            "--config.optimizer.learning_rate is not used by a sweep\n  set the learning rates with --rates"
        )
    workdir = paths.expand(flags.workdir, "--workdir") if flags.workdir is not None else _default_workdir(flags.config)
    config = commands.make_config(flags.config, overrides, next(workdir.glob("rate-*"), None))
    if flags.held_out is not None and config.data.validation is not None:
        raise UserError(
            f"--held_out={flags.held_out:g} is not used: config.data.validation is {config.data.validation!r}\n"
            "  omit --held_out, or set config.data.validation=None"
        )
    # Imported late, so that mistakes in the arguments are reported at once.
    from vit_jax.runtime import compilation_cache
    from vit_jax.sharding import multihost
    from vit_jax.training import lr_sweep

    compilation_cache.cache_compilations()
    multihost.initialize(config.mesh.distributed)

    def say(text: str) -> None:
        if multihost.is_rank_0():
            terminal.say(text)

    plan = lr_sweep.plan(config, rates, held_out)
    metrics = _metrics(config)
    titles = _titles(metrics)

    def show(trial: dict[str, Any]) -> None:
        is_first = trial["learning_rate"] == rates[0]
        for row in [*([titles] if is_first else []), _cells(trial, metrics)]:
            say("  ".join(f"{cell:>{len(title)}}" for cell, title in zip(row, titles, strict=True)).rstrip())

    say(f"{len(rates)} learning rates: trained on {plan.train}, compared on {plan.validation}; in {workdir}")
    content = lr_sweep.sweep(plan, workdir, show)
    if content is None:
        say("sweep: stopped; run the same command again to resume")
        return
    if multihost.is_rank_0():
        _write_report(workdir, content)
    say(f"{conclusion(content)}\nresults are in {workdir}: sweep.md, sweep.png, sweep.json")


def _default_workdir(spec: str) -> Path:
    workdir = commands.default_workdir(spec)
    return workdir.with_name(f"{workdir.name}-sweep")


def table(content: dict[str, Any]) -> str:
    """Returns the content of sweep.json as Markdown: a row per learning rate, and the result of the final run."""
    metrics = _metrics(options.from_dict(content["config"]))
    titles = _titles(metrics)
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for trial in content["trials"]:
        rate, *cells = _cells(trial, metrics)
        rate = f"**{rate}**" if trial["learning_rate"] == content["best"] else rate
        rows.append("".join(f"| {cell} " if cell else "| " for cell in (rate, *cells)) + "|")
    return "\n".join([*rows, "", conclusion(content)])


def conclusion(content: dict[str, Any]) -> str:
    """Returns the content of sweep.json in one sentence: the best learning rate, and the result of the final run."""
    from vit_jax import objectives

    splits, counts = content["splits"], {trial.get("validation/examples") for trial in content["trials"]} - {None}
    objective = objectives.make(options.from_dict(content["config"]))
    final = {name: value for name, value in content["final"].items() if name != "folder"}
    return (
        f"Trained on {splits['train']}, chosen on {splits['validation']} ({max(counts):,} examples): "
        f"{content['best']:g}. With it, trained on {splits['everything']}: {objective.summary_line(final)} after "
        f"{final['steps']:,} steps, {progress.clock(final['seconds'])} of training."
    )


def _metrics(config: ConfigDict) -> list[str]:
    """Returns the names of the metrics in the table: the one that is compared, and the loss."""
    from vit_jax import objectives

    return list(dict.fromkeys([objectives.make(config).primary_metric.name, "loss"]))


def _titles(metrics: list[str]) -> list[str]:
    return ["learning rate", *(f"validation {name}" for name in metrics), "steps", "training"]


def _cells(trial: dict[str, Any], metrics: list[str]) -> list[str]:
    """Returns a row of the table."""
    rate = f"{trial['learning_rate']:g}"
    if "failed" in trial:
        return [rate, trial["failed"], *[""] * (len(metrics) + 1)]
    values = (_formatted(trial, name) for name in metrics)
    return [rate, *values, f"{trial['steps']:,}", progress.clock(trial["seconds"])]


def _percent(metric: str) -> bool:
    return metric.endswith("accuracy")


def _formatted(trial: dict[str, Any], metric: str) -> str:
    value = trial[f"validation/{metric}"]
    return f"{100 * value:.2f} %" if _percent(metric) else f"{value:.4f}"


def _write_report(workdir: Path, content: dict[str, Any]) -> None:
    """Writes sweep.md and sweep.png."""
    from vit_jax import chart

    metric = _metrics(options.from_dict(content["config"]))[0]
    factor, unit = (100, ", %") if _percent(metric) else (1, "")
    finished = [trial for trial in content["trials"] if "failed" not in trial]
    points = [(trial["learning_rate"], factor * trial[f"validation/{metric}"]) for trial in finished]
    try:
        (workdir / "sweep.md").write_text(table(content) + "\n", encoding="utf-8")
        # Differences that do not matter look small: less than two percentage points, or a tenth of the loss.
        min_span = 2.0 if unit else 0.1 * max(abs(value) for _, value in points)
        image = chart.draw(points, "learning rate", f"validation {metric}{unit}", content["best"], min_span)
        image.save(workdir / "sweep.png")
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be written to: {error.strerror}\n  free disk space or change its permissions"
        ) from error


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: sweep(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
