"""Atomic file writes: after a crash, a file has either its old content or its complete new content."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


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
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a binary file atomically."""
    with replace(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def sync(path: Path) -> None:
    """Makes a file, or the entries of a directory, survive a power failure (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
