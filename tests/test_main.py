"""The command as a user runs it: in processes of its own, killed and started again."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vit_jax import commands, main
from vit_jax.training import run_directory

ROOT = Path(__file__).resolve().parents[1]
# Everything that could carry over from step to step is on; the model is small, and saves are frequent.
SMALL = [
    "--config=configs/digits.py",
    "--config.model.variant=Ti/4",
    "--config.model.width=16",
    "--config.model.depth=2",
    "--config.model.heads=2",
    "--config.model.mlp_width=32",
    "--config.model.dropout=0.1",
    "--config.model.stochastic_depth=0.1",
    "--config.augment.mixup=0.2",
    "--config.optimizer.average_decay=0.9",
    "--config.optimizer.warmup_steps=20",
    "--config.train.batch_size=32",
    "--config.train.epochs=None",
    "--config.train.steps=300",
    "--config.train.accumulation=2",
    "--config.train.steps_per_dispatch=7",
    "--config.train.evaluate_every=60",
    "--config.data.validation=train[90%:]",
    "--config.data.train=train[:90%]",
    "--config.checkpoint.every=25",
    "--config.log.every=10",
]


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Starts the command in a process of its own, on one device, with a compile cache shared by all of them."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}

    def run(folder, *arguments, module="vit_jax.main", **variables):
        command = [sys.executable, "-m", module, *arguments, f"--workdir={folder}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment | variables, **pipes)

    return run


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def metrics(folder):
    """The lines of metrics.jsonl without the speed, which is the clock's and not the seed's."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "mfu")} for line in lines]


def parameters(folder):
    """The newest checkpoint's arrays."""
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(Path(folder).resolve() / "checkpoints") as checkpointer:
        loaded = checkpointer.load_checkpointables()["state"]
    import jax

    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(loaded)}


@pytest.fixture(scope="session")
def undisturbed(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, finish(start(folder, *SMALL))


def test_a_run_leaves_what_it_should(undisturbed):
    folder, output = undisturbed
    assert {"config.json", "data.json", "environment.json", "metrics.jsonl", "summary.json", "checkpoints"} <= {
        path.name for path in folder.iterdir()
    }
    assert list(folder.glob("events.out.tfevents.*"))
    lines = metrics(folder)
    assert [line["step"] for line in lines] == sorted({*range(10, 301, 10)})
    train = {"train/loss", "train/accuracy", "train/gradient_norm", "train/learning_rate"}
    assert all(train <= line.keys() for line in lines)
    evaluated = [line["step"] for line in lines if "validation/accuracy" in line]
    assert evaluated == [60, 120, 180, 240, 300]
    assert [line["step"] for line in lines if "test/accuracy" in line] == [300]
    assert (lines[-1]["test/examples"], lines[-1]["validation/examples"]) == (360, 144)
    summary = json.loads((folder / "summary.json").read_text())
    assert {name: lines[-1][name] for name in lines[-1] if name.startswith("test/")}.items() <= summary.items()
    assert summary["steps"] == 300 and summary["seconds"] > 0 and summary["parameters"] > 1000
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["jax"] and environment["devices"] and environment["command"]
    assert environment["attention"]["backend"] == "heads_first"
    assert "images/s" in output and "head/logits/kernel" in output and "finished: test accuracy" in output
    assert lines[0]["train/loss"] > lines[-1]["train/loss"]


def test_the_learning_rate_in_the_records_is_the_schedules(undisturbed):
    rates = {line["step"]: line["train/learning_rate"] for line in metrics(undisturbed[0])}
    assert rates[10] == pytest.approx(2e-3 * 9 / 20, rel=1e-5)
    assert rates[160] == pytest.approx(2e-3 * 0.5 * (1 + np.cos(np.pi * 139 / 280)), rel=1e-4)


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_as_if_undisturbed(start, undisturbed, tmp_path):
    chance = random.Random(0)
    kills = 0
    for share in (0.2, 0.6):
        process = start(tmp_path, *SMALL)
        target, path = (share + 0.2 * chance.random()) * 300, tmp_path / "metrics.jsonl"
        while process.poll() is None and (not path.exists() or path.read_text().count("\n") * 10 < target):
            time.sleep(0.005)
        time.sleep(0.05 * chance.random())
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    output = finish(start(tmp_path, *SMALL))
    assert kills, "it was never killed while it ran"
    assert "going on at step" in output
    assert metrics(tmp_path) == metrics(undisturbed[0])
    mine, other = parameters(tmp_path), parameters(undisturbed[0])
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.slow
def test_streamed_and_resumed_with_other_readers_it_ends_as_if_resident(start, undisturbed, tmp_path):
    streamed = [*SMALL, "--config.data.resident=never", "--config.data.ahead=1"]
    process = start(tmp_path, *streamed, "--config.data.workers=1")
    path = tmp_path / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or path.read_text().count("\n") < 8):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    output = finish(start(tmp_path, *streamed, "--config.data.workers=3"))
    assert "going on at step" in output
    assert metrics(tmp_path) == metrics(undisturbed[0])
    mine, other = parameters(tmp_path), parameters(undisturbed[0])
    for name, value in mine.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_a_finished_run_says_so_and_shows_its_result(undisturbed, capsys, monkeypatch):
    folder, output = undisturbed
    before = (folder / "metrics.jsonl").read_bytes()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("jax.stages.Lowered.compile", lambda *_: pytest.fail("something was compiled"))
    monkeypatch.setattr("vit_jax.runtime.compilation_cache.cache_compilations", lambda: None)
    assert main.main([*SMALL, f"--workdir={folder}", "--config.mesh.devices=1"]) == 0
    shown = capsys.readouterr().out
    assert "is finished" in shown
    assert output.split("finished: ")[1].splitlines()[0] in shown
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_evaluate_scores_the_checkpoint_as_training_did(start, undisturbed):
    folder, _ = undisturbed
    last = metrics(folder)[-1]
    scored = json.loads(finish(start(folder, "--split=validation", module="vit_jax.evaluate")).splitlines()[-1])
    assert scored == {"step": 300} | {name: last[name] for name in last if name.startswith("validation/")}
    best = json.loads(finish(start(folder, "--best", "--split=validation", module="vit_jax.evaluate")).splitlines()[-1])
    accuracies = {
        line["step"]: line["validation/accuracy"] for line in metrics(folder) if "validation/accuracy" in line
    }
    assert best["validation/accuracy"] == max(accuracies.values()) == accuracies[best["step"]]


