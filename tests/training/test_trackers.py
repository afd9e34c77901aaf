"""Trackers: what Weights & Biases, MLflow and Trackio get, and that none of them stops, delays or fails a run.

Stand-ins of the packages behave as these do where it matters; the packages themselves are tested where installed.
"""

import importlib.machinery
import json
import sys
import threading
import time
import types

import pytest
from helpers import tiny_config

from vit_jax.errors import UserError
from vit_jax.training import trackers, train
from vit_jax.training.metrics import MetricsWriter

NAMES = tuple(trackers.TRACKERS)
SUMMARY = {"test/accuracy": 0.5, "steps": 40, "seconds": 1.5, "parameters": 7}
OF_ALL = {"steps": 40, "seconds": 1.5, "parameters": 7}


class Run(types.SimpleNamespace):
    """What a stand-in has stored of a run: name, group, project, config, records [(step, metrics)], state."""


def wandb(runs):
    """Ignores what is logged at an earlier step, as wandb does."""

    class Logged:
        def __init__(self, run):
            self.id, self.run, self.summary = run.id, run, run.summary
            self.step = run.step

        def define_metric(self, name, **options):
            self.run.axes = {**self.run.axes, name: options}

        def log(self, metrics, step):
            if step >= self.run.step:
                self.run.step = step + 1
                self.run.records.append((metrics.pop("step"), metrics))

        def finish(self, exit_code):
            self.run.state = exit_code

    known = {"console": str, "finish_timeout": float}

    def init(*, config, settings, project=None, name=None, group=None, id=None, resume=None, **others):
        assert others == {"allow_val_change": True, "reinit": "create_new"}
        assert {*settings} == {*known} and (id is None) == (resume is None)
        new = Run(id="w1", name=name, group=group, project=project, records=[], step=0, summary={}, axes={}, state=None)
        run = runs.setdefault(id or new.id, new)
        run.config = config
        return Logged(run)

    return {"init": init, "Settings": types.SimpleNamespace(model_fields=known)}


def mlflow(runs):
    """Refuses to change a parameter, as MLflow does."""
    Metric, Param, RunTag = (lambda *values: values for _ in range(3))
    experiments = {}

    class MlflowClient:
        def get_experiment_by_name(self, name):
            return types.SimpleNamespace(experiment_id=experiments[name]) if name in experiments else None

        def create_experiment(self, name):
            return experiments.setdefault(name, f"experiment {name}")

        def create_run(self, experiment, run_name, tags):
            project = experiment.removeprefix("experiment ")
            run = Run(name=run_name, group=tags.get("group"), project=project, records=[], config={}, tags={})
            runs["m1"] = run
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))

        def update_run(self, id, status):
            runs[id].state = status

        def get_run(self, id):
            return types.SimpleNamespace(data=types.SimpleNamespace(params=dict(runs[id].config)))

        def log_batch(self, id, metrics=(), params=(), tags=()):
            assert len(params) <= 100 and not {name for name, _ in params} & runs[id].config.keys()
            runs[id].config.update(params)
            runs[id].tags.update(tags)
            if metrics:
                runs[id].records.append((metrics[0][3], {name: value for name, value, *_ in metrics}))

        def set_terminated(self, id, status):
            runs[id].state = status

    entities = types.SimpleNamespace(Metric=Metric, Param=Param, RunTag=RunTag)
    return {"MlflowClient": MlflowClient, "entities": entities}


def trackio(runs):
    def init(project, name, group, config, resume, embed):
        assert resume == ("allow" if name in runs else "never") and not embed
        run = runs.setdefault(name, Run(name=name, group=group, project=project, records=[]))
        run.config, run.state = config, None

        def log(metrics, step):
            run.records.append((step, metrics))

        def finish():
            run.state = "finished"

        return types.SimpleNamespace(log=log, finish=finish)

    return {"init": init}


STAND_INS = {"wandb": wandb, "mlflow": mlflow, "trackio": trackio}


