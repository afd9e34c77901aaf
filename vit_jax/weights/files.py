"""Files of arrays, .npz and .safetensors, read without trust and written whole.

A file is described by `open_file` before anything of size is read: names, shapes and dtypes, all checked against the
file. An array is read when it is looked up. Nothing in a file is ever run, and a file that is refused costs little
memory, whatever it claims.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import psutil

from vit_jax.errors import UserError
from vit_jax.weights import npz, safetensors

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar")
_OTHERS = {".h5": "HDF5", ".hdf5": "HDF5", ".msgpack": "MessagePack", ".npy": "a single array"}
_JSON = 5 * 10**6  # bytes of a config.json or an index that are read
_ALIGNMENT = 64  # bytes; arrays that lie so are taken over by JAX on the CPU without a copy


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        path: the file, or the index of a file in several parts.
        format: 'npz' or 'safetensors'.
        arrays: by name, each read when it is looked up, and anew each time; UserError where that fails.
        shapes, dtypes: of the arrays, in the machine's byte order; known without reading them.
        config: the config.json beside the file, or None.
        metadata: the texts that a .safetensors file carries.
    """

    path: Path
    format: str
    arrays: Mapping  # of names to arrays; said without, as a type checker would read one to see
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    config: dict[str, Any] | None
    metadata: dict[str, str]


class _Arrays(Mapping):
    """The arrays of a file or of several: name -> array, read when it is looked up."""

    def __init__(self, places: Mapping[str, tuple[Path, npz.Entry | safetensors.Entry]]):
        self._places = places

    def __getitem__(self, name: str) -> np.ndarray:
        path, entry = self._places[name]
        with _refusals(path, f"{name!r}: "):
            free = psutil.virtual_memory().available
            if entry.nbytes > free:
                raise ValueError(f"it takes {entry.nbytes:,} bytes of memory, and {free:,} are free")
            out = _aligned(entry.nbytes)
            with path.open("rb", buffering=0) as file:
                return _read(file, entry, out)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _read(file: BinaryIO, entry: npz.Entry | safetensors.Entry, out: np.ndarray) -> np.ndarray:
    if isinstance(entry, npz.Entry):
        array = npz.read(file, entry, out)
    else:
        file.seek(entry.start)
        npz.fill(file, out)
        array = out.view(entry.dtype).reshape(entry.shape)
    if array.dtype == np.bool_ and (out > 1).any():
        raise ValueError("it holds truth values that are neither true nor false")
    return array


def _aligned(nbytes: int) -> np.ndarray:
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + nbytes]


def open_file(path: str | os.PathLike[str]) -> Stored:
    """Describes the arrays of a file, or of the one file that a folder holds, after checking every claim it makes.

    A folder is one as the hub has it: model.safetensors, or model.safetensors.index.json and the parts it names, or
    a single .safetensors or .npz file. The content decides what a file is, whatever its name.

    Raises:
        UserError: there is no such file; it is damaged, lies about itself, is of another kind, or could run code.
    """
    path = Path(path).expanduser()
    with _refusals(path):
        if path.is_dir():
            path = find(path)
        if path.name.endswith(".index.json"):
            return _open_parts(path)
        kind, places, metadata = _open_one(path)
    return _stored(path, kind, {name: (path, entry) for name, entry in places.items()}, metadata)


