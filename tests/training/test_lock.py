"""One writer a workdir."""

import json
import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax.errors import UserError
from vit_jax.training import lock

ROOT = Path(__file__).resolve().parents[2]
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
    print("taken", flush=True)
    sys.stdin.read()  # until the test lets go
"""


def start(folder, at=0.0):
    command = [sys.executable, "-c", HOLD, str(folder), str(at)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


def dead(process):
    """What a process of this very place left behind."""
    return {"process": process, "started": "x", "since": 1.0, **lock._here()}


@pytest.mark.parametrize("turns", [1, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("left_behind", [False, True])
def test_of_two_writers_one_is_refused(tmp_path, left_behind, turns):
    """Both try at the same moment, ten times; with a dead process's lock in the way, too."""
    for turn in range(turns):
        folder = tmp_path / str(turn)
        folder.mkdir()
        if left_behind:
            (folder / lock.NAME).write_text(json.dumps(dead(2**22 + 1)))
        both = [start(folder, time.time() + 0.7) for _ in range(2)]
        words = sorted(process.stdout.readline().strip() for process in both)
        for process in both:
            process.communicate()
        assert words == ["refused", "taken"]


def test_who_is_refused_hears_who_writes(tmp_path):
    with lock.Lock(tmp_path), pytest.raises(UserError) as caught:
        lock.Lock(tmp_path)
    assert f"is being written to by process {os.getpid()} on {lock.socket.gethostname()}, started 20" in str(
        caught.value
    )
    assert not (tmp_path / lock.NAME).exists()
    lock.Lock(tmp_path).release()


def test_a_killed_process_leaves_no_lock(tmp_path):
    process = start(tmp_path)
    assert process.stdout.readline().strip() == "taken"
    process.kill()
    process.communicate()
    assert (tmp_path / lock.NAME).exists()
    with lock.Lock(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
    (tmp_path / lock.NAME).write_text(json.dumps(dead(os.getpid())))
    lock.Lock(tmp_path).release()


@pytest.mark.parametrize("name", lock.PLACE)
def test_a_lock_from_elsewhere_is_taken_over_once_it_is_silent(tmp_path, name):
    """Of another host, of another container of that name, and from before the host's last start."""
    path = tmp_path / lock.NAME
    path.write_text(json.dumps({**dead(1), name: "elsewhere"}))
    with pytest.raises(UserError, match=r"(?s)process 1 on .*taken over after 10 minutes"):
        lock.Lock(tmp_path)
    silent = time.time() - lock.STALE - 1
    os.utime(path, (silent, silent))
    lock.Lock(tmp_path).release()


def test_a_holder_that_was_taken_for_dead_hears_of_it_and_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOOK", 0.01)
    heard = queue.Queue()
    first = lock.Lock(tmp_path, heard.put)
    other = {**dead(77), "host": "elsewhere"}
    (tmp_path / lock.NAME).write_text(json.dumps(other))
    assert "taken over by process 77 on elsewhere" in heard.get(timeout=30)
    first.release()
    assert json.loads((tmp_path / lock.NAME).read_text()) == other


def test_a_lock_that_was_removed_is_taken_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOOK", 0.01)
    path = tmp_path / lock.NAME
    with lock.Lock(tmp_path):
        path.unlink()
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_a_lock_that_cannot_be_read_names_its_file(tmp_path):
    (tmp_path / lock.NAME).write_text("{")
    with pytest.raises(UserError, match=r"remove .*lock\.json"):
        lock.Lock(tmp_path)


def test_a_process_that_ends_leaves_no_lock_that_it_is_just_taking(tmp_path):
    """A signal between two seeds: one lock is held, the next is being taken while all are released."""
    code = f"""
import os, pathlib, threading
from vit_jax.training import lock
folders = [pathlib.Path({str(tmp_path)!r}) / str(k) for k in range(40)]
for folder in folders: folder.mkdir()
first = lock.Lock(folders[0])
def end():
    lock.release_all()
    os._exit(0)
threading.Timer(0.05, end).start()
held = [first]
for folder in folders[1:]: held.append(lock.Lock(folder))
threading.Event().wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert not list(tmp_path.rglob("lock.json"))
