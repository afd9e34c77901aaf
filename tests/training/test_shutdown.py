"""Stop requests: by signals and by time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax.errors import UserError
from vit_jax.training.shutdown import StopRequest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, time
from vit_jax.errors import UserError
from vit_jax.training.shutdown import StopRequest
with StopRequest() as stop:
    stop.on_exit = lambda: print("on_exit", flush=True)
    stop.exit_on_signal = sys.argv[1] == "saved"
    print("ready", flush=True)
    deadline = time.monotonic() + 60
    while stop.reason is None and time.monotonic() < deadline:
        time.sleep(0.01)
    print(f"reason: {stop.reason}", flush=True)
    time.sleep(60 if sys.argv[1] == "slow" else 0)
"""


def start(mode):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, mode], env=environment, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    process = start("quick")
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, f"reason: {number.name}\n")
    assert f"{number.name}: saving, then stopping" in errors


def test_another_signal_exits_at_once():
    process = start("slow")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "reason: SIGTERM\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + signal.SIGINT, "on_exit\n")
    assert "SIGINT again: exiting at once, without saving" in errors


def test_with_exit_on_signal_the_first_signal_ends_the_process():
    process = start("saved")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "on_exit\n")
    assert "SIGTERM: stopped; everything is saved" in errors


def test_a_run_stops_after_its_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopRequest(max_minutes=5)
    assert stop.reason is None
    now[0] = 301.0
    assert stop.reason == "train.max_minutes is 5"


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.reason is None and not stop.exit_on_signal
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_thread_the_handlers_are_restored(monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("threading.Thread.start", fail)
    with pytest.raises(UserError, match="no further thread can be started"), StopRequest():
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_process_exits_even_if_nothing_can_be_released():
    code = PROGRAM.replace('lambda: print("on_exit", flush=True)', "lambda: 1 / 0")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "saved"], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 0
