"""Safe reading of files of weights (.npz, .safetensors, torch.save, Flax's .msgpack); atomic writing of the first two.

`open_file` reads and checks names, shapes and dtypes only; an array is read when it is looked up. Code in a file is
never executed, and rejecting an invalid file needs little memory, whatever sizes it claims.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import psutil

from vit_jax import atomic, paths
from vit_jax.errors import UserError, few
from vit_jax.weights import flax_files, npz, pickles, safetensors, torch_files, torch_refusal

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"  # of Hugging Face: how images are resized and normalized
PROCESSOR = "processor_config.json"  # the same below the key image_processor, where there are texts too
OPEN_CLIP = "open_clip_config.json"
SUFFIXES = (".safetensors", ".npz")
ALL_SUFFIXES = (*SUFFIXES, *torch_refusal.SUFFIXES, ".msgpack")
_USUAL = (  # file names of the Hugging Face hub
    *(SAFETENSORS, INDEX),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin", "flax_model.msgpack"),
)
_UNSUPPORTED = {
    **dict.fromkeys((".h5", ".hdf5", ".keras"), "HDF5"),
    ".npy": "a single array",
    ".onnx": "ONNX",
    ".gguf": "GGUF",
    ".tflite": "TensorFlow Lite",
}
_FIRST_BYTES = {
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a single array",
    b"GGUF": "GGUF",
    b"\x1f\x8b": "gzip-compressed",
}
_NO_WEIGHTS = r"optimizer|scheduler|scaler|training_args|rng_state"  # other files of trainers
_MAX_JSON = 5 * 10**6  # bytes of a config.json or an index
_ALIGNMENT = 64  # bytes; JAX on CPU uses arrays with this alignment without a copy


@dataclasses.dataclass(frozen=True)
class Stored:
    """The content of a file.

    Attributes:
        path: the file, or the index of a sharded file.
        format: 'npz', 'safetensors', 'torch' or 'flax'.
        arrays: by name; each look-up reads the array from the file and raises UserError if that fails.
        shapes, dtypes: of the arrays, by name, in the machine's byte order.
        config: the config.json in the same directory, or None.
        metadata: strings by name in the header of a .safetensors file.
        prefix: what stands before the names in the file, if `shapes` has those of one of its models.
    """

    path: Path
    format: str
    arrays: Mapping  # from names to arrays; not annotated, since a runtime type checker would read an array
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    config: dict[str, Any] | None
    metadata: dict[str, str]
    prefix: str = ""


Entry = npz.Entry | safetensors.Entry | torch_files.Entry


class _Arrays(Mapping):
    """The arrays of one or several files by name, each read when it is looked up."""

    def __init__(self, entries: Mapping[str, tuple[Path, Entry]]):
        self._entries = entries

    def __getitem__(self, name: str) -> np.ndarray:
        path, entry = self._entries[name]
        with user_errors(path, f"{name!r}: "):
            free = psutil.virtual_memory().available
            if entry.nbytes > free:
                raise ValueError(f"needs {entry.nbytes:,} bytes of memory, but only {free:,} are free")
            out = _aligned(entry.nbytes)
            with path.open("rb", buffering=0) as file:
                return _read(file, entry, out)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _read(file: BinaryIO, entry: Entry, out: np.ndarray) -> np.ndarray:
    if isinstance(entry, npz.Entry):
        array = npz.read(file, entry, out)
    elif isinstance(entry, torch_files.Entry):
        array = torch_files.read(file, entry, out)
    else:
        file.seek(entry.start)
        npz.fill(file, out)
        array = out.view(entry.dtype).reshape(entry.shape)
    if array.dtype == np.bool_ and (out > 1).any():
        raise ValueError("boolean values other than 0 and 1")
    return array


def _aligned(nbytes: int) -> np.ndarray:
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + nbytes]


def open_file(path: str | os.PathLike[str]) -> Stored:
    """The content of a file, or of the weights file in a directory, after checking its headers against the file.

    A directory must contain a file with a name that the Hugging Face hub uses, such as model.safetensors or
    pytorch_model.bin, or a single file of weights, also in several shards; .safetensors and .npz have precedence. The
    format is determined by the content of the file, not by its name.

    Raises:
        UserError: the file is missing, corrupt, inconsistent, or of an unsupported format.
    """
    path = paths.expand(path, "weights")
    with user_errors(path):
        path = find(path) if path.is_dir() else path
    with user_errors(path):
        if path.name.endswith(".index.json"):
            return _open_parts(path, _index(path))
        shards = _shards(path)
        if shards:
            return _open_parts(path, dict.fromkeys(shards))
        kind, entries, metadata = _open_one(path)
        return _stored(path, kind, {name: (path, entry) for name, entry in entries.items()}, metadata)


def _stored(path: Path, kind: str, entries: Mapping, metadata: dict[str, str]) -> Stored:
    return Stored(
        path=path,
        format=kind,
        arrays=_Arrays(entries),
        shapes={name: entry.shape for name, (_, entry) in entries.items()},
        dtypes={name: entry.dtype for name, (_, entry) in entries.items()},
        config=read_json(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else None,
        metadata=metadata,
    )


def _open_one(path: Path) -> tuple[str, dict[str, Any], dict[str, str]]:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
        raise ValueError("not a regular file")
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        kind = _kind(path, file.read(64), file)
        if kind == "safetensors":
            return kind, *safetensors.header(file, size)
        if kind == "zip":
            members = npz.members(file, size)
            if not torch_files.is_torch(members):
                return "npz", npz.entries(file, members), {}
            return "torch", torch_files.entries(file, members, size), {}
        if kind == "torch":
            return kind, torch_files.legacy_entries(file, size), {}
        return kind, flax_files.entries(file, size), {}


def _index(path: Path) -> dict[str, set[str]]:
    """The shards that a model.safetensors.index.json names, each with the names of its arrays."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(part, str) for part in index.values()):
        raise ValueError("no weight_map from arrays to files")
    shards = {}
    for name, part in sorted(index.items()):
        if Path(part).name != part or part in ("", ".", "..") or "\\" in part:
            raise ValueError(f"the shard {part[:80]!r} is not in its directory")
        shards.setdefault(part, set()).add(name)
    return shards


