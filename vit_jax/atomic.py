"""Atomic file writes: after a crash, a file has either its old content or its complete new content. Strict JSON.

A directory may have a guard, which is called before a file below it changes its name: it raises, or ends the process,
if another process writes to the directory by now.
"""

import contextlib
import csv
import itertools
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_SCRATCH = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
_guards: list[tuple[Path, Callable[[], None]]] = []  # directories, and what is called before they change
_unfinished: set[Path] = set()  # files and directories that are being written


@contextlib.contextmanager
def replace(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """A context manager that opens a temporary file, which replaces `path` when the block ends.

    If the block raises, `path` stays as it was and the temporary file is removed.

    Args:
        path: the file to write; its directory must exist.
        mode: "wb" or "w".
        options: further arguments of `open`, such as `newline`.

    Raises:
        OSError: the file cannot be written.
    """
    scratch = scratch_path(path)
    try:
        with unfinished(scratch):
            with open(scratch, mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check(path)
            os.replace(scratch, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        if isinstance(error, OSError) and error.filename is not None:
            error.filename = str(path)  # the user does not know the temporary file
        raise
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a binary file atomically."""
    with replace(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    write_bytes(path, (to_json(content, indent=2) + "\n").encode())


def to_json(content: Any, **options: Any) -> str:
    """Returns content as JSON in ASCII, with null in place of a NaN or an infinity, which JSON does not have.

    Args:
        content: JSON values.
        options: further arguments of `json.dumps`, such as `indent`.
    """
    return json.dumps(_finite(content), allow_nan=False, **options)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def sync_tree(directory: Path) -> None:
    """Makes all files and directories in a directory, and the directory itself, survive a power failure."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def make_directory(path: Path) -> None:
    """Makes a directory, with its parents, if there is none; the new entries survive a power failure."""
    missing = list(itertools.takewhile(is_missing, (path, *path.parents)))
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def is_missing(path: Path) -> bool:
    """Returns whether nothing has this name; a symbolic link to nothing counts as something."""
    return not os.path.lexists(path)


def sync_and_rename(source: Path, target: Path) -> None:
    """Renames a file, or a directory with all that is in it, once it is on the disk.

    Raises:
        OSError: it cannot be written or renamed.
    """
    if source.is_dir():
        sync_tree(source)
    else:
        sync(source)
    rename(source, target)


def rename(source: Path, target: Path) -> None:
    """Renames a file or directory whose content is on the disk; the new name survives a power failure.

    Raises:
        OSError: it cannot be renamed.
    """
    check(target)
    os.replace(source, target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Removes a file if it exists; it does not come back after a power failure."""
    check(path)
    path.unlink(missing_ok=True)
    sync(path.parent)


def scratch_path(path: Path) -> Path:
    """Returns a name beside `path` that no other process uses, for a file that will be renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """A context manager in which a file or directory is written that will be renamed when it is complete."""
    _unfinished.add(path)
    try:
        check(path)
        yield
    finally:
        _unfinished.discard(path)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file, completely or not at all."""
    with replace(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def remove_unfinished() -> None:
    """Removes the files and directories that this process is writing, because it must not write any more.

    Returns when they have been gone for half a second: threads of libraries may make them again.
    """
    directories, absent, deadline = list(_unfinished), 0, time.monotonic() + 5
    while directories and absent < 10 and time.monotonic() < deadline:
        found = [
            path
            for directory in directories
            for path in directory.parent.iterdir()
            if path.name.startswith(directory.name)
        ]
        for path in found:
            path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        absent = 0 if found else absent + 1
        time.sleep(0.05)


def remove_scratch(directory: Path) -> None:
    """Removes what processes that were killed or stopped have left of files that they were writing to a directory.

    A process that wakes up afterwards cannot rename them any more.
    """
    for path in directory.iterdir():
        if _SCRATCH.fullmatch(path.name):
            path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Removes a directory as far as possible; of a link to one, only the link."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def add_guard(directory: Path, guard: Callable[[], None]) -> None:
    """Makes `guard` be called before a file below a directory is replaced, renamed or removed by this process."""
    _guards.append((Path(os.path.realpath(directory)), guard))


def remove_guard(guard: Callable[[], None]) -> None:
    """Undoes `add_guard`."""
    _guards[:] = [entry for entry in _guards if entry[1] != guard]


def check(path: Path) -> None:
    """Calls the guards of the directories that `path` is in; they raise if it must not be changed."""
    if _guards:
        real = Path(os.path.realpath(path.parent))
        for directory, guard in list(_guards):
            if real.is_relative_to(directory):
                guard()


def sync(path: Path) -> None:
    """Makes a file, or the entries of a directory, survive a power failure (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
