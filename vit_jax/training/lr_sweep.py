"""A learning rate chosen on held-out training examples, then one run on all of them (arXiv 2010.11929, B.1.1)."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import atomic, objectives
from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.errors import UserError
from vit_jax.sharding import multihost
from vit_jax.training import nonfinite, run_directory, setup, train
from vit_jax.training.shutdown import Stop

RESULT = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep trains, and on which examples.

    Attributes:
        config: as it was given; its learning rate is not used.
        rates: learning rates, in the order in which they are tried.
        train: split that the rates are tried on.
        validation: split that they are judged by.
        everything: split of the final run.
    """

    config: ConfigDict
    rates: tuple[float, ...]
    train: str
    validation: str
    everything: str

    def trial(self, rate: float) -> ConfigDict:
        """The config that tries a rate; it never reads the test split."""
        return self._with(rate, train=self.train, validation=self.validation, test=None)

    def final(self, rate: float) -> ConfigDict:
        """The config of the final run: all training examples, and the test split scored once, at the end."""
        config = self._with(rate, train=self.everything, validation=None)
        config.train.evaluate_every = 0
        return config

    def _with(self, rate: float, **data: str | None) -> ConfigDict:
        config = options.from_dict(self.config.to_dict())
        config.optimizer.learning_rate = rate
        config.data.update(data)
        return config


def plan(config: ConfigDict, rates: tuple[float, ...], held_out: float) -> Plan:
    """The plan of a sweep, checked against data and devices.

    Args:
        config: a checked config. Where it has a validation split, rates are judged by that, and the final run is
            trained on both its splits.
        rates: learning rates.
        held_out: per cent of the training split, its last, that is held out where there is no validation split.

    Raises:
        UserError: a run of it could not begin; or there is no test split, or nothing that could be held out.
    """
    data = config.data
    if data.test is None:
        raise UserError("config.data.test is None\n  give the split that the final run is to be scored on")
    if data.validation is not None:
        parts = data.train, data.validation, f"{data.train}+{data.validation}"
    elif not data.train.replace("_", "").isalnum():
        raise UserError(
            f"config.data.train is {data.train!r}: of a part, nothing more is held out\n"
            "  allowed: a whole split, as 'train'; or give config.data.validation too"
        )
    else:
        cut = f"{100 - held_out:g}%"
        parts = f"{data.train}[:{cut}]", f"{data.train}[{cut}:]", data.train
    made = Plan(config, rates, *parts)
    for checked in (made.trial(rates[0]), made.final(rates[0])):
        options.check(checked)
        setup.check(checked)
    return made


def sweep(plan: Plan, folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Trains what the plan has and is not finished; returns what sweep.json holds, or None where asked to stop.

    Args:
        plan: a checked plan.
        folder: the workdir; each run has a folder of its own below it.
        say: is told which run comes next.

    Raises:
        UserError: the folder holds something else, every rate ended with numbers that are not finite, or as
            `train.train`.
    """
    multihost.on_rank_0(lambda: _claim(plan, folder))
    content = {"config": plan.config.to_dict(), "splits": _splits(plan), "trials": [], "best": None, "final": None}
    end = None if plan.config.train.max_minutes is None else time.monotonic() + 60 * plan.config.train.max_minutes
    with Stop() as stop:  # of what comes in between two runs; each hears for itself
        stop.nothing_to_save(True)
        for number, rate in enumerate(plan.rates):
            run = folder / f"rate-{rate:g}"
            say(f"learning rate {rate:g} ({number + 1} of {len(plan.rates)}){_been(run)}")
            trial = _try(plan.trial(rate), run, end)
            if trial is None:
                return None
            content["trials"].append({"learning_rate": rate, **trial})
            write(folder, content)
        content["best"] = best = choose(content["trials"], objectives.make(plan.config).primary_metric)
        run = folder / f"final-{best:g}"
        say(f"the best is {best:g}; with it, on {plan.everything}{_been(run)}")
        final = _try(plan.final(best), run, end)
        if final is None:
            return None
    if "failed" in final:
        raise UserError(f"the final run ended with {final['failed']}: {folder / final['folder']}\n  try lower rates")
    content["final"] = final
    write(folder, content)
    return content


def _claim(plan: Plan, folder: Path) -> None:
    """Sees that the folder is a new one, or that of the same sweep, whatever its rates are.

    Raises:
        UserError: it is not, or it cannot be read.
    """
    if (folder / run_files.CONFIG).exists():
        raise UserError(f"--workdir={folder} belongs to a run that is no sweep\n  give another --workdir")
    try:
        before = json.loads((folder / RESULT).read_text())
        old, splits = before["config"], before["splits"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RESULT} cannot be read: {error}\n  give another --workdir") from error
    rows = options.differences({**old, "splits": splits}, {**plan.config.to_dict(), "splits": _splits(plan)})
    rows = [row for row in rows if not row.startswith((*run_directory.FREE, "optimizer.learning_rate"))]
    if rows:
        raise UserError(
            f"--workdir={folder} belongs to a sweep of another config\n"
            f"  differs: {'; '.join(rows[: run_directory.SHOWN])}\n"
            "  give another --workdir, or the same config"
        )


def _splits(plan: Plan) -> dict[str, str]:
    return {"train": plan.train, "validation": plan.validation, "everything": plan.everything}


def _been(run: Path) -> str:
    return ": has been trained" if (run / run_files.SUMMARY).exists() else ""


def _try(config: ConfigDict, folder: Path, end: float | None) -> dict[str, Any] | None:
    """The summary of a run, which is trained, or trained on, where it is not finished; None where asked to stop."""
    named = {"folder": folder.name}
    has_failed = lambda: multihost.on_rank_0((folder / nonfinite.REPORT).exists)  # noqa: E731
    summary = multihost.on_rank_0(lambda: run_directory.read_summary(folder))
    if summary is None and not has_failed():
        if end is not None:
            config.train.max_minutes = max(0.0, end - time.monotonic()) / 60
        try:
            summary = train.train(config, folder)
        except UserError:
            if not has_failed():
                raise
        else:
            if summary is None:
                return None
    return named | (summary or {"failed": "numbers that are not finite"})


def choose(trials: list[dict[str, Any]], metric: str) -> float:
    """The learning rate with the best validation metric; of equals that with the lower loss, then the smaller.

    Args:
        trials: summaries, or what failed.
        metric: 'accuracy', which is to be high, or 'loss'.

    Raises:
        UserError: none came to its end.
    """
    finished = [trial for trial in trials if "failed" not in trial]
    if not finished:
        raise UserError("every learning rate ended with numbers that are not finite\n  try lower ones")

    def order(trial: dict[str, Any]) -> tuple[float, float, float]:
        loss = trial["validation/loss"]
        loss = loss if math.isfinite(loss) else math.inf
        return trial["validation/accuracy"] if metric == "accuracy" else -loss, -loss, -trial["learning_rate"]

    return max(finished, key=order)["learning_rate"]


def write(folder: Path, content: dict[str, Any]) -> None:
    """Writes sweep.json; of several processes, one does."""
    if multihost.is_rank_0():
        try:
            atomic.write_json(folder / RESULT, content)
        except OSError as error:
            raise UserError(f"{folder / RESULT} cannot be written: {error.strerror}\n  make room there") from error