def _shards(path: Path) -> list[str]:
    """The names of all shards if the file is one of several, by its name; else none."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin|pth|pt)", path.name)
    count = int(match[3]) if match else 1
    return [f"{match[1]}-{i + 1:05}-of-{match[3]}.{match[4]}" for i in range(count)] if 1 < count < 10_000 else []


def _open_parts(path: Path, shards: Mapping[str, set[str] | None]) -> Stored:
    """A file in several shards, which must contain exactly the arrays that are listed, if any are."""
    missing = [part for part in sorted(shards) if not (path.parent / part).exists()]
    if missing:
        raise UserError(
            f"{path}: its shard {few(missing)} is missing: there is no such file in its directory\n"
            "  the model is in all of its shards together: download the missing ones too"
        )
    entries, metadata, kinds = {}, {}, set()
    for part, listed in sorted(shards.items()):
        with user_errors(path.parent / part):
            kind, found, more = _open_one(path.parent / part)
        kinds.add(kind)
        if len(kinds) > 1:
            raise ValueError(f"the shard {part} is of another format than the others")
        wrong = set(found) & set(entries) if listed is None else set(found) ^ listed
        if wrong:
            raise ValueError(f"it disagrees with its shard {part} about {min(wrong)[:80]!r}")
        entries |= {name: (path.parent / part, entry) for name, entry in found.items()}
        metadata |= more
    return _stored(path, kinds.pop(), entries, metadata)


def find(directory: Path) -> Path:
    """The weights file in a directory.

    Raises:
        UserError: there is none, or there are several and none has a name that the Hugging Face hub uses.
    """
    names = sorted(entry.name for entry in directory.iterdir())
    found = candidates(names)
    if len(found) == 1:
        return directory / found[0]
    if found:
        raise UserError(f"{directory} has several weights files: {few(map(_short, found), 4)}\n  give one of them")
    within = itertools.chain(directory.glob("*/*"), directory.glob("*/*/*"))
    below = [path for path in itertools.islice(within, 10_000) if path.suffix in (*SUFFIXES, ".pth", ".msgpack")]
    below = sorted(str(path.relative_to(directory)) for path in below)
    contents = few(map(_short, names), 4) or "nothing"
    way_out = f"give one of: {few(below, 4)}" if below else f"it contains: {contents}"
    raise UserError(f"{directory} has no file of weights (.safetensors, .npz, .pth, .bin, .msgpack)\n  {way_out}")


def candidates(names: Iterable[str]) -> list[str]:
    """The files of a directory, given by name, that may contain its model: of several shards one, or their index.

    Files of the first format in `SUFFIXES`, PyTorch, Flax, others hide those of the later ones.
    """
    names = sorted(name for name in names if not re.match(_NO_WEIGHTS, name))
    for endings in (SUFFIXES, torch_refusal.SUFFIXES, (".msgpack",), tuple(_UNSUPPORTED)):
        usual = [name for name in _USUAL if name in names and name.removesuffix(".index.json").endswith(endings)]
        found = {tuple(_shards(Path(name))) or name: name for name in reversed(names) if name.lower().endswith(endings)}
        if found or usual:
            return usual[:1] or sorted(found.values())
    return []


def _short(name: str) -> str:
    return name[:80]


def holds_weights(directory: Path) -> bool:
    """Whether a directory has a file of weights, of a format that is read or one that is refused by name."""
    endings = (*ALL_SUFFIXES, *_UNSUPPORTED, ".index.json")
    return any(entry.name.lower().endswith(endings) for entry in directory.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read, is too large, or contains something else.
    """
    with user_errors(path):
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes; at most {_MAX_JSON:,} are read")
        try:
            found = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises UserError if a floating-point array contains NaN or infinite values; one pass over the array."""
    if array.dtype == ml_dtypes.bfloat16:
        # All exponent bits are set; much faster than ml_dtypes' isfinite.
        wrong = int(np.count_nonzero((array.view(np.uint16) & 0x7F80) == 0x7F80))
    elif array.dtype.kind not in "fcV":
        return
    else:
        wide = np.complex128 if array.dtype.kind == "c" else np.float64 if array.dtype.itemsize > 4 else np.float32
        with np.errstate(over="ignore", invalid="ignore"):
            # A non-finite value makes the sum non-finite; but so does an overflow of the sum.
            if np.isfinite(np.sum(array, dtype=wide)):
                return
            wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
    if wrong:
        raise UserError(
            f"{name}: {wrong:,} of its {array.size:,} values are NaN or infinite\n"
            "  use a file that was saved before the values became non-finite"
        )


# --- rejected files ------------------------------------------------------------------------------------------------


def _kind(path: Path, head: bytes, file: BinaryIO) -> str:
    """'zip', 'safetensors', 'torch' (its old format) or 'flax'; UserError or ValueError for other formats.

    From the first bytes of the file; 'flax' has none, and is recognized by the suffix.
    """
    if not head:
        raise ValueError("the file is empty")
    if head.startswith(b"PK"):
        return "zip"
    if head[8:9] == b"{" and path.suffix.lower() != ".msgpack":
        return "safetensors"
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("a git-lfs pointer instead of the file: run git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise ValueError("a web page instead of the file: use the download link of that page")
    for start, kind in _FIRST_BYTES.items():
        if head.startswith(start):
            raise _other(path, kind)
    if path.suffix.lower() == ".msgpack":
        return "flax"
    if re.match(rb"\x80[\x02-\x05]", head) or torch_files.is_pickle(file):
        return "torch"
    check_suffix(path)
    corrupt = ", or is corrupt" if path.suffix.lower() in ALL_SUFFIXES else ""
    is_text = head.isascii() and head.decode().replace("\n", " ").isprintable()
    begins = f": it begins with the text {head.decode().splitlines()[0]!r}" if is_text else ""
    raise ValueError(f"the file is neither .npz nor .safetensors nor of torch.save{corrupt}{begins}")


def check_suffix(path: Path, shown: object = None) -> None:
    """Raises UserError if the suffix is of an unsupported format; `shown` is the name in the message."""
    if path.suffix.lower() in _UNSUPPORTED:
        raise _other(shown or path, _UNSUPPORTED[path.suffix.lower()])


def _other(shown: object, kind: str) -> UserError:
    return UserError(
        f"{shown} is {kind}, which is not supported\n"
        "  supported: .safetensors, .npz, .pth, .bin, .msgpack, run directories\n"
        "  use the .safetensors file of the same model if there is one"
    )


@contextlib.contextmanager
def user_errors(path: Path, where: str = "") -> Iterator[None]:
    """Turns errors about a file into UserErrors that name it."""
    try:
        yield
    except pickles.UnsupportedError as error:
        raise torch_refusal.refusal(path, error, error.names) from error
    except ValueError as error:
        raise UserError(f"{path} cannot be loaded: {where}{error}\n  download or export it again") from error
    except MemoryError as error:
        raise UserError(
            f"{path}: {where}not enough memory to read it\n  free memory, or use a smaller model"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: there is no such file\n  correct the path") from error
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read: {error.strerror or error}\n"
            "  check the disk and the permissions of the file"
        ) from error


# --- writing --------------------------------------------------------------------------------------------------------


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz file atomically, as numpy.savez does; bfloat16 is stored as two untyped bytes ('V2').

    Raises:
        UserError: the disk is full or read-only, or .npz cannot store the dtype of an array.
    """
    _write(Path(path), functools.partial(npz.write, arrays=arrays))


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a .safetensors file atomically, with the layout of the reference implementation.

    Raises:
        UserError: the disk is full or read-only, or the format cannot store the dtype of an array.
    """
    _write(Path(path), functools.partial(safetensors.write, arrays=arrays, metadata=metadata))


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    path = paths.expand(path, "path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replace(path) as file:
            write(file)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}\n  free some disk space, or give another directory"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {error}\n  use another file name") from error
