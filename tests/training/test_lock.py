"""One writer per run directory."""

import contextlib
import json
import os
import queue
import subprocess
import time

import numpy as np
import pytest
from helpers import kill, mostly_slow, run_command, start_command, tiny_config

from vit_jax import atomic
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import CheckpointManager, SaveFailed
from vit_jax.errors import UserError
from vit_jax.training import lock
from vit_jax.training.metrics import MetricsWriter

HOLD = """
import sys, time
from pathlib import Path
from vit_jax.errors import UserError
from vit_jax.training.lock import Lock
while time.time() < float(sys.argv[2]):
    pass
try:
    Lock(Path(sys.argv[1]))
except UserError:
    print("refused", flush=True)
else:
    print("acquired", flush=True)
    sys.stdin.read()  # until the test closes it
"""


def start(workdir, at=0.0):
    return start_command(HOLD, workdir, at, stdin=subprocess.PIPE, stderr=None)


def dead(process):
    """The lock file of a process of this system that no longer exists."""
    return {"process": process, "started": "x", "since": 1.0, **lock._this_system()}


@pytest.mark.parametrize("repeats", [1, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stale", [False, True])
def test_of_two_writers_one_is_refused(tmp_path, stale, repeats):
    """Both try at the same moment, with and without a stale lock."""
    for repeat in range(repeats):
        workdir = tmp_path / str(repeat)
        workdir.mkdir()
        if stale:
            (workdir / lock.NAME).write_text(json.dumps(dead(2**22 + 1)))
        both = [start(workdir, time.time() + 0.7) for _ in range(2)]
        results = sorted(process.stdout.readline().strip() for process in both)
        for process in both:
            process.communicate()
        assert results == ["acquired", "refused"]


def test_the_message_names_the_holder(tmp_path):
    with lock.Lock(tmp_path), pytest.raises(UserError) as caught:
        lock.Lock(tmp_path)
    assert f"is locked by process {os.getpid()} on {lock.socket.gethostname()}, started 20" in str(caught.value)
    assert not (tmp_path / lock.NAME).exists()
    lock.Lock(tmp_path).release()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    process = start(tmp_path)
    assert process.stdout.readline().strip() == "acquired"
    kill(process)
    assert (tmp_path / lock.NAME).exists()
    with lock.Lock(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()


def test_a_lock_whose_process_id_was_reused_is_taken_over(tmp_path):
    (tmp_path / lock.NAME).write_text(json.dumps(dead(os.getpid())))
    lock.Lock(tmp_path).release()


@pytest.mark.parametrize("name", lock.SAME_SYSTEM)
def test_a_lock_of_another_system_is_taken_over_without_a_heartbeat(tmp_path, monkeypatch, name):
    """Of another host, of another container on this host, and of another boot if several hosts may use the disk."""
    monkeypatch.setattr(lock, "LOCAL_FILE_SYSTEMS", ())
    path = tmp_path / lock.NAME
    path.write_text(json.dumps({**dead(1), name: "elsewhere"}))
    with pytest.raises(UserError, match=r"(?s)process 1 on .*taken over after 10 minutes"):
        lock.Lock(tmp_path)
    old = time.time() - lock.STALE_AFTER - 1
    os.utime(path, (old, old))
    lock.Lock(tmp_path).release()


def test_a_lock_from_before_the_last_boot_is_taken_over_at_once_on_a_local_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_is_on_local_disk", lambda path: path.parent == tmp_path)
    (tmp_path / lock.NAME).write_text(json.dumps({**dead(1), "boot": "the one before"}))
    lock.Lock(tmp_path).release()
    (tmp_path / lock.NAME).write_text(json.dumps({**dead(1), "boot": "the one before", "host": "elsewhere"}))
    with pytest.raises(UserError, match="is locked by process 1 on elsewhere"):
        lock.Lock(tmp_path)


def test_a_holder_that_loses_its_lock_is_notified(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "CHECK_INTERVAL", 0.01)
    notified = queue.Queue()
    first = lock.Lock(tmp_path, notified.put)
    other = {**dead(77), "host": "elsewhere"}
    (tmp_path / lock.NAME).write_text(json.dumps(other))
    assert "taken over by process 77 on elsewhere" in notified.get(timeout=30)
    first.release()
    assert json.loads((tmp_path / lock.NAME).read_text()) == other


def test_a_removed_lock_is_created_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "CHECK_INTERVAL", 0.01)
    path = tmp_path / lock.NAME
    with lock.Lock(tmp_path):
        path.unlink()
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_the_message_about_an_unreadable_lock_names_its_file(tmp_path):
    (tmp_path / lock.NAME).write_text("{")
    with pytest.raises(UserError, match=r"remove .*lock\.json"):
        lock.Lock(tmp_path)


def test_release_all_also_releases_a_lock_that_is_being_acquired(tmp_path):
    """A signal between two seeds: one lock is held, and the next is being acquired while all are released."""
    code = """
import os, pathlib, sys, threading
from vit_jax.training import lock
workdirs = [pathlib.Path(sys.argv[1]) / str(k) for k in range(40)]
for workdir in workdirs: workdir.mkdir()
first = lock.Lock(workdirs[0])
def end():
    lock.release_all()
    os._exit(0)
threading.Timer(0.05, end).start()
held = [first]
for workdir in workdirs[1:]: held.append(lock.Lock(workdir))
threading.Event().wait()
"""
    run_command(code, tmp_path, timeout=60)
    assert not list(tmp_path.rglob("lock.json"))


# --- a holder that was stopped, and wakes up after another one has taken over ---------------------------------------


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def save(workdir, writer):
    with CheckpointManager(workdir) as manager:
        manager.save({"step": np.int32(7)}, {})
        with pytest.raises(SaveFailed, match="has been taken over"):
            manager.wait()


def change(workdir, writer):
    run_files.write_config(workdir, tiny_config().to_dict(), [{"step": 1, "changes": ["train.steps: 1 -> 2"]}])


WRITES = {
    "config.json": lambda workdir, writer: atomic.write_json(workdir / "config.json", {"new": 1}),
    "summary.json": lambda workdir, writer: atomic.remove(workdir / "summary.json"),
    "changes.jsonl": change,
    "metrics.jsonl": lambda workdir, writer: writer.write(3, {"a": 1.0}),
    "truncated metrics.jsonl": lambda workdir, writer: writer.truncate(0),
    "TensorBoard events": lambda workdir, writer: writer._events.add(3, {"a": 1.0}),
    "checkpoint": save,
    "another process's incomplete checkpoint": lambda workdir, writer: atomic.rename(workdir / "a", workdir / "b"),
}


@pytest.mark.parametrize(
    "released", mostly_slow([False, True], 2), ids=["the other one runs", "the other one has ended"]
)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_holder_that_wakes_up_writes_nothing(tmp_path, write, released):
    """The lock's own thread does not run, as if the writing thread were the first to wake up."""
    (tmp_path / "summary.json").write_text("{}")
    lost = []
    held = lock.Lock(tmp_path, lost.append)
    with MetricsWriter(tmp_path, 0, tensorboard=True) as writer:
        writer.write(1, {"a": 1.0})
        name = lock.LAST_HOLDER if released else lock.NAME
        if released:
            (tmp_path / lock.NAME).unlink()
        (tmp_path / name).write_text(json.dumps({**dead(77), "host": "elsewhere"}))
        before = contents(tmp_path)
        with contextlib.suppress(UserError):
            write(tmp_path, writer)
        held.release()
    assert lost == [
        f"{tmp_path} has been taken over by process 77 on elsewhere: this process had no heartbeat, or its lock was "
        "removed"
    ]
    assert contents(tmp_path) == before


def test_what_a_stopped_holder_was_writing_cannot_be_renamed_any_more(tmp_path):
    """It is stopped after its last look at the lock, and before the rename."""
    with contextlib.suppress(FileNotFoundError), atomic.replace(tmp_path / "config.json") as file:
        file.write(b"old")
        lock.Lock(tmp_path).release()  # of another process
        atomic.write_bytes(tmp_path / "config.json", b"new")
    assert (tmp_path / "config.json").read_bytes() == b"new"


def test_a_stopped_holder_writes_its_records_to_a_file_that_is_gone(tmp_path):
    """The file of the process that took over is another one, even if no record had to be dropped."""
    sleeper = MetricsWriter(tmp_path, 0, tensorboard=True)
    sleeper.write(1, {"a": 1.0})
    with MetricsWriter(tmp_path, 1, tensorboard=True) as writer:
        before = contents(tmp_path)
        sleeper.write(2, {"a": 2.0})
        sleeper.flush()
        assert contents(tmp_path) == before
        writer.write(2, {"a": 3.0})
    assert [json.loads(line)["a"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1.0, 3.0]


def test_without_a_thread_there_is_no_lock(tmp_path, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", fail)
    with pytest.raises(UserError, match="no further thread can be started"):
        lock.Lock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or it would be empty after a power failure, and held by nobody for ten minutes."""
    calls, fsync, link = [], os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "link", lambda *names: (calls.append("link"), link(*names))[1])
    lock.Lock(tmp_path).release()
    assert calls[:2] == ["fsync", "link"]
