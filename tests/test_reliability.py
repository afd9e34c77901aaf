"""Training processes that are stopped and killed, as they are on a cluster."""

import json
import random
import signal
import time

import numpy as np
import pytest
from helpers import THOROUGH, finish, flags, kill, num_records, read_metrics, start_command, wait_until

RUN = [
    "--config=configs/digits.py",
    *flags(
        model={"variant": "Ti/4", "width": 48, "depth": 2, "heads": 2, "mlp_width": 64, "dropout": 0.1},
        train={"epochs": None, "steps": 400, "accumulation": 2, "evaluate_every": 100},
        checkpoint={"every": 10},
        log={"every": 10},
    ),
]
ENDLESS = "--config.train.steps=100000"
pytestmark = pytest.mark.slow


def start(workdir, *arguments, **variables):
    return start_command("vit_jax.main", *RUN, *arguments, f"--workdir={workdir}", **variables)


def outcome(workdir, step=400):
    """The digests of the last state, and the records of metrics.jsonl."""
    from vit_jax.checkpoint.manager import CheckpointManager

    with CheckpointManager(workdir, read_only=True) as checkpoints:
        digests = checkpoints.content(step)["digests"]
    return digests, read_metrics(workdir)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(workdir))
    return outcome(workdir)


def is_saving(workdir):
    try:
        return any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


def is_locked(workdir):
    return (workdir / "lock.json").exists()


def kill_and_resume(workdir, num_kills, num_in_saves, seed):
    """Kills a run `num_kills` times, the last `num_in_saves` of them during a save; returns how many of these were."""
    chance, hits = random.Random(seed), 0
    for index in range(num_kills):
        process, wanted = start(workdir), num_records(workdir) + 1 + chance.randrange(3)
        wait_until(process, lambda wanted=wanted: num_records(workdir) >= wanted)
        if index >= num_kills - num_in_saves:
            wait_until(process, lambda: is_saving(workdir))
            hits += is_saving(workdir)
        else:
            time.sleep(0.3 * chance.random())
        kill(process)
    finish(start(workdir))
    return hits


def test_kills_do_not_change_the_result(uninterrupted, tmp_path):
    """One run killed seven times, or four killed ten times each if thorough; the last four kills come during a save."""
    hits, num_runs, num_kills = 0, *((4, 10) if THOROUGH else (1, 7))
    for seed in range(num_runs):
        workdir = tmp_path / str(seed)
        hits += kill_and_resume(workdir, num_kills, 4, seed)
        assert outcome(workdir) == uninterrupted
    assert hits >= 4 * num_runs - 1


def stop(workdir, number, condition, delay):
    """Sends a signal `delay` seconds after a condition holds; returns the output and how many seconds stopping took."""
    process = start(workdir)
    wait_until(process, condition)
    time.sleep(delay)
    process.send_signal(number)
    sent = time.monotonic()
    return finish(process, timeout=120), time.monotonic() - sent


def test_a_stopped_run_saves_and_resumes_exactly(uninterrupted, tmp_path):
    shown, _ = stop(tmp_path, signal.SIGTERM, lambda: num_records(tmp_path) >= 7, 0.0)
    assert "SIGTERM: saving, then stopping" in shown and "run the same command again to resume" in shown
    assert not is_locked(tmp_path)
    shown, _ = stop(tmp_path, signal.SIGINT, lambda: is_locked(tmp_path), 0.0)
    assert "SIGINT: " in shown
    finish(start(tmp_path))
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_can_be_stopped_at_any_moment(uninterrupted, tmp_path, number):
    """While it starts and compiles, at its first steps, while it saves, and between: 4 stops, 10 if thorough."""
    chance = random.Random(number)
    repeats = 2 if THOROUGH else 1
    moments = [is_locked] * repeats + [is_saving] * repeats + [None] * (6 if THOROUGH else 2)
    seconds = []
    for moment in moments:
        before = num_records(tmp_path)
        at = moment or (lambda workdir, before=before: num_records(workdir) > before)
        shown, duration = stop(tmp_path, number, lambda at=at: at(tmp_path), 0.6 * chance.random())
        seconds.append(duration)
        if "is finished" in shown:
            break
    print(number.name, [round(value, 2) for value in seconds])
    finish(start(tmp_path))
    assert outcome(tmp_path) == uninterrupted


def test_a_second_signal_stops_the_run_at_once(tmp_path):
    process = start(tmp_path, ENDLESS)
    wait_until(process, lambda: num_records(tmp_path) >= 1)
    process.send_signal(signal.SIGSTOP)  # so that both signals arrive before it can have saved
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    output = finish(process, status=(128 + signal.SIGINT, 128 + signal.SIGTERM), timeout=60)
    assert "again: exiting at once, without saving" in output
    assert not is_locked(tmp_path)


def test_other_processes_get_the_same_bits(uninterrupted, tmp_path):
    """One while another process keeps a core busy, one with another hash seed."""
    busy = start_command("while True:\n    pass")
    try:
        finish(start(tmp_path / "busy"))
    finally:
        kill(busy)
    finish(start(tmp_path / "hash", PYTHONHASHSEED="12345"))
    assert outcome(tmp_path / "busy") == outcome(tmp_path / "hash") == uninterrupted


def test_several_seeds_are_resumed_after_a_kill_and_after_a_signal_between_two(tmp_path):
    several, run = flags(train={"steps": 60, "seeds": "4,0,2"}), tmp_path / "run"
    finish(start(tmp_path / "whole", *several))
    process = start(run, *several)
    wait_until(process, lambda: num_records(run / "seed-4") >= 3)
    kill(process)
    process = start(run, *several)
    wait_until(process, lambda: (run / "seed-4" / "summary.json").exists())
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in finish(process) and not list(run.rglob("lock.json"))
    process = start(run, *several)
    wait_until(process, lambda: num_records(run / "seed-0") >= 2)
    kill(process)
    assert not (run / "summary.json").exists()
    assert "over 3 seeds" in finish(start(run, *several))
    for seed in (4, 0, 2):
        assert outcome(run / f"seed-{seed}", 60) == outcome(tmp_path / "whole" / f"seed-{seed}", 60)
    found, expected = (json.loads((workdir / "summary.json").read_text()) for workdir in (run, tmp_path / "whole"))
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_a_second_writer_is_refused(tmp_path):
    process = start(tmp_path, ENDLESS)
    wait_until(process, lambda: num_records(tmp_path) >= 1)
    output = finish(start(tmp_path, ENDLESS), status=2, timeout=60)
    kill(process)
    assert "is locked by process" in output
    assert len(output.strip().splitlines()[-3:]) == 3


def test_a_corrupt_compilation_cache_does_no_harm(uninterrupted, tmp_path):
    cache, generator = tmp_path / "cache", np.random.default_rng(0)
    finish(start(tmp_path / "first", XDG_CACHE_HOME=str(cache)))
    files = [path for path in (cache / "vit_jax").rglob("*") if path.is_file() and "xla-" in str(path)]
    assert files
    for path in files:
        path.write_bytes(generator.bytes(path.stat().st_size))
    finish(start(tmp_path / "second", XDG_CACHE_HOME=str(cache)))
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second") == uninterrupted
