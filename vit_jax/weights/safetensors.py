"""The safetensors format: eight bytes of length, a JSON header, the arrays' bytes without a gap.

https://github.com/huggingface/safetensors describes it. It is small enough to be read here, so that nothing has to be
installed, bfloat16 works, and every claim of the header is checked before an array is read.

`header` raises ValueError with the reason as a clause that follows the file's name; `vit_jax.weights.files` makes it
the user's message.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_HEADER = 2 * 10**6  # bytes, about 15,000 arrays; the format allows 100 MB, of which Python would make gigabytes
_ALIGNMENT = 8

# In the order in which the reference implementation lays arrays out: last first, then by name.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one array lies in the file, and what it is; `start` in bytes from the file's beginning."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def header(file: BinaryIO, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The arrays by name, in the order of the header, and the metadata.

    Raises:
        ValueError: the header is damaged or too long, or the arrays do not cover the rest of the file, each byte once.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError(f"it is truncated or damaged: a header of {length:,} bytes in a file of {size:,}")
    if length > _HEADER:
        raise ValueError(f"its header has {length:,} bytes; at most {_HEADER:,} are read")
    try:
        fields = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its header is nested without end") from error
    except UnicodeDecodeError as error:
        raise ValueError("its header is no text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError("its header is no JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ does not name texts")
    spans = {name: _span(name, field) for name, field in fields.items()}
    _check_cover(spans, size - 8 - length)
    found = {name: Entry(shape, dtype, 8 + length + begin) for name, (shape, dtype, begin, _) in spans.items()}
    if not found:
        raise ValueError("it holds no arrays")
    return found, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"its header names {twice[:80]!r} twice")
    return fields


def _span(name: str, field: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Shape, dtype, first byte and last of one array; ValueError unless they agree."""
    shown = repr(name[:80])
    if not name or len(name) > 512 or not name.isprintable():
        raise ValueError(f"its header has the name {shown}, which no array has")
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header does not give {shown} a dtype, a shape and data_offsets")
    shape, offsets = field["shape"], field["data_offsets"]
    if not isinstance(field["dtype"], str) or field["dtype"] not in DTYPES:
        raise ValueError(f"{shown} is of {str(field['dtype'])[:40]!r}, which is not read")
    if not _counts(shape) or len(shape) > 32:
        raise ValueError(f"{shown} claims the shape {str(shape)[:80]}")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown} claims the data_offsets {str(offsets)[:80]}")
    dtype = DTYPES[field["dtype"]]
    asked, given = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if asked != given:
        raise ValueError(f"{shown} lies: {shape} of {dtype} takes {asked:,} bytes, and its data_offsets {given:,}")
    return tuple(shape), dtype, *offsets


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _check_cover(spans: Mapping[str, tuple[tuple[int, ...], np.dtype, int, int]], size: int) -> None:
    """Raises ValueError unless the arrays cover `size` bytes without a gap or an overlap, as the format demands."""
    covered = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != covered:
            raise ValueError(f"{name!r} {'overlaps another array' if begin < covered else 'leaves a gap before it'}")
        covered = end
    if covered > size:
        raise ValueError(f"it is truncated: its arrays take {covered:,} bytes, and {size:,} are there")
    if covered < size:
        raise ValueError(f"it has {size - covered:,} bytes that belong to no array")


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes the arrays as the reference implementation lays them out: by dtype, the widest first, then by name.

    Raises:
        ValueError: an array has a dtype that the format has no name for, or the name of the metadata.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(_NAMES)}
    for name, array in arrays.items():
        if _native(array.dtype) not in ranks or name == "__metadata__":
            raise ValueError(f"{name} of {array.dtype} cannot be written as .safetensors")
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(arrays, key=lambda name: (-ranks[_native(arrays[name].dtype)], name.encode()))
    end = 0
    for name in order:
        array = arrays[name]
        begin, end = end, end + math.prod(array.shape) * array.dtype.itemsize
        fields[name] = {"dtype": _NAMES[_native(array.dtype)], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        array = np.asarray(arrays[name])
        file.write(np.ascontiguousarray(array.astype(_native(array.dtype), copy=False)).reshape(-1).view(np.uint8))


def _native(dtype: Any) -> np.dtype:
    return np.dtype(dtype).newbyteorder("=")
