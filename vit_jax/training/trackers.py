"""The metrics of a run in Weights & Biases, MLflow or Trackio, if installed; none of them stops or fails a run."""

import contextlib
import importlib.util
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import atomic
from vit_jax.checkpoint import run_files
from vit_jax.errors import UserError, one_line
from vit_jax.sharding import multihost

PROJECT = "vit_jax"  # where the tracker's own environment variable names no other
IDS = "tracker.json"  # in the run directory: the id of the run by tracker
START_SECONDS, FINISH_SECONDS = 10.0, 30.0  # how long training and the end of the process wait for it at most
MAX_RECORDS = 10_000  # that wait to be logged
_PART_OF_ONE = re.compile(r"seed-\d+|(rate|final)-.+")  # run directories of several seeds, and of a sweep
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


class _Wandb:
    def __init__(self, name, group, config, id):
        import wandb

        limit = FINISH_SECONDS - 10
        ours = {"console": "off", **dict.fromkeys(("init_timeout", "finish_timeout", "login_timeout"), limit)}
        known = getattr(wandb.Settings, "model_fields", ours)  # older versions have fewer
        settings = {
            key: value for key, value in ours.items() if key in known and f"WANDB_{key.upper()}" not in os.environ
        }
        defaults = {"WANDB_PROJECT": PROJECT, "WANDB_NAME": name, "WANDB_RUN_GROUP": group}
        named = {
            key.removeprefix("WANDB_").removeprefix("RUN_").lower(): value
            for key, value in defaults.items()
            if not os.environ.get(key)
        }
        resume = {} if id is None else {"id": id, "resume": "allow"}
        self._run = wandb.init(
            **named, **resume, config=dict(config), allow_val_change=True, reinit="create_new", settings=settings
        )
        self.id, self._next = self._run.id, self._run.step
        # wandb's own step only grows, so that repeated steps would be ignored: the plots are against ours.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step, metrics):
        self._next = max(step, self._next) + 1
        self._run.log({"step": step, **metrics}, step=self._next - 1)

    def finish(self, state, summary):
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(state == FAILED))


class _MLflow:
    def __init__(self, name, group, config, id):
        import mlflow

        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        if id is None:
            tags = {} if group is None else {"group": group}
            id = self._client.create_run(self._experiment(), run_name=name, tags=tags).info.run_id
        else:
            self._client.update_run(id, status="RUNNING")
        self.id, entities = id, mlflow.entities
        logged = self._client.get_run(id).data.params
        values = {key: str(value)[:500] for key, value in _flat(config)}
        # Parameters cannot be changed: what differs when a run resumes is a tag of the same name.
        new = [entities.Param(key, value) for key, value in values.items() if key not in logged]
        changed = [
            entities.RunTag(*item) for item in values.items() if item[0] in logged and item[1] != logged[item[0]]
        ]
        for start in range(0, max(len(new), len(changed)), 100):  # the maximum per call
            self._client.log_batch(id, params=new[start : start + 100], tags=changed[start : start + 100])

    def _experiment(self):
        if found := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return found
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if experiment is None else experiment.experiment_id

    def log(self, step, metrics):
        now, entity = int(1000 * time.time()), self._mlflow.entities.Metric
        self._client.log_batch(self.id, metrics=[entity(name, value, now, step) for name, value in metrics.items()])

    def finish(self, state, summary):
        if summary:
            self.log(summary["steps"], summary)
        self._client.set_terminated(self.id, {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}[state])


