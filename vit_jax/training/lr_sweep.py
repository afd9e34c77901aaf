"""Learning-rate sweep: chosen on held-out training examples, then one run on all of them (arXiv 2010.11929, B.1.1)."""

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
from vit_jax.data import sources
from vit_jax.data.splits import EmptySplit, Piece
from vit_jax.errors import UserError
from vit_jax.sharding import multihost
from vit_jax.training import describe, initial_weights, recovery, run_directory, setup, train
from vit_jax.training.shutdown import StopRequest

RESULT = "sweep.json"
FAILED = "non-finite loss or gradients"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a sweep.

    Attributes:
        config: the config of all runs; its learning rate is not used.
        rates: learning rates to try, in this order.
        train: training split of the trials.
        validation: split by which the learning rate is chosen.
        everything: training split of the final run.
    """

    config: ConfigDict
    rates: tuple[float, ...]
    train: str
    validation: str
    everything: str

    def trial(self, rate: float) -> ConfigDict:
        """Returns the config that tries a learning rate; it never reads the test split."""
        return self._with(rate, train=self.train, validation=self.validation, test=None)

    def final(self, rate: float) -> ConfigDict:
        """Returns the config of the final run: all training examples, evaluated on the test split once, at the end."""
        config = self._with(rate, train=self.everything, validation=None)
        config.train.evaluate_every = 0
        return config

    def splits(self) -> dict[str, str]:
        """Returns the splits by name, as sweep.json holds them."""
        return {"train": self.train, "validation": self.validation, "everything": self.everything}

    def _with(self, rate: float, **data: str | None) -> ConfigDict:
        config = options.from_dict(self.config.to_dict())
        config.optimizer.learning_rate = rate
        config.data.update(data)
        return config


def plan(config: ConfigDict, rates: tuple[float, ...], held_out: float) -> Plan:
    """Returns the plan of a sweep, checked against data and devices.

    Args:
        config: a checked config. If it has a validation split, the learning rate is chosen by that, and the final run
            trains on both its splits.
        rates: learning rates.
        held_out: percentage of the training split, its last examples, that is held out if there is no validation split.

    Raises:
        UserError: one of its runs could not start; there is no test split; or no examples can be held out.
    """
    data = config.data
    if config.train.seeds is not None:
        raise UserError(
            f"config.train.seeds is {config.train.seeds}, but a sweep trains one seed, config.train.seed\n"
            "  omit it, and train the best learning rate with several seeds: python -m vit_jax.main"
        )
    if data.test is None:
        raise UserError("config.data.test is None\n  set the split on which the final run is evaluated")
    if data.validation is not None:
        splits = data.train, data.validation, f"{data.train}+{data.validation}"
    elif data.train.replace("_", "").isalnum() and data.train != "all":
        cut = f"{100 - held_out:g}%"
        splits = f"{data.train}[:{cut}]", f"{data.train}[{cut}:]", data.train
    else:
        splits = *_hold_out(config, held_out), data.train
    planned = Plan(config, rates, *splits)
    for checked in (planned.trial(rates[0]), planned.final(rates[0])):
        try:
            setup.check(checked)
        except EmptySplit as error:
            raise _not_held_out(error.sizes.get(data.train, 0), data.train, held_out) or error from None
    return planned


def _hold_out(config: ConfigDict, percentage: float) -> tuple[str, str]:
    """Returns two split expressions: a training split without its last examples, and these."""
    data = config.data
    pieces = sources.pieces(data.name, data.train, data.dir)
    examples = sum(piece.stop - piece.start for piece in pieces)
    cut = round((100 - percentage) * examples / 100)
    if not 0 < cut < examples:
        raise _not_held_out(examples, data.train, percentage) or UserError(
            f"config.data.train is {data.train!r}, {examples} example\n  allowed: a split of two examples or more"
        )
    first, last = [], []
    for piece in pieces:
        size = piece.stop - piece.start
        middle = piece.start + min(max(cut, 0), size)
        first += [Piece(piece.split, piece.start, middle)] if piece.start < middle else []
        last += [Piece(piece.split, middle, piece.stop)] if middle < piece.stop else []
        cut -= size
    one, two = ("+".join(f"{each.split}[{each.start}:{each.stop}]" for each in part) for part in (first, last))
    return one, two


def _not_held_out(examples: int, split: str, held_out: float) -> UserError | None:
    """Returns the error for a percentage of a split that is less than one example; None if no percentage would do."""
    enough = (percent for percent in range(1, 100) if 0 < round((100 - percent) * examples / 100) < examples)
    percent = next(enough, None)
    if percent is None:
        return None
    return UserError(
        f"--held_out={held_out:g} percent of the {examples} examples of {split!r} is less than one example\n"
        f"  use at least --held_out={percent}, or set config.data.validation"
    )


def sweep(plan: Plan, workdir: Path, show: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """Trains the runs that are not finished; returns the content of sweep.json, or None if requested to stop.

    Args:
        plan: a checked plan.
        workdir: the sweep's directory; each run has a directory below it.
        show: prints an entry of 'trials' of sweep.json; called after each trial.

    Raises:
        UserError: the directory holds something else, every run ended with non-finite values, or as `train.train`.
    """
    multihost.on_rank_0(lambda: _check_workdir(plan, workdir))
    content = {"config": plan.config.to_dict(), "splits": plan.splits(), "trials": [], "best": None, "final": None}
    minutes = plan.config.train.max_minutes
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with StopRequest() as stop:  # for signals between two runs; each run handles its own
        stop.exit_on_signal = True
        for number, rate in enumerate(plan.rates):
            run = _trial_directory(workdir, rate)
            name = f"learning rate {rate:g} ({number + 1} of {len(plan.rates)})"
            shown = describe.Shown(start=number == 0, trial=name)
            trial = _train(plan.trial(rate), run, deadline, shown)
            if trial is None:
                return None
            content["trials"].append({"learning_rate": rate, **trial})
            show(content["trials"][-1])
            write(workdir, content)
        content["best"] = best = choose(content["trials"], *objectives.make(plan.config).primary_metric)
        run = workdir / f"final-{best:g}"
        shown = describe.Shown(start=False, trial=f"learning rate {best:g} on {plan.everything}")
        final = _train(plan.final(best), run, deadline, shown)
        if final is None:
            return None
    if "failed" in final:
        raise UserError(f"the final run ended with {final['failed']}: {run}\n  try lower learning rates")
    content["final"] = final
    write(workdir, content)
    return content


def _check_workdir(plan: Plan, workdir: Path) -> None:
    """Checks that the directory is new, or that of the same sweep with any learning rates.

    Raises:
        UserError: it is not, or it cannot be read.
    """
    if (workdir / run_files.CONFIG).exists():
        raise UserError(f"--workdir={workdir} holds a single run, not a sweep\n  use another --workdir")
    try:
        saved = json.loads((workdir / RESULT).read_bytes())
        old, splits = saved["config"], saved["splits"]
    except FileNotFoundError:  # it is written after the first trial
        begun = [(path, plan.trial(rate)) for rate in plan.rates if (path := _trial_directory(workdir, rate)).is_dir()]
        _refuse(workdir, [row for path, config in begun for row in run_directory.changes(path, config)])
        return
    except OSError as error:
        raise run_files.unreadable(workdir / RESULT, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{workdir / RESULT} cannot be read: {error}\n  use another --workdir") from error
    new = {**plan.config.to_dict(), "splits": plan.splits()}
    before, run = options.complete(old)["checkpoint"]["init_from"], next(workdir.glob("rate-*"), None)
    if run is not None and initial_weights.is_same(run, before, new["checkpoint"]["init_from"]):
        new["checkpoint"]["init_from"] = before
    rows = options.differences({**old, "splits": splits}, new, resume=("fixed", "changeable"))
    _refuse(workdir, [row for row in rows if not row.startswith("optimizer.learning_rate:")])


def _refuse(workdir: Path, rows: list[str]) -> None:
    if rows:
        raise UserError(
            f"--workdir={workdir} holds a sweep of another config\n"
            f"  differs: {'; '.join(rows[: run_directory.MAX_SHOWN])}\n"
            "  use another --workdir, or the same config"
        )


def _trial_directory(workdir: Path, rate: float) -> Path:
    return workdir / f"rate-{rate:g}"


def _train(config: ConfigDict, workdir: Path, deadline: float | None, shown: describe.Shown) -> dict[str, Any] | None:
    """Trains or resumes a run unless it is finished; returns its summary, or None if requested to stop."""

    def has_failed() -> bool:
        return multihost.on_rank_0((workdir / recovery.REPORT).exists)

    summary = multihost.on_rank_0(lambda: run_files.read_summary(workdir))
    if summary is None and not has_failed():
        if deadline is not None:
            config.train.max_minutes = max(0.0, deadline - time.monotonic()) / 60
        try:
            summary = train.train(config, workdir, shown=shown)
        except UserError:
            if not has_failed():
                raise
        else:
            if summary is None:
                return None
    if summary is not None and not all(value is not None and math.isfinite(value) for value in summary.values()):
        summary = None  # of an earlier version
    return {"folder": workdir.name} | (summary or {"failed": FAILED})


def choose(trials: list[dict[str, Any]], metric: str, higher_is_better: bool) -> float:
    """Returns the learning rate with the best validation metric; ties go to the lower loss, then to the lower rate.

    Args:
        trials: summaries, or {"failed": reason}, each with its 'learning_rate'.
        metric: name without split, such as 'accuracy'.
        higher_is_better: whether the metric is to be maximized.

    Raises:
        UserError: every trial failed.
    """
    finished = [trial for trial in trials if "failed" not in trial]
    if not finished:
        raise UserError(f"every learning rate ended with {FAILED}\n  try lower ones")

    def score(trial: dict[str, Any], metric: str, higher_is_better: bool) -> float:
        value = trial[f"validation/{metric}"]
        return (value if higher_is_better else -value) if math.isfinite(value) else -math.inf

    def order(trial: dict[str, Any]) -> tuple[float, float, float]:
        return score(trial, metric, higher_is_better), score(trial, "loss", False), -trial["learning_rate"]

    return max(finished, key=order)["learning_rate"]


def write(workdir: Path, content: dict[str, Any]) -> None:
    """Writes sweep.json, on rank 0.

    Raises:
        UserError: it cannot be written.
    """
    if multihost.is_rank_0():
        try:
            atomic.write_json(workdir / RESULT, content)
        except OSError as error:
            raise UserError(
                f"{workdir / RESULT} cannot be written: {error.strerror}\n  free disk space or change its permissions"
            ) from error
