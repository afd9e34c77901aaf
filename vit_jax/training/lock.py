"""One writer per run directory: a lock file that names its holder, with a heartbeat."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_jax import atomic
from vit_jax.errors import UserError, no_thread

NAME = "lock.json"
LAST_HOLDER = f".{NAME}.last"  # the lock of the last process that released it
CHECK_INTERVAL = 5.0  # seconds between checks that the lock is still held
HEARTBEAT_INTERVAL = 60.0  # seconds between updates of the file's modification time
STALE_AFTER = 600.0  # seconds without a heartbeat after which another host's lock is taken over
SAME_SYSTEM = ("host", "boot", "namespace")  # where all are equal, process ids mean the same processes
# File systems that only one running system can have mounted.
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs"}

_held: list["Lock"] = []  # by this process
_acquiring = threading.Lock()  # so that `release_all` sees every lock in `_held`


class Lock:
    """Holds WORKDIR/lock.json from construction until `release`; a context manager.

    The file names the process, its host and its start time. The lock of a process that no longer exists is taken over
    at once if that can be known: on the same host, since its last boot, in the same container; or from before the last
    boot, on a disk that no other host can use. Otherwise it is taken over when it has had no heartbeat for
    `STALE_AFTER` seconds.

    A process may be stopped for longer than that, and wake up after another one has taken over. So a holder looks
    whether it still has the lock every `CHECK_INTERVAL` seconds, and before it changes the name of a file in the run
    directory (`atomic.check`). What the stopped process was writing has been removed by then: it cannot be renamed.
    """

    def __init__(self, workdir: Path, on_lost: Callable[[str], None] | None = None):
        """Acquires the lock.

        Args:
            workdir: the run directory.
            on_lost: called once, in any thread, with a line that names the process that has taken the lock over.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        self._path, self._last, self._on_lost = workdir / NAME, workdir / LAST_HOLDER, on_lost
        self._holder = {**_this_process(), "id": secrets.token_hex(8)}
        self._before: dict[str, Any] | None = None  # the last holder before this one
        self._released, self._is_lost, self._notifying = threading.Event(), False, threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="lock", daemon=True)
        with _acquiring:
            try:
                self._acquire()
                atomic.remove_scratch(workdir)  # of earlier holders: they must not be able to rename it any more
                self._thread.start()
            except (OSError, RuntimeError) as error:
                with contextlib.suppress(OSError):
                    self._remove(self._holder)
                raise _not_acquired(self._path, error) from error
            atomic.add_guard(workdir, self.check)
            _held.append(self)

    def _acquire(self) -> None:
        while True:
            self._before = _read(self._last)
            if self._create():
                if self._other() is None:
                    return
                self._remove(self._holder)  # this process was stopped meanwhile, and others have held the lock
                continue
            holder = _read(self._path)
            if holder is None:  # released or taken over in between
                continue
            if not _is_stale(self._path, holder):
                raise UserError(_locked_message(self._path, holder))
            self._remove(holder)

    def _create(self) -> bool:
        # The complete file is linked to the name: nobody reads an empty lock, and of two processes one fails.
        scratch = atomic.scratch_path(self._path)
        try:
            with open(scratch, "w") as file:
                file.write(atomic.to_json(self._holder))
                file.flush()
                os.fsync(file.fileno())  # or the lock would be empty after a power failure
            return _link(scratch, self._path)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()

    def _remove(self, holder: dict[str, Any]) -> None:
        """Removes the lock file if it is this holder's."""
        aside = atomic.scratch_path(self._path)
        try:
            os.rename(self._path, aside)  # of two processes one fails
        except FileNotFoundError:
            return
        if _read(aside) != holder:
            # Another process has just taken over: put its lock back, unless a third one holds it by now.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(aside, self._path)
        aside.unlink(missing_ok=True)

    def _other(self) -> dict[str, Any] | None:
        """Returns the process that holds the lock instead of this one, or has held it meanwhile; None if none has."""
        holder = _read(self._path)
        if holder and holder != self._holder:
            return holder
        last = _read(self._last)
        return last if last and last != self._before else None

    def check(self) -> None:
        """Checks that this process still holds the lock.

        Raises:
            UserError: another process has taken it over; `on_lost` has been called.
        """
        other = self._other()
        if other is None:
            return
        text = (
            f"{self._path.parent} has been taken over by process {other.get('process')} on {other.get('host')}: "
            "this process had no heartbeat, or its lock was removed"
        )
        with self._notifying:
            if not self._is_lost:
                self._is_lost = True
                with contextlib.suppress(OSError):
                    atomic.remove_unfinished()
                if self._on_lost is not None:
                    self._on_lost(text)
        raise UserError(f"{text}\n  use another --workdir, or wait for that process")

    def _watch(self) -> None:
        heartbeat = time.monotonic()
        while not self._released.wait(CHECK_INTERVAL):
            try:
                self.check()
            except UserError:
                return
            with contextlib.suppress(OSError):  # the disk may be away for a moment; the next check tries again
                if _read(self._path) is None:
                    self._create()
                elif time.monotonic() - heartbeat > HEARTBEAT_INTERVAL:
                    os.utime(self._path)
                    heartbeat = time.monotonic()

    def release(self) -> None:
        """Releases the lock; further calls do nothing."""
        self._released.set()
        atomic.remove_guard(self.check)
        if threading.current_thread() is not self._thread and not self._is_lost:
            self._thread.join(CHECK_INTERVAL)  # or a last check could create the file again
        with contextlib.suppress(OSError):
            if _read(self._path) == self._holder:
                os.replace(self._path, self._last)
                if _read(self._last) != self._holder:  # taken over at this moment
                    os.link(self._last, self._path)
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


def _not_acquired(path: Path, error: OSError | RuntimeError) -> UserError:
    if isinstance(error, RuntimeError):  # of Thread.start
        return no_thread()
    return UserError(
        f"{path} cannot be written: {error.strerror}\n"
        "  free disk space, change its permissions, or use another --workdir"
    )


def _link(source: Path, target: Path) -> bool:
    """Gives a file a second name; returns whether that name was free."""
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):  # FileNotFoundError: the process that was first has removed it
        return False
    except OSError:  # a file system without hard links
        try:
            with open(target, "xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            return False
    return True


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


def _is_on_local_disk(path: Path) -> bool:
    """Returns whether the file system of a path can be mounted by only one running system; False if unknown."""
    import psutil

    real = Path(os.path.realpath(path))
    try:
        mounted = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    except (OSError, psutil.Error):
        return False
    return next((mounted[parent] in LOCAL_FILE_SYSTEMS for parent in (real, *real.parents) if parent in mounted), False)


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
    return (
        f"{path.parent} is locked by {process if holder else f'a process that {NAME} does not name'}\n  {advice}\n"
        f"  (if there is no such process, remove {path})"
    )


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
    boots = (holder.get("boot"), system["boot"])
    rebooted = holder.get("host") == system["host"] and all(boots) and boots[0] != boots[1]
    if rebooted and _is_on_local_disk(path):
        return True
    try:
        return time.time() - path.stat().st_mtime > STALE_AFTER
    except FileNotFoundError:
        return False