def _stored(path: Path, kind: str, places: Mapping, metadata: dict[str, str]) -> Stored:
    return Stored(
        path=path,
        format=kind,
        arrays=_Arrays(places),
        shapes={name: entry.shape for name, (_, entry) in places.items()},
        dtypes={name: entry.dtype for name, (_, entry) in places.items()},
        config=read_json(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else None,
        metadata=metadata,
    )


def _open_one(path: Path) -> tuple[str, dict[str, Any], dict[str, str]]:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise ValueError("it is no regular file")
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        kind = _kind(path, file.read(64), size)
        if kind == "npz":
            return kind, npz.entries(file, size), {}
        return kind, *safetensors.header(file, size)


def _open_parts(path: Path) -> Stored:
    """The parts that a model.safetensors.index.json names, which must hold just what it says."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(part, str) for part in index.values()):
        raise ValueError("it has no weight_map from arrays to files")
    places, metadata = {}, {}
    for part in sorted(set(index.values())):
        if Path(part).name != part or part in ("", ".", "..") or "\\" in part:
            raise ValueError(f"it names the part {part[:80]!r}, which is not in its folder")
        with _refusals(path.parent / part):
            kind, found, more = _open_one(path.parent / part)
        if kind != "safetensors":
            raise ValueError(f"its part {part} is no .safetensors file")
        wrong = set(found) ^ {name for name, where in index.items() if where == part}
        if wrong:
            raise ValueError(f"it and its part {part} do not agree about {min(wrong)[:80]!r}")
        places |= {name: (path.parent / part, entry) for name, entry in found.items()}
        metadata |= more
    return _stored(path, "safetensors", places, metadata)


def find(folder: Path) -> Path:
    """The one file of weights in a folder.

    Raises:
        UserError: there is none, or there are several and none is named as the hub names it.
    """
    for name in (SAFETENSORS, INDEX):
        if (folder / name).is_file():
            return folder / name
    names = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in names if name.endswith((".safetensors", ".npz"))]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise UserError(f"{folder} holds several files of weights: {_few(found)}.\nName one of them.")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise _pickled(folder / pickles[0])
    raise UserError(f"{folder} holds no .safetensors and no .npz file.\nIt holds {_few(names) or 'nothing'}.")


def _few(names: list[str]) -> str:
    return ", ".join(name[:80] for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read, is too large, or holds something else.
    """
    with _refusals(path):
        if path.stat().st_size > _JSON:
            raise ValueError(f"it has {path.stat().st_size:,} bytes; at most {_JSON:,} are read")
        try:
            found = json.loads(path.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is no JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        return found


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises UserError if a floating-point array holds NaN or infinite values; costs one pass over it."""
    if array.dtype == ml_dtypes.bfloat16:
        # All exponent bits set; far faster than ml_dtypes' own arithmetic.
        wrong = int(np.count_nonzero((array.view(np.uint16) & 0x7F80) == 0x7F80))
    elif array.dtype.kind not in "fcV":
        return
    else:
        wide = np.complex128 if array.dtype.kind == "c" else np.float64 if array.dtype.itemsize > 4 else np.float32
        with np.errstate(over="ignore", invalid="ignore"):
            # What is not finite makes the sum not finite; the reverse holds only where the sum does not overflow.
            if np.isfinite(np.sum(array, dtype=wide)):
                return
            wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
    if wrong:
        raise UserError(f"{name}: {wrong:,} of its {array.size:,} values are NaN or infinite; the file is refused.")


# --- what is refused ------------------------------------------------------------------------------------------------


def _kind(path: Path, head: bytes, size: int) -> str:
    """'npz' or 'safetensors', by the file's first bytes; UserError or ValueError for anything else."""
    suffix = path.suffix.lower()
    if head.startswith(b"PK"):
        return "npz"
    if head[8:9] == b"{":
        return "safetensors"
    if (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or suffix in _PICKLES:
        raise _pickled(path)
    if not size:
        raise ValueError("it is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("it is git-lfs's note of where the file is, not the file: run git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise ValueError("it is a web page, not the file: use the page's download link")
    if head.startswith(b"\x89HDF"):
        raise _other(path, "HDF5")
    if head.startswith(b"\x93NUMPY"):
        raise _other(path, "a single array")
    check_suffix(path)
    damaged = ", or is damaged" if suffix in (".npz", ".safetensors") else ""
    raise ValueError(f"it is neither .npz nor .safetensors{damaged}")


def check_suffix(path: Path, shown: object = None) -> None:
    """Raises UserError if a file of such a name is one that is never read; `shown` is what the user called it."""
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise _pickled(path, shown)
    if suffix in _OTHERS:
        raise _other(shown or path, _OTHERS[suffix])


def _other(shown: object, kind: str) -> UserError:
    return UserError(f"{shown} is {kind}, which is not read.\nRead are .safetensors, .npz and our own checkpoints.")


def _pickled(path: Path, shown: object = None) -> UserError:
    name = path.name if re.fullmatch(r"[\w.-]+", path.name) else f"FILE{path.suffix}"
    return UserError(
        f"{shown or path} is a pickle (as torch.save writes), which can run code as it is opened: refused.\n"
        "Take the model's .safetensors file; or, where PyTorch is and you trust the file, convert it:\n"
        'python -c "import torch, safetensors.torch as s; '
        f"d = torch.load('{name}', map_location='cpu', weights_only=True); "
        "d = d.get('state_dict', d.get('model', d)); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in d.items()}}, '{Path(name).stem}.safetensors')\""
    )


@contextlib.contextmanager
def _refusals(path: Path, where: str = "") -> Iterator[None]:
    """Makes what goes wrong with a file, or what is wrong with it, the user's message."""
    try:
        yield
    except npz.PickledError as error:
        raise _pickled(path) from error
    except ValueError as error:
        raise UserError(f"{path} is refused: {where}{error}.") from error
    except MemoryError as error:
        raise UserError(f"{path}: {where}there is not enough memory to read it.") from error
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: there is no such file.") from error
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


# --- writing --------------------------------------------------------------------------------------------------------


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz as numpy.savez does, whole or not at all; bfloat16 goes as two bytes without a meaning ('V2').

    Raises:
        UserError: the folder cannot be written or is full, or an array is of a kind that .npz cannot hold.
    """
    _write(Path(path), functools.partial(npz.write, arrays=arrays))


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a .safetensors file as the reference implementation lays it out, whole or not at all.

    Raises:
        UserError: the folder cannot be written or is full, or an array is of a kind that the format cannot hold.
    """
    _write(Path(path), functools.partial(safetensors.write, arrays=arrays, metadata=metadata))


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    path = path.expanduser()
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}.\nFree or unlock its folder, or give another one."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {error}.") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
