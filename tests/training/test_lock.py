"""One writer per run directory."""

import json
import os
import queue
import subprocess
import time

import pytest
from helpers import kill, run_command, start_command

from vit_jax.errors import UserError
from vit_jax.training import lock

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
def test_a_lock_of_another_system_is_taken_over_without_a_heartbeat(tmp_path, name):
    """Of another host, of another container on this host, and from before the last boot."""
    path = tmp_path / lock.NAME
    path.write_text(json.dumps({**dead(1), name: "elsewhere"}))
    with pytest.raises(UserError, match=r"(?s)process 1 on .*taken over after 10 minutes"):
        lock.Lock(tmp_path)
    old = time.time() - lock.STALE_AFTER - 1
    os.utime(path, (old, old))
    lock.Lock(tmp_path).release()


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
