"""One writer per run directory: a lock file that names its holder, with a heartbeat."""

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
CHECK_INTERVAL = 5.0  # seconds between checks that the lock is still held
HEARTBEAT_INTERVAL = 60.0  # seconds between updates of the file's modification time
STALE_AFTER = 600.0  # seconds without a heartbeat after which another host's lock is taken over
SAME_SYSTEM = ("host", "boot", "namespace")  # where all are equal, process ids mean the same processes

_held: list["Lock"] = []  # by this process
_acquiring = threading.Lock()  # so that `release_all` sees every lock in `_held`


class Lock:
    """Holds WORKDIR/lock.json from construction until `release`; a context manager.

    The file names the process, its host and its start time. The lock of a process that no longer exists is taken over
    at once if that can be known: on the same host, since its last boot, in the same container. Otherwise it is taken
    over when it has had no heartbeat for `STALE_AFTER` seconds. A holder that loses its lock is notified within
    `CHECK_INTERVAL` seconds.
    """

    def __init__(self, workdir: Path, on_lost: Callable[[str], None] | None = None):
        """Acquires the lock.

        Args:
            workdir: the run directory.
            on_lost: called once, in another thread, with a line that names the process that has taken the lock over.

        Raises:
            UserError: another process holds it.
        """
        self._path, self._on_lost = workdir / NAME, on_lost
        self._content = json.dumps(_this_process())
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lock", daemon=True)
        with _acquiring:
            while not self._create():
                holder = _read(self._path)
                if holder is None:  # released or taken over in between
                    continue
                if not _is_stale(self._path, holder):
                    raise UserError(_locked_message(self._path, holder))
                self._remove_stale(holder)
            self._thread.start()
            _held.append(self)

    def _create(self) -> bool:
        # The complete file is linked to the name: nobody reads an empty lock, and of two processes one fails.
        scratch = self._path.with_name(f".{NAME}.{os.getpid()}.{threading.get_ident()}")
        scratch.write_text(self._content)
        try:
            os.link(scratch, self._path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return _create_exclusively(self._path, self._content)
        finally:
            scratch.unlink()

    def _remove_stale(self, holder: dict[str, Any]) -> None:
        aside = self._path.with_name(f".{NAME}.{os.getpid()}.old")
        try:
            os.rename(self._path, aside)  # of two processes one fails
        except FileNotFoundError:
            return
        if _read(aside) != holder:
            # Another process has just taken over: put its lock back, unless a third one holds it by now.
            with contextlib.suppress(FileExistsError):
                os.link(aside, self._path)
        aside.unlink()

    def _watch(self) -> None:
        heartbeat = time.monotonic()
        while not self._released.wait(CHECK_INTERVAL):
            holder = _read(self._path)
            if holder and holder != json.loads(self._content):
                if self._on_lost is not None:
                    self._on_lost(
                        f"{self._path.parent} has been taken over by process {holder.get('process')} on "
                        f"{holder.get('host')}: this process had no heartbeat, or its lock was removed"
                    )
                return
            with contextlib.suppress(OSError):  # the disk may be away for a moment; the next check tries again
                if holder is None:
                    self._create()
                elif time.monotonic() - heartbeat > HEARTBEAT_INTERVAL:
                    os.utime(self._path)
                    heartbeat = time.monotonic()

    def release(self) -> None:
        """Releases the lock; further calls do nothing."""
        self._released.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(CHECK_INTERVAL)  # or a last check could create the file again
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
    """Releases all locks of a process that is about to exit; it cannot acquire another one afterwards."""
    _acquiring.acquire()
    for lock in list(_held):
        lock.release()


def _create_exclusively(path: Path, content: str) -> bool:
    try:
        with open(path, "x") as file:
            file.write(content)
        return True
    except FileExistsError:
        return False


def _this_process() -> dict[str, Any]:
    import psutil

    process = psutil.Process()
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process.create_time()))
    return {"process": process.pid, "started": started, "since": process.create_time(), **_this_system()}


def _this_system() -> dict[str, str]:
    """Returns what identifies the process table: host names are shared by containers, and outlive a reboot."""
    system = {"host": socket.gethostname(), "boot": "", "namespace": ""}
    with contextlib.suppress(OSError):  # not Linux
        system["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        system["namespace"] = os.readlink("/proc/self/ns/pid")
    return system


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the holder; None if there is no lock, {} if it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _locked_message(path: Path, holder: dict[str, Any]) -> str:
    process = f"process {holder.get('process')} on {holder.get('host')}, started {holder.get('started')}"
    advice = "wait for it, stop it, or use another --workdir"
    system = _this_system()
    if any(holder.get(name) != system[name] for name in SAME_SYSTEM):
        advice += f"; without a heartbeat, the lock is taken over after {STALE_AFTER / 60:.0f} minutes"
    return f"{path.parent} is locked by {process}\n  {advice}\n  (if there is no such process, remove {path})"


def _is_stale(path: Path, holder: dict[str, Any]) -> bool:
    import psutil

    system = _this_system()
    if all(holder.get(name) == system[name] for name in SAME_SYSTEM):
        try:
            process = psutil.Process(holder["process"])
            # The process id may have been reused since.
            return abs(process.create_time() - holder["since"]) > 1 or process.status() == psutil.STATUS_ZOMBIE
        except (psutil.Error, KeyError, TypeError, ValueError):
            return True
    try:
        return time.time() - path.stat().st_mtime > STALE_AFTER
    except FileNotFoundError:
        return False
