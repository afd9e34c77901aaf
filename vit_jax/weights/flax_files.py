"""The format of flax.serialization (flax_model.msgpack): nested maps in MessagePack whose leaves are arrays.

Described at https://github.com/msgpack/msgpack/blob/master/spec.md; an array is an extension of type 1 that contains
its shape, dtype and bytes. flax.serialization.msgpack_restore reads a whole file into memory, and makes lists of any
length that the file claims; `entries` reads names and shapes only.

Raises ValueError with the reason; `vit_jax.weights.files` turns it into a UserError that names the file.
"""

import math
import re
from typing import BinaryIO

from vit_jax.weights import npz, safetensors
from vit_jax.weights.torch_files import Entry

_ARRAY = 1  # the type of the extension
_MAX_DEPTH, _MAX_NAMES, _MAX_NAME = 64, 50_000, 512
_DTYPES = {dtype.name: dtype for dtype in safetensors.DTYPES.values()}

# The first byte of a value: what it is, and how many bytes its length has; or how many bytes a scalar has.
_SIZED = {0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4), 0xC4: ("bytes", 1), 0xC5: ("bytes", 2)}
_SIZED |= {0xC6: ("bytes", 4), 0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}
_SIZED |= {0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4)}
_SCALARS = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_SCALARS |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}

# Hugging Face's Flax models have the names of its PyTorch models but for the last part, and other axes.
_HUGGING_FACE = r"(?:^|/)(?:encoder/layer/\d+/(?:attention|layernorm_before|norm1)|embeddings/patch_embeddings)/"


def entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The arrays by name, with slashes; with the names and axes of PyTorch for a model of Hugging Face.

    Raises:
        ValueError: the file is corrupt, truncated, or contains something other than nested maps of arrays.
    """
    found: dict[str, Entry] = {}
    reader = _Reader(file, size)
    reader.map((), found)
    if reader.position != size:
        raise ValueError(f"{size - reader.position:,} bytes after its end")
    if not found:
        raise ValueError("it contains no arrays")
    if any(re.search(_HUGGING_FACE, name) for name in found):
        converted = dict(_to_pytorch(name, entry) for name, entry in found.items())
        return converted if len(converted) == len(found) else found
    return found


def _to_pytorch(name: str, entry: Entry) -> tuple[str, Entry]:
    """The name and the axes of the same array in a PyTorch model of Hugging Face."""
    *parts, last = name.split("/")
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(entry.shape)) if last == "kernel" else None
    if axes is not None:
        shape, strides = (tuple(values[axis] for axis in axes) for values in (entry.shape, entry.strides))
        entry = Entry(shape, entry.dtype, strides, entry.begin, entry.storage)
    return ".".join([*parts, {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(last, last)]), entry


class _Reader:
    """Reads headers of values one after the other; never more than a name at once."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self.position = 0
        self._names = 0

    def _take(self, count: int) -> bytes:
        if self.position + count > self._size:
            raise ValueError("truncated or corrupt")
        self._file.seek(self.position)
        self.position += count
        return self._file.read(count)

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "big")

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > self._size:
            raise ValueError("truncated or corrupt")

    def header(self) -> tuple[str, int]:
        """What the next value is, and its length or value: text, bytes, list, map, extension or number."""
        first = self._number(1)
        for start, end, kind in ((0x80, 0x90, "map"), (0x90, 0xA0, "list"), (0xA0, 0xC0, "text")):
            if start <= first < end:
                return kind, first - start
        if first in _SIZED:
            kind, count = _SIZED[first]
            return kind, self._number(count)
        if 0xD4 <= first <= 0xD8:
            return "extension", 2 ** (first - 0xD4)
        if first in _SCALARS:
            return "number", self._number(_SCALARS[first])
        if first == 0xC1:
            raise ValueError("truncated or corrupt")
        return "number", first

    def expect(self, kind: str) -> int:
        """The length or value of the next value, which must be of this kind."""
        found, length = self.header()
        if found != kind:
            raise ValueError(f"corrupt: {found} instead of {kind}")
        return length

    def map(self, keys: tuple[str, ...], found: dict[str, Entry]) -> None:
        """Adds the arrays in the next value, a map, to `found`."""
        if len(keys) > _MAX_DEPTH:
            raise ValueError("its maps are nested too deeply")
        for _ in range(self.expect("map")):
            length = self.expect("text")
            key = self._take(min(length, _MAX_NAME)).decode("utf-8", "replace")
            name = "/".join((*keys, key))
            self._names += 1
            if not key or length >= _MAX_NAME or len(name) > _MAX_NAME or not name.isprintable():
                raise ValueError(f"the invalid name {name[:80]!r}")
            if key == "__msgpack_chunked_array__":
                raise ValueError("an array of more than a gigabyte, in chunks, which is not supported")
            if self._names > _MAX_NAMES or name in found:
                raise ValueError("more than 50,000 names" if name not in found else f"two arrays are named {name!r}")
            start = self.position
            kind, length = self.header()
            if kind == "map":
                self.position = start
                self.map((*keys, key), found)
            elif kind == "extension":
                entry = self._extension(name, length)
                if entry is not None:
                    found[name] = entry
            elif kind in ("text", "bytes"):
                self._skip(length)
            elif kind != "number":
                raise ValueError(f"{name!r} is a list: not a file of flax.serialization")

    def _extension(self, name: str, length: int) -> Entry | None:
        """The array in an extension of `length` bytes, which begins with its type; None for another kind."""
        kind, start = self._number(1), self.position
        self._skip(length)
        end = self.position
        if kind != _ARRAY:
            return None
        self.position = start
        if self.expect("list") != 3:
            raise ValueError(f"{name!r} is not an array")
        shape = self._shape(name)
        dtype = self._take(min(self._text(), 32)).decode("ascii", "replace")
        count = self.expect("bytes")
        if dtype not in _DTYPES:
            raise ValueError(f"{name!r} has the unsupported dtype {dtype!r}")
        expected = math.prod(shape) * _DTYPES[dtype].itemsize
        if not expected == count == end - self.position:
            raise ValueError(f"{name!r} is inconsistent: {list(shape)} of {dtype} takes {expected:,} bytes")
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        entry = Entry(shape, _DTYPES[dtype], strides, 0, npz.Member(self.position, count, count, False, 0))
        self.position = end
        return entry

    def _shape(self, name: str) -> tuple[int, ...]:
        axes = self.expect("list")
        shape = tuple(self.expect("number") for _ in range(min(axes, 33)))
        if axes > 32 or any(length >= 2**48 for length in shape):
            raise ValueError(f"{name!r} claims an impossible shape")
        return shape

    def _text(self) -> int:
        kind, length = self.header()
        if kind not in ("text", "bytes"):
            raise ValueError("corrupt: the dtype of an array is no text")
        return length
