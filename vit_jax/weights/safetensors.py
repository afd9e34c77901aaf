"""The safetensors format: the length of the header (8 bytes), a JSON header, the arrays' bytes without gaps.

Described at https://github.com/huggingface/safetensors. Our own reader needs no further package, supports bfloat16,
and checks every value in the header before an array is read.

`header` raises ValueError with the reason; `vit_jax.weights.files` turns it into a UserError that names the file.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_MAX_HEADER = 2 * 10**6  # bytes, about 15,000 arrays; parsing the 100 MB that the format allows takes gigabytes
_ALIGNMENT = 8

# The reference implementation stores arrays in the reverse of this order, then by name.
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
    """The position and format of one array; `start` in bytes from the beginning of the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def header(file: BinaryIO, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The arrays by name, in the order of the header, and the metadata.

    Raises:
        ValueError: the header is invalid or too long, or the arrays do not cover the rest of the file exactly once.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError(f"truncated or corrupt: a header of {length:,} bytes in a file of {size:,}")
    if length > _MAX_HEADER:
        raise ValueError(f"its header has {length:,} bytes; at most {_MAX_HEADER:,} are allowed")
    try:
        fields = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("its header is not valid UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError("its header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of strings")
    spans = {name: _span(name, field) for name, field in fields.items()}
    _check_cover(spans, size - 8 - length)
    found = {name: Entry(shape, dtype, 8 + length + begin) for name, (shape, dtype, begin, _) in spans.items()}
    if not found:
        raise ValueError("it contains no arrays")
    return found, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"its header contains {twice[:80]!r} twice")
    return fields


def _span(name: str, field: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Shape, dtype, first byte and end of one array; ValueError if they are inconsistent."""
    shown = repr(name[:80])
    if not name or len(name) > 512 or not name.isprintable():
        raise ValueError(f"its header has the invalid name {shown}")
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header has no dtype, shape and data_offsets for {shown}")
    shape, offsets = field["shape"], field["data_offsets"]
    if not isinstance(field["dtype"], str) or field["dtype"] not in DTYPES:
        raise ValueError(f"{shown} has the unsupported dtype {str(field['dtype'])[:40]!r}")
    if not _counts(shape) or len(shape) > 32:
        raise ValueError(f"{shown} claims the shape {str(shape)[:80]}")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown} claims the data_offsets {str(offsets)[:80]}")
    dtype = DTYPES[field["dtype"]]
    expected, actual = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if expected != actual:
        raise ValueError(
            f"{shown} is inconsistent: {shape} of {dtype} takes {expected:,} bytes, but its data_offsets {actual:,}"
        )
    return tuple(shape), dtype, *offsets


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _check_cover(spans: Mapping[str, tuple[tuple[int, ...], np.dtype, int, int]], size: int) -> None:
    """Raises ValueError unless the arrays cover `size` bytes without gaps or overlaps, as the format requires."""
    covered = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != covered:
            raise ValueError(f"{name!r} {'overlaps another array' if begin < covered else 'leaves a gap before it'}")
        covered = end
    if covered > size:
        raise ValueError(f"truncated: its arrays take {covered:,} bytes, but it has {size:,}")
    if covered < size:
        raise ValueError(f"{size - covered:,} of its bytes belong to no array")


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes the arrays in the order of the reference implementation: by dtype, the widest first, then by name.

    Raises:
        ValueError: the format cannot store the dtype of an array, or an array is named "__metadata__".
    """
    ranks = {dtype: rank for rank, dtype in enumerate(_NAMES)}
    for name, array in arrays.items():
        if _native(array.dtype) not in ranks or name == "__metadata__":
            raise ValueError(f"{name} of {array.dtype} cannot be stored as .safetensors")
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
