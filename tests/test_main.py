"""The training command as a user runs it: in separate processes that are killed and started again."""

import json
import random
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    ROOT,
    finish,
    flags,
    kill,
    num_records,
    read_json_lines,
    read_metrics,
    run_command,
    start_command,
    wait_until,
)

from vit_jax import commands, main
from vit_jax.checkpoint import run_files

# Everything that has state between steps is on; the model is small, and checkpoints are frequent.
SMALL = [
    "--config=configs/digits.py",
    *flags(
        model={"variant": "Ti/4", "width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "dropout": 0.1},
        augment={"mixup": 0.2},
        optimizer={"average_decay": 0.9, "warmup_steps": 20},
        train={"batch_size": 32, "epochs": None, "steps": 300, "accumulation": 2, "evaluate_every": 60},
        data={"validation": "train[90%:]", "train": "train[:90%]"},
        checkpoint={"every": 25},
        log={"every": 10},
    ),
    "--config.model.stochastic_depth=0.1",
    "--config.train.steps_per_dispatch=7",
]


def start(workdir, *arguments, **variables):
    return start_command("vit_jax.main", *SMALL, *arguments, f"--workdir={workdir}", **variables)


def evaluated(workdir, *arguments):
    """The JSON line that `vit_jax.evaluate` prints."""
    return read_json_lines(run_command("vit_jax.evaluate", f"--workdir={workdir}", *arguments))[-1]


def saved_arrays(workdir):
    """The arrays of the newest checkpoint, by name."""
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(Path(workdir).resolve() / "checkpoints") as checkpointer:
        loaded = checkpointer.load_checkpointables()["state"]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(loaded)}


def assert_same_run(workdir, expected):
    assert read_metrics(workdir) == read_metrics(expected)
    arrays, expected_arrays = saved_arrays(workdir), saved_arrays(expected)
    assert arrays.keys() == expected_arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, expected_arrays[name], err_msg=name)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The directory and the output of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, finish(start(workdir))


def test_a_run_writes_its_files(uninterrupted):
    workdir, output = uninterrupted
    assert {"config.json", "data.json", "environment.json", "metrics.jsonl", "summary.json", "checkpoints"} <= {
        path.name for path in workdir.iterdir()
    }
    assert list(workdir.glob("events.out.tfevents.*"))
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == sorted({*range(10, 301, 10)})
    train = {"train/loss", "train/accuracy", "train/gradient_norm", "train/learning_rate"}
    assert all(train <= line.keys() for line in lines)
    evaluated = [line["step"] for line in lines if "validation/accuracy" in line]
    assert evaluated == [60, 120, 180, 240, 300]
    assert [line["step"] for line in lines if "test/accuracy" in line] == [300]
    assert (lines[-1]["test/examples"], lines[-1]["validation/examples"]) == (360, 144)
    summary = json.loads((workdir / "summary.json").read_text())
    assert {name: lines[-1][name] for name in lines[-1] if name.startswith("test/")}.items() <= summary.items()
    assert summary["steps"] == 300 and summary["seconds"] > 0 and summary["parameters"] > 1000
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["packages"]["jax"] and environment["devices"] and environment["command"]
    assert environment["attention"]["backend"] == "heads_first"
    assert "images/s" in output and "\nmodel: " in output and "\nfinished: test accuracy" in output
    start = output[: output.index("compiled the training step")].splitlines()
    assert len(start) <= 8 and "head/logits/kernel" not in output
    assert lines[0]["train/loss"] > lines[-1]["train/loss"]


def test_recorded_learning_rates_are_those_of_the_schedule(uninterrupted):
    rates = {line["step"]: line["train/learning_rate"] for line in read_metrics(uninterrupted[0])}
    assert rates[10] == pytest.approx(2e-3 * 9 / 20, rel=1e-5)
    assert rates[160] == pytest.approx(2e-3 * 0.5 * (1 + np.cos(np.pi * 139 / 280)), rel=1e-4)


@pytest.mark.slow
def test_a_run_killed_at_random_steps_ends_as_if_uninterrupted(uninterrupted, tmp_path):
    chance, num_kills = random.Random(0), 0
    for share in (0.2, 0.6):
        process, step = start(tmp_path), (share + 0.2 * chance.random()) * 300
        wait_until(process, lambda step=step: num_records(tmp_path) * 10 >= step)
        time.sleep(0.05 * chance.random())
        num_kills += process.poll() is None
        kill(process)
    output = finish(start(tmp_path))
    assert num_kills, "it was never killed while it ran"
    assert "resuming at step" in output
    assert_same_run(tmp_path, uninterrupted[0])


@pytest.mark.slow
def test_a_streamed_run_resumed_with_other_reader_threads_ends_as_a_resident_one(uninterrupted, tmp_path):
    streamed = flags(data={"resident": "never", "ahead": 1})
    process = start(tmp_path, *streamed, "--config.data.workers=1")
    wait_until(process, lambda: num_records(tmp_path) >= 8)
    kill(process)
    output = finish(start(tmp_path, *streamed, "--config.data.workers=3"))
    assert "resuming at step" in output
    assert_same_run(tmp_path, uninterrupted[0])


