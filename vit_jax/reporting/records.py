"""The files of a run directory, as a report reads them."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import objectives
from vit_jax.checkpoint import run_files
from vit_jax.errors import UserError, few
from vit_jax.objectives.base import Objective, final_split
from vit_jax.training import describe, lr_sweep, multi_seed

REPORT = "report.html"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What is recorded about a run, or about the runs of several seeds of one config.

    Attributes:
        workdir: the run directory.
        config: of the run.
        summary: the content of summary.json; None if the run is not finished.
        history: the records of metrics.jsonl; [] of several seeds.
        changes: the content of changes.jsonl.
        environment: the content of environment.json.
        seeds: the run of each seed by seed; {} of one.
    """

    workdir: Path
    config: ConfigDict
    summary: dict[str, Any] | None
    history: list[dict[str, Any]]
    changes: list[dict[str, Any]]
    environment: dict[str, Any]
    seeds: "dict[int, Run]"

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.workdir.absolute().name

    @property
    def objective(self) -> Objective:
        """What is learned."""
        return objectives.make(self.config)

    def split(self) -> str | None:
        """Returns the split that the report evaluates: 'test', or 'validation' if there is no test split; None."""
        return next((role for role in ("test", "validation") if self.config.data.get(role) is not None), None)

    def result(self) -> str:
        """Returns the result in one line, or how far the run is."""
        if self.summary is not None and self.seeds:
            return multi_seed.describe_all(self.summary, self.objective.primary_metric)
        if self.summary is not None:
            return describe.result(self.objective, self.summary)
        if self.seeds:
            finished = sum(run.summary is not None for run in self.seeds.values())
            return f"not finished: {finished} of {len(self.config.train.seeds)} seeds are"
        return f"not finished: step {self.history[-1]['step']:,}" if self.history else "not finished"

    def results(self) -> dict[str, Any]:
        """Returns the metrics of summary.json, or of an unfinished run the last value of every evaluated metric."""
        if self.summary is not None:
            return self.summary
        found: dict[str, Any] = {}
        for record in self.history:
            found |= {name: value for name, value in record.items() if name.startswith(("test/", "validation/"))}
        return found

    def final_split(self) -> str:
        """Returns the split of the result: 'test' or 'validation'."""
        return final_split(dict.fromkeys(self.results(), 0.0))  # it reads the names alone


def read(workdir: Path) -> Run:
    """Returns what a run directory records.

    Raises:
        UserError: it is no run directory, or a file cannot be read.
    """
    saved = run_files.read_config(workdir)
    if saved is None:
        below = sorted(path.parent.name for path in workdir.glob(f"*/{run_files.CONFIG}"))
        way_out = f"use those in it: {few(below)}" if below else "train one: vit-jax train --workdir=DIR ..."
        raise UserError(f"{workdir} holds no run: there is no {run_files.CONFIG}\n  {way_out}")
    config, seeds = options.from_dict(saved), {}
    for seed in multi_seed.seeds_of(config) or ():
        if (directory := multi_seed.workdir_of(workdir, seed)).is_dir() and (directory / run_files.CONFIG).is_file():
            seeds[seed] = read(directory)
    environment = run_files.read_json(workdir / run_files.ENVIRONMENT)
    if not isinstance(environment, dict):
        environment = next(iter(seeds.values())).environment if seeds else {}
    summary, changes = run_files.read_summary(workdir), run_files.read_changes(workdir)
    return Run(workdir, config, summary, read_history(workdir), changes, environment, seeds)


def read_history(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl in the order of their steps; what is no record is left out.

    Raises:
        UserError: the operating system cannot read it.
    """
    try:
        lines = (workdir / run_files.METRICS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise run_files.unreadable(workdir / run_files.METRICS, error) from error
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    found = [record for record in found if isinstance(record, dict) and isinstance(record.get("step"), int)]
    return sorted(found, key=_step)


def _step(record: dict[str, Any]) -> int:
    return record["step"]


def sweep_runs(workdir: Path) -> list[Path] | None:
    """Returns the run directories of a learning-rate sweep, the final run last; None if it is no sweep.

    Raises:
        UserError: the operating system cannot read sweep.json.
    """
    content = run_files.read_json(workdir / lr_sweep.RESULT)
    if not isinstance(content, dict) or not isinstance(content.get("trials"), list):
        return None
    trials = [*content["trials"], content.get("final")]
    names = [trial["folder"] for trial in trials if isinstance(trial, dict) and isinstance(trial.get("folder"), str)]
    return [workdir / name for name in names if (workdir / name / run_files.CONFIG).is_file()]


def finite(value: Any) -> float:
    """Returns a value of a JSON file as a number; NaN if it is none, as null stands for one that is not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan
