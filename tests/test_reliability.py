"""Real processes, stopped and killed at real moments: what a run on a cluster goes through."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
# With VIT_JAX_TEST_THOROUGH=1 all of them; in CI a part, for its time.
THOROUGH = bool(os.environ.get("VIT_JAX_TEST_THOROUGH"))
RUN = [
    "--config=configs/digits.py",
    "--config.model.variant=Ti/4",
    "--config.model.width=48",
    "--config.model.depth=2",
    "--config.model.heads=2",
    "--config.model.mlp_width=64",
    "--config.model.dropout=0.1",
    "--config.train.epochs=None",
    "--config.train.steps=400",
    "--config.train.accumulation=2",
    "--config.train.evaluate_every=100",
    "--config.checkpoint.every=10",
    "--config.log.every=10",
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}

    def run(folder, *more, **variables):
        command = [sys.executable, "-m", "vit_jax.main", *RUN, *more, f"--workdir={folder}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        mine = {**environment, **variables}
        if "XDG_CACHE_HOME" in variables:  # the command's own cache, then, and not that of the tests
            mine.pop("JAX_COMPILATION_CACHE_DIR", None)
        return subprocess.Popen(command, cwd=ROOT, env=mine, **pipes)

    return run


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def outcome(folder, step=400):
    """The digests of the last state, and the lines of metrics without what the clock says."""
    from vit_jax.checkpoint.manager import Checkpoints

    with Checkpoints(folder, read_only=True) as checkpoints:
        digests = checkpoints.beside(step)["digests"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return digests, [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(folder))
    return outcome(folder)


def reached(folder):
    """How many lines of metrics there are."""
    try:
        return (folder / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def saving(folder):
    """Whether a save is under way."""
    try:
        return any("tmp" in path.name for path in (folder / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.001)


def kill_and_go_on(start, folder, kills, inside, seed):
    """Kills a run so many times, the last `inside` of them in the middle of a save; returns the kills that came so."""
    chance, hits = random.Random(seed), 0
    for number in range(kills):
        process, before = start(folder), reached(folder)
        wait_for(process, lambda before=before: reached(folder) >= before + 1 + chance.randrange(3))
        if number >= kills - inside:
            wait_for(process, lambda: saving(folder))
            hits += saving(folder)
        else:
            time.sleep(0.3 * chance.random())
        process.kill()
        process.communicate()
    finish(start(folder))
    return hits


@pytest.mark.slow
def test_of_forty_kills_none_leaves_a_trace(start, undisturbed, tmp_path):
    """Four runs (one, unless thorough), ten kills each, the last four of them inside a save."""
    hits, runs = 0, 4 if THOROUGH else 1
    for seed in range(runs):
        folder = tmp_path / str(seed)
        hits += kill_and_go_on(start, folder, 10, 4, seed)
        assert outcome(folder) == undisturbed
    assert hits >= 4 * runs - 1


def ask_to_stop(start, folder, number, condition, chance):
    """Sends a signal at a moment; returns the process's output and the seconds until it ended."""
    process = start(folder)
    wait_for(process, condition)
    time.sleep(chance)
    process.send_signal(number)
    sent = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output, time.monotonic() - sent


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_goes_on_exactly(start, undisturbed, tmp_path):
    shown, _ = ask_to_stop(start, tmp_path, signal.SIGTERM, lambda: reached(tmp_path) >= 7, 0.0)
    assert "SIGTERM: saving, then stopping" in shown and "the same command goes on from here" in shown
    assert not (tmp_path / "lock.json").exists()
    shown, _ = ask_to_stop(start, tmp_path, signal.SIGINT, lambda: (tmp_path / "lock.json").exists(), 0.0)
    assert "SIGINT: " in shown
    finish(start(tmp_path))
    assert outcome(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_may_be_asked_at_any_moment(start, undisturbed, tmp_path, number):
    """Four moments, ten if thorough: while it starts and compiles, at first steps, while it saves, and in between."""
    chance = random.Random(number)
    few = 1 if THOROUGH else 0
    moments = [lambda: (tmp_path / "lock.json").exists()] * (1 + few) + [lambda: saving(tmp_path)] * (1 + few)
    seconds = []
    for moment in (*moments, *[None] * (2 + 4 * few)):
        before = reached(tmp_path)
        condition = moment or (lambda before=before: reached(tmp_path) > before)
        shown, taken = ask_to_stop(start, tmp_path, number, condition, 0.6 * chance.random())
        seconds.append(taken)
        if "is finished" in shown:
            break
    print(number.name, [round(value, 2) for value in seconds])
    finish(start(tmp_path))
    assert outcome(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_second_signal_does_not_wait(start, tmp_path):
    process = start(tmp_path, "--config.train.steps=100000")
    wait_for(process, lambda: reached(tmp_path) >= 1)
    process.send_signal(signal.SIGSTOP)  # so that both are there before it can have saved
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM), output
    assert "again: stopped at once" in output
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.slow
def test_fresh_processes_end_with_the_same_bits(start, undisturbed, tmp_path):
    """One beside a process that keeps a core busy, one with another hash seed."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        finish(start(tmp_path / "busy"))
    finally:
        busy.kill()
        busy.communicate()
    finish(start(tmp_path / "hash", PYTHONHASHSEED="12345"))
    assert outcome(tmp_path / "busy") == outcome(tmp_path / "hash") == undisturbed


@pytest.mark.slow
def test_several_seeds_killed_inside_one_and_stopped_between_two(start, tmp_path):
    several, run = ["--config.train.steps=60", "--config.train.seeds=4,0,2"], tmp_path / "run"
    finish(start(tmp_path / "whole", *several))
    process = start(run, *several)
    wait_for(process, lambda: reached(run / "seed-4") >= 3)
    process.kill()
    process.communicate()
    process = start(run, *several)
    wait_for(process, lambda: (run / "seed-4" / "summary.json").exists())
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in finish(process) and not list(run.rglob("lock.json"))
    process = start(run, *several)
    wait_for(process, lambda: reached(run / "seed-0") >= 2)
    process.kill()
    process.communicate()
    assert not (run / "summary.json").exists()
    assert "over 3 seeds" in finish(start(run, *several))
    for seed in (4, 0, 2):
        assert outcome(run / f"seed-{seed}", 60) == outcome(tmp_path / "whole" / f"seed-{seed}", 60)
    mine, other = (json.loads((folder / "summary.json").read_text()) for folder in (run, tmp_path / "whole"))
    assert {**mine, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.slow
def test_a_second_writer_is_refused(start, tmp_path):
    process = start(tmp_path, "--config.train.steps=100000")
    wait_for(process, lambda: reached(tmp_path) >= 1)
    second = start(tmp_path, "--config.train.steps=100000")
    output, _ = second.communicate(timeout=60)
    process.kill()
    process.communicate()
    assert second.returncode == 2 and "is being written to by process" in output
    assert len(output.strip().splitlines()[-3:]) == 3


@pytest.mark.slow
def test_a_damaged_compile_cache_does_no_harm(start, undisturbed, tmp_path):
    cache = tmp_path / "cache"
    finish(start(tmp_path / "first", XDG_CACHE_HOME=str(cache)))
    chance = np.random.default_rng(0)
    files = [path for path in (cache / "vit_jax").rglob("*") if path.is_file() and "xla-" in str(path)]
    assert files
    for path in files:
        path.write_bytes(chance.bytes(path.stat().st_size))
    finish(start(tmp_path / "second", XDG_CACHE_HOME=str(cache)))
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second") == undisturbed
