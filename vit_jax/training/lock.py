"""One writer a workdir: a lock that says who holds it, and that outlives nobody."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError

NAME = "lock.json"
LOOK = 5.0  # seconds between two looks whether it is still held
BEAT = 60.0  # seconds between signs of life
STALE = 600.0  # seconds without one, after which a lock of another host counts as left behind
PLACE = ("host", "boot", "namespace")  # where all are equal, a process can be seen from here

_held: list["Lock"] = []  # of this process
_taking = threading.Lock()  # so that a signal finds every lock that is taken in `_held`


class Lock:
    """Holds WORKDIR/lock.json from construction until `release`; a context manager.

    The file names process, host and start time. On the same host a lock whose process is gone is taken over at once;
    of another host, another container, or from before the host's last start, where that cannot be seen, once it has
    shown no sign of life for ten minutes. Who is taken for dead and is not, hears of it within seconds.
    """

    def __init__(self, workdir: Path, lost: Callable[[str], None] = lambda words: None):
        """Takes the lock.

        Args:
            workdir: the folder.
            lost: is called once, in another thread, with a line that says who has taken the lock over.

        Raises:
            UserError: another process is writing there.
        """
        self._path, self._lost = workdir / NAME, lost
        self._content = json.dumps(_who())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        with _taking:
            while not self._take():
                held = _read(self._path)
                if held is None:  # released, or taken over by another, in between
                    continue
                if not _is_left_behind(self._path, held):
                    raise UserError(_refusal(self._path, held))
                self._remove_left_behind(held)
            self._thread.start()
            _held.append(self)

    def _take(self) -> bool:
        # Written elsewhere and linked: the lock is never seen empty, and of two that try one fails.
        scratch = self._path.with_name(f".{NAME}.{os.getpid()}.{threading.get_ident()}")
        scratch.write_text(self._content)
        try:
            os.link(scratch, self._path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return _create(self._path, self._content)
        finally:
            scratch.unlink()

    def _remove_left_behind(self, held: dict[str, Any]) -> None:
        aside = self._path.with_name(f".{NAME}.{os.getpid()}.old")
        try:
            os.rename(self._path, aside)  # of two that try one fails
        except FileNotFoundError:
            return
        if _read(aside) != held:
            # Another was faster, and this is its new lock: back with it, unless a third holds it by now.
            with contextlib.suppress(FileExistsError):
                os.link(aside, self._path)
        aside.unlink()

    def _beat(self) -> None:
        beaten = time.monotonic()
        while not self._done.wait(LOOK):
            held = _read(self._path)
            if held and held != json.loads(self._content):
                self._lost(
                    f"{self._path.parent} has been taken over by process {held.get('process')} on {held.get('host')}: "
                    "this one had shown no sign of life, or its lock was removed"
                )
                return
            with contextlib.suppress(OSError):  # a disk that is away for a moment; the next look will tell
                if held is None:
                    self._take()
                elif time.monotonic() - beaten > BEAT:
                    os.utime(self._path)
                    beaten = time.monotonic()

    def release(self) -> None:
        """Gives the lock back; once is enough."""
        self._done.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(LOOK)  # a last look must not take it anew
        with contextlib.suppress(OSError):
            if self._path.read_text() == self._content:
                self._path.unlink()
        with contextlib.suppress(ValueError):
            _held.remove(self)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def release_all() -> None:
    """Releases all locks of a process that is about to end; it can take no other from then on."""
    _taking.acquire()
    for lock in list(_held):
        lock.release()


def _create(path: Path, content: str) -> bool:
    try:
        with open(path, "x") as file:
            file.write(content)
        return True
    except FileExistsError:
        return False


def _who() -> dict[str, Any]:
    import psutil

    own = psutil.Process()
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(own.create_time()))
    return {"process": own.pid, "started": started, "since": own.create_time(), **_here()}


def _here() -> dict[str, str]:
    """Where the numbers of processes mean what they mean here: containers and restarts share names of hosts."""
    here = {"host": socket.gethostname(), "boot": "", "namespace": ""}
    with contextlib.suppress(OSError):  # not Linux
        here["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        here["namespace"] = os.readlink("/proc/self/ns/pid")
    return here


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(path: Path, held: dict[str, Any]) -> str:
    who = f"process {held.get('process')} on {held.get('host')}, started {held.get('started')}"
    wait = "wait for it, stop it, or give another --workdir"
    here = _here()
    if any(held.get(name) != here[name] for name in PLACE):
        wait += f"; without a sign of life it is taken over after {STALE / 60:.0f} minutes"
    return f"{path.parent} is being written to by {who}\n  {wait}\n  (if there is no such process: remove {path})"


def _is_left_behind(path: Path, held: dict[str, Any]) -> bool:
    import psutil

    here = _here()
    if all(held.get(name) == here[name] for name in PLACE):
        try:
            process = psutil.Process(held["process"])
            # The number may have been given to another process since.
            return abs(process.create_time() - held["since"]) > 1 or process.status() == psutil.STATUS_ZOMBIE
        except (psutil.Error, KeyError, TypeError, ValueError):
            return True
    try:
        return time.time() - path.stat().st_mtime > STALE
    except FileNotFoundError:
        return False
