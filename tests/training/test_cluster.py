"""Several processes of one cluster: they agree on what one of them alone can know."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vit_jax.training import lock

ROOT = Path(__file__).resolve().parents[2]
RUN = [
    "--config=configs/digits.py",
    "--config.model.variant=Ti/4",
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.model.mlp_width=16",
    "--config.model.dropout=0.1",
    "--config.train.epochs=None",
    "--config.train.steps=120",
    "--config.train.steps_per_dispatch=10",
    "--config.train.evaluate_every=60",
    "--config.checkpoint.every=20",
    "--config.log.every=10",
    "--config.log.tensorboard=False",
]
# The disk is full at step 40.
FULL_AT_40 = """
import shutil, sys
from vit_jax import main
from vit_jax.training import checkpoint
content, usage, full = checkpoint.Checkpoints._content, shutil.disk_usage, []
def seen(self, arrays, *more):
    full[:] = [int(arrays["step"]) == 40]
    return content(self, arrays, *more)
checkpoint.Checkpoints._content = seen
shutil.disk_usage = lambda path: usage(path)._replace(free=7) if full == [True] else usage(path)
sys.exit(main.main(sys.argv[1:]))
"""
pytestmark = pytest.mark.slow


@pytest.fixture
def start():
    started = []

    def start(folder, *more, script=None, processes=2):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{server.getsockname()[1]}"
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        command = [sys.executable, *(["-c", script] if script else ["-m", "vit_jax.main"]), *RUN, *more]
        command += [f"--workdir={folder}"] + ["--config.mesh.distributed=True"] * (processes > 1)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        for number in range(processes):
            mine = {**environment, "JAX_PROCESS_ID": str(number)}
            started.append(subprocess.Popen(command, cwd=ROOT, env=mine, **pipes))
        return started[-processes:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def outputs(processes, status):
    with ThreadPoolExecutor() as pool:  # a pipe that nobody reads stops who writes to it
        texts = list(pool.map(lambda process: process.communicate(timeout=300)[0], processes))
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(texts)
    return texts


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def test_one_that_is_stopped_stops_all_and_they_go_on_together(start, tmp_path):
    """A save fails on the way, too: all hear of it, and no process waits for another that does not come."""
    both = start(tmp_path / "two", script=FULL_AT_40)
    while not (tmp_path / "two" / "metrics.jsonl").exists() or len(metrics(tmp_path / "two")) < 7:
        assert both[0].poll() is None, both[0].communicate()[0]
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)  # the one that writes nothing
    first, second = outputs(both, 0)
    assert "stopped at step" in first and "another process was asked to" in first and "SIGTERM" in second
    outputs(start(tmp_path / "two"), 0)
    outputs(start(tmp_path / "one", processes=1), 0)
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, abs=1e-4)


def test_a_full_disk_is_told_of_and_a_damaged_checkpoint_is_passed_over(start, tmp_path):
    first, _ = outputs(start(tmp_path, script=FULL_AT_40), 0)
    assert "a save did not land: [Errno 28] No space left on device: 7 bytes" in first
    # All of the files: which of them holds an array is for the storage to choose, and is another one each time.
    for data in (tmp_path / "checkpoints" / "120" / "state").rglob("d/*"):
        data.write_bytes(b"x" * data.stat().st_size)
    first, second = outputs(start(tmp_path, "--config.train.steps=130"), 0)
    assert "120 is damaged" in first and "going on at step 100" in first and "damaged" not in second
    assert "Traceback" not in first + second and "asyncio" not in first + second


def test_a_lock_is_heard_of_by_all(start, tmp_path):
    held = {"process": 1, "started": "then", "since": time.time(), "host": "elsewhere"}
    (tmp_path / lock.NAME).write_text(json.dumps(held))
    for text in outputs(start(tmp_path), 2):
        assert "is being written to by process 1 on elsewhere" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [lock.NAME]