@pytest.fixture
def stored(monkeypatch):
    """A function that puts the stand-in of a package in its place, and returns the runs that it will store."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_CONSOLE", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)

    def install(name):
        runs, module = {}, types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a stand-in")
        module.__dict__.update(STAND_INS[name](runs))
        monkeypatch.setitem(sys.modules, name, module)
        return runs

    return install


def writing(name, workdir, step=0, say=pytest.fail, **options):
    """The writer of a run with a tracker; `say` gets its warnings."""
    config = tiny_config(log={"tracker": name}, **options)
    tracker = trackers.start(config, workdir, {"command": "vit-jax train"}, say)
    return MetricsWriter(workdir, step, tensorboard=False, tracker=tracker)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_fails_resumes_and_is_rolled_back_is_one_run_with_every_record(name, stored, tmp_path):
    runs, workdir = stored(name), tmp_path / "digits"
    workdir.mkdir()
    with pytest.raises(ZeroDivisionError), writing(name, workdir) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"train/loss": 1 / step})
        raise ZeroDivisionError
    (run,) = runs.values()
    assert run.state == {"wandb": 1, "mlflow": "FAILED", "trackio": "finished"}[name]
    with writing(name, workdir, 20, train={"steps": 77}) as writer:
        writer.write(30, {"train/loss": 1 / 30})
        writer.write(40, {"train/loss": float("inf")})
        writer.truncate(30)
        writer.write(40, {"train/loss": 0.5, "test/accuracy": 0.5})
        assert writer.finish(SUMMARY) is SUMMARY
    assert [*runs.values()] == [run] and run.project == "vit_jax" and run.group is None
    assert run.name.startswith("digits-" if name == "trackio" else "digits")
    about = dict(run.config) if name != "wandb" else dict(trackers._flat(run.config))
    assert (about["workdir"], about["environment.command"]) == (str(workdir), "vit-jax train")
    resumed = run.tags if name == "mlflow" else about
    assert str(resumed["train.steps"]) == "77" and str(about["model.width"]) == "16"
    losses = [(step, metrics["train/loss"]) for step, metrics in run.records if "train/loss" in metrics]
    before, infinite = [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)], (40, float("inf"))
    assert losses == [*before, before[-1], infinite, (40, 0.5)]
    assert run.records[5][1]["test/accuracy"] == 0.5
    if name == "wandb":
        assert run.summary == OF_ALL and run.axes["*"] == {"step_metric": "step"} and run.state == 0
    else:
        assert run.records[6:] == [(40, OF_ALL)] and run.state.lower() == "finished"
    assert json.loads((workdir / trackers.IDS).read_text()) == {name: next(iter(runs))}


def test_a_run_that_is_stopped_is_not_finished(stored, tmp_path):
    runs = stored("mlflow")
    with writing("mlflow", tmp_path) as writer:
        writer.write(1, {"train/loss": 1.0})
    assert runs["m1"].state == "KILLED" and len(runs["m1"].records) == 1


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_several_seeds_are_a_group_and_variables_name_the_project(name, stored, tmp_path, monkeypatch):
    variable = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME", "trackio": "TRACKIO_PROJECT"}[name]
    monkeypatch.setenv(variable, "mine")
    runs, workdir = stored(name), tmp_path / "five" / "seed-3"
    workdir.mkdir(parents=True)
    with writing(name, workdir):
        pass
    (run,) = runs.values()
    project = None if name == "wandb" else "mine"  # wandb reads the variable itself
    assert (run.group, run.project) == ("five", project) and run.name.startswith("five-seed-3")


@pytest.mark.parametrize("call", ["init", "log", "finish", "exit"])
def test_an_error_of_a_tracker_is_one_warning_and_every_record_is_written(call, stored, tmp_path, monkeypatch):
    runs, warnings = stored("trackio"), []

    def fail(*_, **__):
        if call == "exit":
            sys.exit("no network")
        raise OSError("no network\nat all")

    monkeypatch.setattr(trackers.TRACKERS["trackio"], "__init__" if call in ("init", "exit") else call, fail)
    with writing("trackio", tmp_path, say=warnings.append) as writer:
        for step in range(20):
            writer.write(step, {"train/loss": 1.0})
            time.sleep(0.001)
        writer.finish(SUMMARY)
    assert len(warnings) == 1 and warnings[0].startswith(
        "warning: log.tracker=trackio failed, the run continues without it: no n"
    )
    assert "\n" not in warnings[0] and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20
    assert all(run.state is None for run in runs.values())


@pytest.mark.parametrize("call", ["__init__", "log", "finish"])
def test_a_tracker_that_hangs_does_not_keep_the_run(call, stored, tmp_path, monkeypatch):
    stored("trackio"), monkeypatch.setattr(trackers, "START_SECONDS", 0.05)
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(trackers, "MAX_RECORDS", 5)
    warnings, ended = [], threading.Event()
    monkeypatch.setattr(trackers.TRACKERS["trackio"], call, lambda *_, **__: ended.wait(20))
    began = time.monotonic()
    with writing("trackio", tmp_path, say=warnings.append) as writer:
        for step in range(20):
            writer.write(step, {"train/loss": 1.0})
            time.sleep(0.001 if call == "finish" else 0)
    assert time.monotonic() - began < 5
    reason = "not finished after 0 s" if call == "finish" else "it does not keep up"
    assert warnings == [f"warning: log.tracker=trackio failed, the run continues without it: {reason}"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20
    ended.set()


def test_a_package_that_is_not_installed_is_refused_also_with_a_directory_of_its_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config()
    trackers.check(config)
    with config.unlocked():
        config.log.tracker = "no_such_tracker"
    for _ in range(2):
        with pytest.raises(UserError, match="'no_such_tracker', which is not installed\n  install it: pip install"):
            trackers.check(config)
        (tmp_path / "no_such_tracker").mkdir(exist_ok=True)


def test_only_rank_0_has_a_tracker(stored, tmp_path, monkeypatch):
    runs = stored("trackio")
    monkeypatch.setattr(trackers.multihost, "is_rank_0", lambda: False)
    assert trackers.start(tiny_config(log={"tracker": "trackio"}), tmp_path, {}, pytest.fail) is None and not runs


# --- runs -------------------------------------------------------------------------------------------------------------


def trained(workdir, name, steps):
    config = tiny_config(
        log={"tracker": name, "every": 5}, train={"steps": steps, "evaluate_every": 10}, checkpoint={"every": 10}
    )
    train.train(config, workdir)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_package_itself_has_what_metrics_jsonl_has_of_a_run_that_was_resumed(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    workdir = tmp_path / "run"
    trained(workdir, name, 20)
    records = trained(workdir, name, 30)
    id = json.loads((workdir / trackers.IDS).read_text())[name]
    assert READERS[name](id, tmp_path) == records and len(records) == 6
    assert "warning: log.tracker" not in "".join(capsys.readouterr())


def of_wandb(id, directory):
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(directory.glob(f"wandb/offline-run-*-{id}/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                found.append({key: json.loads(text) for key, text in items.items() if not key.startswith("_")})
    return found


def log_records(data):
    """The records of a file in the log format of LevelDB, after a header of 7 bytes: the package has no reader."""
    position, part = 7, b""
    while position + 7 <= len(data):
        kind = data[position + 6]
        if -position % 2**15 < 7 or not kind:  # padding of a block
            position += -position % 2**15 or 2**15
            continue
        size = int.from_bytes(data[position + 4 : position + 6], "little")
        part += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def of_mlflow(id, directory):
    from mlflow import MlflowClient

    client, found = MlflowClient(), {}
    for name in client.get_run(id).data.metrics:
        for metric in client.get_metric_history(id, name):
            if name not in OF_ALL:
                found.setdefault(metric.step, {"step": metric.step})[name] = metric.value
    assert client.get_run(id).info.status == "FINISHED"
    return [found[step] for step in sorted(found)]


def of_trackio(id, directory):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = (run for run in trackio.Api().runs("vit_jax") if run.name == id)
    logs = SQLiteStorage.get_logs("vit_jax", id, run_id=run.id)
    run.delete()
    assert logs[-1].keys() == {*OF_ALL, "step", "timestamp"}
    return [{key: one[key] for key in one if key != "timestamp"} for one in logs if "train/loss" in one]


READERS = {"wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}


@pytest.mark.slow
def test_training_reports_to_a_tracker_that_fails_with_the_same_result(stored, tmp_path, monkeypatch, capsys):
    runs = stored("trackio")
    records = trained(tmp_path / "run", "trackio", 20)
    (run,) = runs.values()
    assert [{"step": step, **metrics} for step, metrics in run.records[:-1]] == records
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert run.records[-1] == (20, {name: summary[name] for name in OF_ALL}) and run.state == "finished"
    monkeypatch.setattr(trackers.TRACKERS["trackio"], "log", lambda *_: 1 / 0)
    capsys.readouterr()
    again = trained(tmp_path / "failing", "trackio", 20)
    assert capsys.readouterr().out.count("the run continues without it: division by zero") == 1
    assert [one["train/loss"] for one in again] == [one["train/loss"] for one in records]