@pytest.mark.parametrize(
    "arguments, words",
    [(["--step=7"], "step 7"), (["--split=nowhere"], "nowhere"), (["--batch_size=0"], "--batch_size")],
)
def test_evaluate_explains_what_is_wrong(undisturbed, arguments, words, capsys):
    from vit_jax import evaluate

    assert evaluate.main([f"--workdir={undisturbed[0]}", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) <= 3


def test_evaluate_of_a_folder_without_a_run(tmp_path, capsys):
    from vit_jax import evaluate

    assert evaluate.main([f"--workdir={tmp_path}"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_config_of_a_workdir_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert main.main(["--config=configs/digits.py", f"--workdir={tmp_path}"]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_the_losses_of_one(start, tmp_path):
    few = [*SMALL, "--config.train.steps=60"]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [
        start(tmp_path / "two", *few, "--config.mesh.distributed=True", **cluster, JAX_PROCESS_ID=str(number))
        for number in range(2)
    ]
    outputs = [finish(process) for process in both]
    assert "finished" in outputs[0] and "finished" not in outputs[1]
    finish(start(tmp_path / "one", *few))
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    again = finish(start(tmp_path / "two", *few))  # what two wrote, one reads
    assert "is finished" in again


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_default_workdirs():
    assert commands.default_workdir("configs/digits.py") == Path("runs/digits")
    assert commands.default_workdir("/some/where/cifar10.py:cpu") == Path("runs/cifar10-cpu")
    assert commands.default_workdir("configs/finetune.py:S/16") == Path("runs/finetune-S_16")
    assert run_directory.read_summary(Path("/nowhere")) is None


@pytest.mark.slow
def test_nothing_imports_tensorflow_or_torch(tmp_path):
    """Every module of the package, and a whole run, where both are forbidden."""
    script = """
import importlib, pkgutil, sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tensorflow', 'torch', 'keras'):
            raise ModuleNotFoundError(name)
import importlib.util
real = importlib.util.find_spec
probe = lambda name, package=None: None if name.split('.')[0] == 'tensorflow' else real(name, package)
importlib.util.find_spec = probe
sys.meta_path.insert(0, Forbidden())
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
    arguments = [*SMALL, "--config.train.steps=3", f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