@pytest.mark.parametrize("flags, expected", [([], False), (["--parameters"], True)])
def test_the_table_of_parameters_is_printed_on_request(flags, expected, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("vit_jax.runtime.compilation_cache.cache_compilations", lambda: None)
    monkeypatch.setattr("vit_jax.training.train.train", lambda *_, shown: calls.append(shown))
    assert main.main(["--config=configs/digits.py", f"--workdir={tmp_path}", *flags]) == 0
    (shown,) = calls
    assert shown.start and shown.parameters == expected and not shown.trial


def test_a_finished_run_is_reported_and_not_repeated(uninterrupted, capsys, monkeypatch):
    workdir, output = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("jax.stages.Lowered.compile", lambda *_: pytest.fail("something was compiled"))
    monkeypatch.setattr("vit_jax.runtime.compilation_cache.cache_compilations", lambda: None)
    assert main.main([*SMALL, f"--workdir={workdir}", "--config.mesh.devices=1"]) == 0
    shown = capsys.readouterr().out
    assert "is finished" in shown
    assert output.split("finished: ")[1].splitlines()[0] in shown
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_evaluate_gives_the_metrics_of_training(uninterrupted):
    workdir, _ = uninterrupted
    lines = read_metrics(workdir)
    expected = {name: value for name, value in lines[-1].items() if name.startswith("validation/")}
    found = evaluated(workdir, "--split=validation")
    assert 0 < found.pop("validation/balanced_accuracy") < 1
    assert found.pop("validation/nll") == pytest.approx(expected["validation/loss"], rel=1e-6)
    assert 0 < found.pop("validation/macro_f1") < 1 and 0 < found.pop("validation/calibration_error") < 1
    assert found == {"step": 300, "views": 1} | expected
    best = evaluated(workdir, "--best", "--split=validation")
    accuracies = {line["step"]: line["validation/accuracy"] for line in lines if "validation/accuracy" in line}
    assert best["validation/accuracy"] == max(accuracies.values()) == accuracies[best["step"]]


@pytest.mark.parametrize(
    "arguments, words",
    [(["--step=7"], "step 7"), (["--split=nowhere"], "nowhere"), (["--batch_size=0"], "--batch_size")],
)
def test_evaluate_explains_what_is_wrong(uninterrupted, arguments, words, capsys):
    from vit_jax import evaluate

    assert evaluate.main([f"--workdir={uninterrupted[0]}", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) <= 3


def test_evaluate_refuses_a_directory_without_a_run(tmp_path, capsys):
    from vit_jax import evaluate

    assert evaluate.main([f"--workdir={tmp_path}"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_config_of_a_run_directory_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert main.main(["--config=configs/digits.py", f"--workdir={tmp_path}"]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_compute_the_losses_of_one(tmp_path):
    short = flags(train={"steps": 60})
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [
        start(tmp_path / "two", *short, "--config.mesh.distributed=True", **cluster, JAX_PROCESS_ID=str(rank))
        for rank in range(2)
    ]
    outputs = [finish(process) for process in both]
    assert "finished" in outputs[0] and "finished" not in outputs[1]
    finish(start(tmp_path / "one", *short))
    for two, one in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    again = finish(start(tmp_path / "two", *short))  # one process reads what two have written
    assert "is finished" in again


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_default_workdirs():
    assert commands.default_workdir("configs/digits.py") == Path("runs/digits")
    assert commands.default_workdir("/some/where/cifar10.py:cpu") == Path("runs/cifar10-cpu")
    assert commands.default_workdir("configs/finetune.py:S/16") == Path("runs/finetune-S_16")
    assert run_files.read_summary(Path("/nowhere")) is None


@pytest.mark.slow
def test_nothing_imports_tensorflow_or_torch(tmp_path):
    """Imports every module of the package and trains, where both are blocked."""
    script = """
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tensorflow', 'torch', 'keras'):
            raise ModuleNotFoundError(name)
import importlib.util
real = importlib.util.find_spec
probe = lambda name, package=None: None if name.split('.')[0] == 'tensorflow' else real(name, package)
importlib.util.find_spec = probe
sys.meta_path.insert(0, Blocked())
import vit_jax
for module in pkgutil.walk_packages(vit_jax.__path__, 'vit_jax.'):
    importlib.import_module(module.name)
import tensorflow_datasets as tfds
tfds.builder_cls('cifar10')
from vit_jax import commands, main
assert main.main(sys.argv[1:]) == 0
loaded = {name.split('.')[0] for name in sys.modules}
assert not loaded & {'tensorflow', 'torch', 'keras'}, loaded
"""
    run_command(script, *SMALL, "--config.train.steps=3", f"--workdir={tmp_path / 'run'}")
