"""The files below a directory: links are followed, and everything that is left out is counted and named."""

import collections
import os
from collections.abc import Iterator
from pathlib import Path

from vit_jax.errors import few

# Files and folders that systems, file managers and archivers leave in directories of images.
_SYSTEM = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle", "$recycle.bin"),
    *("system volume information", "lost+found", "__pycache__"),
}


class LeftOut:
    """What is not among the files, by the reason; paths are relative to `root`."""

    def __init__(self, root: Path):
        """Nothing yet."""
        self._root = root
        self._names: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, reason: str, path: str | os.PathLike) -> None:
        """Adds a file or folder, with the reason, such as 'unreadable folder'."""
        self._names[reason].append(printable(os.path.relpath(path, self._root)))

    def describe(self) -> str | None:
        """Returns 'left out: 2 hidden (.a, .b), 1 broken link (cat/c.png)'; None if nothing was left out."""
        parts = [f"{len(names):,} {reason} ({few(sorted(names))})" for reason, names in self._names.items()]
        return f"left out: {', '.join(parts)}" if parts else None


def printable(text: str) -> str:
    """Returns text in one line of valid characters: control characters, and bytes that are no UTF-8, are escaped."""
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    is_byte = "\udc80" <= character <= "\udcff"  # as Python represents a byte that is no UTF-8 in a file name
    return f"\\x{ord(character) - 0xDC00:02x}" if is_byte else ascii(character)[1:-1]


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is hidden, or belongs to the system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def entries(directory: Path, left_out: LeftOut) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """Returns the folders and the files in a directory, sorted by name, links included.

    Hidden ones, broken links, and what is neither a folder nor a file (sockets, pipes, devices) are left out.
    """
    folders, files = [], []
    try:
        with os.scandir(directory) as found:
            listed = sorted(found, key=lambda entry: entry.name)
    except OSError:
        left_out.add("unreadable folder", directory)
        return [], []
    for entry in listed:
        if is_hidden(entry.name):
            left_out.add("hidden", entry.path)
            continue
        try:
            kind = folders if entry.is_dir() else files if entry.is_file() else None
        except OSError:  # a loop of links, or a link through an unreadable folder
            kind = None
        if kind is not None:
            kind.append(entry)
        else:
            left_out.add("broken link" if entry.is_symlink() else "neither file nor folder", entry.path)
    return folders, files


def files_below(directory: Path, left_out: LeftOut, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the paths of all files below a directory, in no particular order.

    Links to folders are followed, but each folder is read once: a link to a folder that is read anyway, or that
    contains the link, is left out.

    Args:
        directory: where to start.
        left_out: what is left out is added to it.
        above: real paths of further folders that must not be read: those that contain `directory`.
    """
    folders, links, read = [str(directory)], [], {*above}
    while folders or links:
        path = folders.pop() if folders else links.pop()  # links last: a folder keeps the path without links
        real = os.path.realpath(path)
        if real in read:
            left_out.add("link to a folder that is read anyway", path)
            continue
        read.add(real)
        inner, files = entries(Path(path), left_out)
        folders += [entry.path for entry in inner if not entry.is_symlink()]
        links += [entry.path for entry in inner if entry.is_symlink()]
        yield from (entry.path for entry in files)


def parents_of(directory: Path, root: Path) -> tuple[str, ...]:
    """Returns the real paths of the folders from `root` to the one that contains `directory`."""
    inside = directory.relative_to(root).parts[:-1]
    return tuple(os.path.realpath(root.joinpath(*inside[:count])) for count in range(len(inside) + 1))
