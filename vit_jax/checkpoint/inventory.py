"""What the bytes of a checkpoint prove: a list of its files with sizes and digests, and the check of files against it.

Orbax and TensorStore raise many types, for damaged files as well as for a machine without memory, file descriptors or
permission. Which of the two it was is decided here, by reading the files.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vit_jax import atomic
from vit_jax.checkpoint import integrity
from vit_jax.checkpoint.integrity import CorruptCheckpoint
from vit_jax.errors import UserError, one_line

FILES = "files.json"
METADATA = "_CHECKPOINT_METADATA"  # Orbax's name of the file that has the sealed content
TREE, MANIFEST = "state/_METADATA", "state/manifest.ocdbt"
# What TensorStore says about stored bytes that are wrong: both must be in the message.
_STORED = re.compile(r"OCDBT|zarr|local file")
_WRONG = re.compile(
    r"\b(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND)\b|Error (decoding|parsing)|[Dd]ata corruption|_decompress|not exist"
)


class Unreadable(UserError):
    """A checkpoint cannot be read, and its files do not show why: the cause is the machine, not the checkpoint."""

    def __init__(self, path: Path, error: BaseException | str):
        """Names the path and the cause, which is that of the innermost exception."""
        cause = error if isinstance(error, str) else integrity.root_cause(error)
        super().__init__(
            f"{path} cannot be read: {cause}\n"
            "  its files show no damage and nothing was moved; fix the cause and run the same command again"
        )


def write(path: Path) -> None:
    """Writes files.json into a complete checkpoint: the size and SHA-256 of each file, sealed."""
    files = {_name(path, file): _entry(file) for file in _files(path)}
    atomic.write_json(path / FILES, integrity.seal({"files": files}))


def read_content(path: Path) -> dict[str, Any]:
    """Returns the sealed JSON object of a checkpoint, read without Orbax.

    Raises:
        CorruptCheckpoint: it is missing, is no JSON, or changed since it was written.
        Unreadable: it cannot be read for another reason.
    """
    try:
        content = json.loads((path / METADATA).read_bytes())["custom_metadata"]
    except (ValueError, KeyError, TypeError, RecursionError, FileNotFoundError, IsADirectoryError) as error:
        if not path.is_dir():
            raise Unreadable(path, error) from error
        reason = f"{METADATA} is missing" if isinstance(error, OSError) else f"{METADATA}: {one_line(error)}"
        raise CorruptCheckpoint(f"{path} is corrupt: its metadata cannot be read ({reason})") from error
    except (OSError, MemoryError) as error:
        raise Unreadable(path, error) from error
    if not integrity.is_sealed(content):
        raise CorruptCheckpoint(f"{path} is corrupt: its metadata changed since it was written")
    return content


def verified(path: Path, written: dict[str, str], read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the arrays that `read` returns, compared with the digests that were written.

    Raises:
        CorruptCheckpoint: the files show that it is corrupt.
        Unreadable: they do not, but reading fails.
    """
    try:
        arrays = read()
        found = integrity.digests(arrays)
    except Exception as error:  # Orbax and TensorStore raise many types; the files show which of them is damage
        raise explain(path, written, error) from error
    integrity.compare_digests(path, written, found)
    return arrays


def explain(path: Path, names: Iterable[str], error: Exception) -> CorruptCheckpoint | Unreadable:
    """Returns what an error while the arrays of a checkpoint were read must be reported as.

    Args:
        path: of the checkpoint, whose metadata is intact.
        names: of its arrays.
        error: raised by Orbax, TensorStore, JAX or the operating system.
    """
    try:
        found = damage(path)
        if found is None and not (path / FILES).exists():  # written before there was files.json
            found = _malformed(path, names)
            if found is None and any(_STORED.search(text) and _WRONG.search(text) for text in _texts(error)):
                found = integrity.root_cause(error)
    except (OSError, MemoryError) as own:
        return Unreadable(path, own)
    if found is None:
        return Unreadable(path, error)
    return CorruptCheckpoint(f"{path} is corrupt: it cannot be read ({found})")


def damage(path: Path) -> str | None:
    """Returns how the files of a checkpoint differ from files.json: 'state/_METADATA is missing'; None: not at all.

    None also without files.json, as in older checkpoints; all files are read in either case.

    Raises:
        OSError: a file cannot be read.
    """
    found = {_name(path, file): file for file in _files(path)}
    entries = {name: _entry(file) for name, file in found.items()}
    try:
        written = json.loads((path / FILES).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        return f"{FILES}: {one_line(error)}"
    if not integrity.is_sealed(written):
        return f"{FILES} changed since it was written"
    for name, entry in written["files"].items():
        if name not in entries:
            return f"{name} is missing"
        if entry != entries[name]:
            size, before = entries[name]["size"], entry["size"]
            return f"{name} changed" if size == before else f"{name} has {size:,} bytes, not {before:,}"
    return None


def check_sizes(path: Path) -> None:
    """Raises CorruptCheckpoint unless every file of files.json is there with its size; their content is not read."""
    written = json.loads((path / FILES).read_bytes())
    if not integrity.is_sealed(written):
        raise CorruptCheckpoint(f"{path} is corrupt: {FILES} differs from what was written")
    for name, entry in written["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != entry["size"]:
            raise CorruptCheckpoint(f"{path} is corrupt: {name} is missing or has another size")


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint without files.json; unlike `rglob`, fails for a directory that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    walked = os.walk(path, onerror=fail)
    return sorted(Path(root, name) for root, _, names in walked for name in names if Path(root, name) != path / FILES)


def _name(path: Path, file: Path) -> str:
    return file.relative_to(path).as_posix()


def _entry(file: Path) -> dict[str, Any]:
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"size": os.fstat(opened.fileno()).st_size, "sha256": digest}


def _malformed(path: Path, names: Iterable[str]) -> str | None:
    """What is wrong with the files that Orbax needs to find the arrays; None if they are as they must be."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        tree = json.loads((path / TREE).read_bytes())
        kinds = {
            "/".join(str(part["key"]) for part in one["key_metadata"]): one["value_metadata"]["value_type"]
            for one in tree["tree_metadata"].values()
        }
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{TREE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{TREE}: {one_line(error)}"
    if not all(kinds.get(name) in ("np.ndarray", "jax.Array") for name in names) or tree.get("use_ocdbt") is not True:
        return f"{TREE} does not describe the arrays that were saved"
    return None


def _texts(error: BaseException | None) -> list[str]:
    """The messages of a chain of exceptions."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return texts
