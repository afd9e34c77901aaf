"""Several processes of one cluster: they agree on what only one of them knows."""

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import TINY, finish, flags, kill, num_records, read_metrics, start_command, wait_until

from vit_jax.training import lock

RUN = [
    "--config=configs/digits.py",
    *flags(
        model=TINY | {"dropout": 0.1},
        train={"epochs": None, "steps": 120, "steps_per_dispatch": 10, "evaluate_every": 60},
        checkpoint={"every": 20},
        log={"every": 10, "tensorboard": False},
    ),
]
# The disk is full at step 40.
FULL_AT_40 = """
import shutil, sys
from vit_jax import main
from vit_jax.checkpoint.manager import CheckpointManager
seal, usage, full = CheckpointManager._seal, shutil.disk_usage, []
def recorded(self, arrays, *more):
    full[:] = [int(arrays["step"]) == 40]
    return seal(self, arrays, *more)
CheckpointManager._seal = recorded
shutil.disk_usage = lambda path: usage(path)._replace(free=7) if full == [True] else usage(path)
sys.exit(main.main(sys.argv[1:]))
"""
pytestmark = pytest.mark.slow


@pytest.fixture
def start():
    started = []

    def start(workdir, *more, program="vit_jax.main", processes=2):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{server.getsockname()[1]}"
        arguments = [*RUN, *more, f"--workdir={workdir}"] + ["--config.mesh.distributed=True"] * (processes > 1)
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        for index in range(processes):
            started.append(start_command(program, *arguments, **variables, JAX_PROCESS_ID=str(index)))
        return started[-processes:]

    yield start
    for process in started:
        kill(process)


def outputs(processes, status):
    """The outputs of processes that end with this status. All pipes are read at once, since a full one blocks."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda process: finish(process, status), processes))


def test_a_stop_request_to_one_process_stops_all_and_they_resume_together(start, tmp_path):
    """A save has failed before: all processes learn of it, and none waits for another one forever."""
    both = start(tmp_path / "two", program=FULL_AT_40)
    wait_until(both[0], lambda: num_records(tmp_path / "two") >= 7)
    assert both[0].poll() is None, both[0].communicate()[0]
    both[1].send_signal(signal.SIGTERM)  # not rank 0, which writes the files
    first, second = outputs(both, 0)
    assert "stopped at step" in first and "requested in another process" in first and "SIGTERM" in second
    outputs(start(tmp_path / "two"), 0)
    outputs(start(tmp_path / "one", processes=1), 0)
    for two, one in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, abs=1e-4)


def test_a_full_disk_is_reported_and_a_damaged_checkpoint_is_skipped(start, tmp_path):
    first, _ = outputs(start(tmp_path, program=FULL_AT_40), 0)
    assert "checkpoint save failed, will retry: [Errno 28] No space left on device: " in first and "7 free" in first
    # All files, since the storage chooses anew each time which file has which array.
    for data in (tmp_path / "checkpoints" / "120" / "state").rglob("d/*"):
        data.write_bytes(b"x" * data.stat().st_size)
    first, second = outputs(start(tmp_path, "--config.train.steps=130"), 0)
    assert "120 is corrupt" in first and "resuming at step 100" in first and "corrupt" not in second
    assert "Traceback" not in first + second and "asyncio" not in first + second


def test_all_processes_report_a_lock(start, tmp_path):
    held = {"process": 1, "started": "then", "since": time.time(), "host": "elsewhere"}
    (tmp_path / lock.NAME).write_text(json.dumps(held))
    for text in outputs(start(tmp_path), 2):
        assert "is locked by process 1 on elsewhere" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [lock.NAME]