class _Trackio:
    def __init__(self, name, group, config, id):
        import trackio

        # A run is resumed by its name, which must therefore be unique in the project.
        self.id = id or f"{name}-{secrets.token_hex(2)}"
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        about = {"group": group, "config": dict(_flat(config)), "resume": "never" if id is None else "allow"}
        self._run = trackio.init(project, name=self.id, embed=False, **about)

    def log(self, step, metrics):
        self._run.log(dict(metrics), step=step)

    def finish(self, state, summary):
        if summary:
            self.log(summary["steps"], summary)
        self._run.finish()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields 'section.key' and value of nested mappings."""
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]


# Each starts a run with a name, in a group of runs, or continues that of an id, and has the attribute `id`. Its methods
# may take long, and raise anything. Steps are logged again after a rollback, and after a process was killed.
TRACKERS: dict[str, type] = {"wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio}


def check(config: ConfigDict) -> None:
    """Raises UserError if the package of `log.tracker` is not installed."""
    name = config.log.tracker
    # A directory of this name, which the package itself may have made, is found as a module without a file.
    if name is not None and getattr(importlib.util.find_spec(name), "origin", None) is None:
        raise UserError(f"config.log.tracker is {name!r}, which is not installed\n  install it: pip install {name}")


def start(config: ConfigDict, workdir: Path, environment: Mapping[str, Any], say: Callable) -> "Tracker | None":
    """Returns the run in the tracker of `config.log.tracker`, which is on rank 0 alone; None without a tracker."""
    is_used = config.log.tracker is not None and multihost.is_rank_0()
    return Tracker(config, workdir, environment, say) if is_used else None


class Tracker:
    """A run in a tracker, in a thread of its own; the first error ends it with a warning, and the run continues."""

    def __init__(self, config: ConfigDict, workdir: Path, environment: Mapping[str, Any], say: Callable[[str], None]):
        """Starts a run in the tracker of `config.log.tracker`, or continues the one of the run directory."""
        self._name, self._path, self._say = config.log.tracker, workdir / IDS, say
        part = workdir.absolute().name
        group = workdir.absolute().parent.name if _PART_OF_ONE.fullmatch(part) else None
        self._about = {
            "name": part if group is None else f"{group}-{part}",
            "group": group,
            "config": {**config.to_dict(), "workdir": str(workdir), "environment": dict(environment)},
        }
        self._calls: queue.Queue[tuple[str, tuple]] = queue.Queue(MAX_RECORDS)
        self._error: BaseException | None = None
        self._has_started, self._thread = threading.Event(), threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._has_started.wait(START_SECONDS)

    def _work(self) -> None:
        try:
            adapter = self._start()
            self._has_started.set()
            call = None
            while call != "finish":
                call, arguments = self._calls.get()
                getattr(adapter, call)(*arguments)
        except BaseException as error:  # also SystemExit
            self._error = error
        self._has_started.set()

    def _start(self) -> Any:
        ids = run_files.read_json(self._path)
        ids = ids if isinstance(ids, dict) else {}
        adapter = TRACKERS[self._name](**self._about, id=ids.get(self._name))
        if adapter.id != ids.get(self._name):
            atomic.write_json(self._path, {**ids, self._name: adapter.id})
        return adapter

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a step, without waiting."""
        self._call("log", step, dict(metrics))

    def finish(self, state: str, summary: Mapping[str, float]) -> None:
        """Ends the run (finished, stopped or failed), with the content of summary.json; waits for up to 30 s."""
        totals = {name: value for name, value in summary.items() if "/" not in name}  # the others are metrics
        self._call("finish", state, totals)
        if self._say is not None:
            self._thread.join(FINISH_SECONDS)
            self._drop(f"not finished after {FINISH_SECONDS:.0f} s" if self._thread.is_alive() else self._error)

    def _call(self, name: str, *arguments: Any) -> None:
        self._drop(self._error)
        if self._say is not None:
            try:
                self._calls.put_nowait((name, arguments))
            except queue.Full:
                self._drop("it does not keep up")

    def _drop(self, reason: BaseException | str | None) -> None:
        """Warns, once, and logs nothing more."""
        if reason is not None and self._say is not None:
            self._say(f"warning: log.tracker={self._name} failed, the run continues without it: {one_line(reason)}")
            self._say = None
            with contextlib.suppress(queue.Full):
                self._calls.put_nowait(("finish", (FAILED, {})))
