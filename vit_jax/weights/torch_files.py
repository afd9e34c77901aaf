"""The formats of torch.save: a pickle that describes tensors, and the tensors' bytes ("storages") next to it.

Since PyTorch 1.6 a file is a zip archive: NAME/data.pkl, and NAME/data/KEY for each storage. Before that it was a
sequence of pickles followed by the storages. A pickle is read by `vit_jax.weights.pickles`, which executes nothing.
Tensors are strided views of storages; a storage may have several. Only what a tensor covers is read.

Both functions raise ValueError with the reason, or UnsupportedError (a ValueError) if PyTorch may read the file;
`vit_jax.weights.files` turns them into a UserError.
"""

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vit_jax.weights import npz, pickles
from vit_jax.weights.pickles import Global, Made, Reference, UnsupportedError

_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in the old format
_MAX_PICKLE = 20 * 10**6  # bytes; the pickle of 1,000 tensors has 100,000
_MAX_ENTRIES, _MAX_DEPTH, _MAX_NAME, _MAX_TENSORS = 10**6, 32, 512, 20_000
_LEFT_OUT = ("optim", "sched")  # dictionaries whose keys begin so have the state of an optimizer or a schedule
_UNTYPED = ("torch.UntypedStorage", "torch.storage.UntypedStorage")

# By the names of the types of storages, and of torch's dtypes.
_DTYPES = {
    "Double": np.dtype(np.float64),
    "Float": np.dtype(np.float32),
    "Half": np.dtype(np.float16),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Long": np.dtype(np.int64),
    "Int": np.dtype(np.int32),
    "Short": np.dtype(np.int16),
    "Char": np.dtype(np.int8),
    "Byte": np.dtype(np.uint8),
    "Bool": np.dtype(np.bool_),
    "ComplexFloat": np.dtype(np.complex64),
    "ComplexDouble": np.dtype(np.complex128),
}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}
_LATER = {
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
}
_LATER = {f"torch.{name}": dtype for name, dtype in _LATER.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A strided array in a storage.

    Attributes:
        shape, dtype: of the array as it is returned, in the machine's byte order.
        strides: in elements.
        begin: the first element's position in the storage, in bytes.
        storage: where the bytes are; its crc is 0 if it was not recorded.
        swapped: whether numbers are in the other byte order than this machine's.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]
    begin: int
    storage: npz.Member
    swapped: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Number of bytes of the storage from the first to the last element."""
        steps = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        return (steps + 1) * self.dtype.itemsize if self.nbytes else 0


def is_torch(members: Mapping[str, npz.Member]) -> bool:
    """Whether a zip archive with these members is a file of torch.save."""
    return any(name.endswith(".pkl") for name in members)


def entries(file: BinaryIO, members: Mapping[str, npz.Member], size: int) -> dict[str, Entry]:
    """The tensors of an archive of torch.save by name, with dots between the keys of nested dictionaries."""
    found = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} members called data.pkl instead of one")
    root = found[0].removesuffix("data.pkl")
    if members[found[0]].expanded > _MAX_PICKLE:
        raise UnsupportedError(f"its pickle has more than {_MAX_PICKLE:,} bytes", {""})
    order = b"little"
    if f"{root}byteorder" in members:
        order = bytes(_read_all(file, members[f"{root}byteorder"], 10))
        if order not in (b"little", b"big"):
            raise ValueError("its byte order is neither little nor big")
    content = pickles.read(io.BytesIO(_read_all(file, members[found[0]], _MAX_PICKLE)))
    start = f"{root}data/"
    storages = {name.removeprefix(start): member for name, member in members.items() if name.startswith(start)}
    return _tensors(content, storages, order == b"big", size)


def is_pickle(file: BinaryIO) -> bool:
    """Whether a file begins with a pickle."""
    file.seek(0)
    try:
        pickles.read(io.BytesIO(file.read(_MAX_PICKLE)))
    except ValueError as error:
        return isinstance(error, UnsupportedError)
    return True


def legacy_entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The tensors of a file that begins with a pickle, by name as in `entries`."""
    file.seek(0)
    stream = io.BytesIO(file.read(_MAX_PICKLE))
    first = pickles.read(stream)
    if first.value != _MAGIC:
        raise UnsupportedError("it has no tensors of PyTorch", first.names)
    _, system, content, keys = (pickles.read(stream) for _ in range(4))
    little = system.value.get("little_endian", True) if type(system.value) is dict else True
    sizes, counts = {}, {}
    for reference in content.references:
        key, dtype, numel = _reference(reference)[:3]
        sizes[key], counts[key] = numel * dtype.itemsize, numel
    storages, position = {}, stream.tell()
    if type(keys.value) is not list or not all(type(key) is str for key in keys.value):
        raise ValueError("its list of storages is corrupt")
    for key in keys.value:
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        if key in storages or counts.get(key) != count:
            raise ValueError("truncated or corrupt: its storages disagree with its tensors")
        position += 8
        if position + sizes[key] > size:
            raise ValueError(f"truncated: its tensors end after byte {position + sizes[key]:,}, the file at {size:,}")
        storages[key] = npz.Member(position, sizes[key], sizes[key], False, 0)
        position += sizes[key]
    return _tensors(content, storages, little is not True, size)


# --- from the pickle's content to arrays ------------------------------------------------------------------------------


def _tensors(
    content: pickles.Content, storages: Mapping[str, npz.Member], swapped: bool, size: int
) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for keys, made in _Walk().below(content.value):
        name = ".".join(key[:_MAX_NAME] for key in keys)
        if not name or len(name) >= _MAX_NAME or not name.isprintable():
            raise ValueError(f"a tensor has the invalid name {name[:80]!r}")
        if name in found:
            raise ValueError(f"two tensors are named {name!r}")
        if len(found) == _MAX_TENSORS:
            raise ValueError(f"it has more than {_MAX_TENSORS:,} tensors")
        try:
            found[name] = _entry(made, storages, swapped)
        except (ValueError, TypeError, IndexError) as error:
            reason = str(error) if type(error) is ValueError else "its description is corrupt"
            raise ValueError(f"the tensor {name!r}: {reason}") from error
    if not found:
        raise UnsupportedError("no tensors were found in it", content.names)
    npz.check_expansion(sum(entry.nbytes for entry in found.values()), size)
    return found


class _Walk:
    """The tensors in nested dictionaries and modules, with the keys on the way to each; other things are left out."""

    def __init__(self):
        self._visited = 0
        self._known: dict[int, Mapping[str, Any] | None] = {}  # what is inside each object, so that it is found once

    def below(
        self, value: Any, keys: tuple[str, ...] = (), above: tuple[int, ...] = ()
    ) -> Iterator[tuple[tuple, Made]]:
        """The keys on the way to each tensor, and what makes it. A dictionary inside itself is left out."""
        if type(value) is Made and _rebuilds(value):
            yield keys, value
            return
        if id(value) not in self._known:
            self._known[id(value)] = _items(value)
        items = self._known[id(value)]
        if items is None or id(value) in above:
            return
        self._visited += len(items)
        if self._visited > _MAX_ENTRIES or len(keys) > _MAX_DEPTH:
            raise ValueError(f"its dictionaries are nested too deeply or have more than {_MAX_ENTRIES:,} entries")
        for key, one in items.items():
            if not key.startswith(_LEFT_OUT) and type(one) in (dict, Made):
                yield from self.below(one, (*keys, key), (*above, id(value)))


def _rebuilds(made: Made) -> bool:
    """Whether something would be a tensor, or a parameter made of one."""
    return made.function.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_"))


def _items(value: Any) -> Mapping[str, Any] | None:
    """What is inside a dictionary, an object that behaves like one, or a module; None for anything else."""
    items = _dictionary(value)
    state = value.state if type(value) is Made else None
    if items is not None or type(state) is not dict:
        return items
    if value.function.startswith("__torch__."):  # TorchScript
        return state
    if not {"_parameters", "_buffers", "_modules"} <= set(state):
        return None
    parameters, buffers, modules = (_dictionary(state[name]) or {} for name in ("_parameters", "_buffers", "_modules"))
    not_saved = state.get("_non_persistent_buffers_set")
    if type(not_saved) is Made and type(not_saved.arguments) is tuple and len(not_saved.arguments) == 1:
        not_saved = not_saved.arguments[0]  # set([...])
    not_saved = {name for name in not_saved if type(name) is str} if type(not_saved) is list else ()
    return parameters | {name: one for name, one in buffers.items() if name not in not_saved} | modules


def _dictionary(value: Any) -> dict[str, Any] | None:
    """The items of a dictionary, or of an object to which the pickle gives items, such as an OrderedDict."""
    return value if type(value) is dict else value.items if type(value) is Made else None


def _entry(made: Made, storages: Mapping[str, npz.Member], swapped: bool) -> Entry:
    """The array that a tensor or parameter is, after checking that it is inside its storage."""
    for _ in range(4):  # a parameter contains a tensor
        arguments, function = made.arguments, made.function.rpartition(".")[2]
        if function == "_rebuild_from_type_v2":  # with attributes
            made = Made(arguments[0], arguments[2])
        elif function in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            made = arguments[0]
            if type(made) is not Made:
                raise ValueError("a parameter of no tensor")
    if function not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        raise ValueError(f"tensors of {function} (quantized, sparse, on another device) are not supported")
    if type(arguments) is not tuple or len(arguments) < 4:
        raise ValueError("its description is corrupt")
    reference, offset, shape, strides = arguments[:4]
    key, dtype, numel, first = _reference(reference)
    if function == "_rebuild_tensor_v3":
        if type(arguments[6]) is not Global or arguments[6].name not in _LATER:
            raise ValueError("its dtype is not supported")
        dtype, numel = _LATER[arguments[6].name], numel // _LATER[arguments[6].name].itemsize
    if not (_counts(shape) and _counts(strides) and _counts((offset,)) and len(shape) == len(strides) <= 32):
        raise ValueError("its shape, strides or offset are invalid")
    if key not in storages:
        raise ValueError("its storage is missing")
    entry = Entry(shape, dtype, strides, (first + offset) * dtype.itemsize, storages[key], swapped)
    end = entry.begin + entry.extent
    if end > numel * dtype.itemsize or end > entry.storage.expanded or entry.nbytes > entry.storage.expanded:
        raise ValueError(
            f"{list(shape)} of {dtype} with strides {list(strides)} is larger than its storage (save a clone)"
        )
    return entry


def _reference(reference: Any) -> tuple[str, np.dtype, int, int]:
    """Key, dtype and number of elements of a storage, and the first element if the reference is to a part of it."""
    value = reference.value if type(reference) is Reference else None
    if type(value) is not tuple or len(value) not in (5, 6) or value[0] != "storage":
        raise ValueError("its reference to a storage is invalid")
    storage, key, _, numel, *view = value[1:]
    if type(key) is not str or type(storage) is not Global or not _counts((numel,)):
        raise ValueError("its reference to a storage is invalid")
    dtype = np.dtype(np.uint8) if storage.name in _UNTYPED else _STORAGES.get(storage.name)
    if dtype is None:
        raise ValueError("its dtype is not supported")
    first = view[0][1] if view and view[0] is not None else 0
    if not _counts((first,)):
        raise ValueError("its reference to a storage is invalid")
    return key, dtype, numel, first


def _counts(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and 0 <= value < 2**48 for value in values)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(file: BinaryIO, entry: Entry, out: np.ndarray) -> np.ndarray:
    """The array of `entry`, read into `out` (uint8, `entry.nbytes` long).

    Raises:
        ValueError: its storage is corrupt or truncated.
    """
    array = out.view(entry.dtype).reshape(entry.shape)
    if not out.size:
        return array
    in_order = np.lib.stride_tricks.as_strided(array, strides=_bytes(entry)).flags.c_contiguous
    part = out if in_order and not entry.storage.compressed else np.empty(entry.extent, np.uint8)
    _read_part(file, entry, part)
    if part is not out:
        array[...] = np.lib.stride_tricks.as_strided(part.view(entry.dtype), entry.shape, _bytes(entry))
    if entry.swapped:
        unit = entry.dtype.itemsize // (2 if entry.dtype.kind == "c" else 1)
        out.view(f"u{unit}").byteswap(inplace=True)
    return array


def _bytes(entry: Entry) -> tuple[int, ...]:
    return tuple(stride * entry.dtype.itemsize for stride in entry.strides)


def _read_part(file: BinaryIO, entry: Entry, out: np.ndarray) -> None:
    storage = entry.storage
    if storage.compressed:
        out[:] = _read_all(file, storage, storage.expanded)[entry.begin : entry.begin + entry.extent]
        return
    file.seek(storage.start + entry.begin)
    crc = npz.copy(file, out)
    if entry.extent == storage.expanded and storage.crc not in (0, crc):
        raise ValueError("corrupt: its checksum differs from the archive's")


def _read_all(file: BinaryIO, storage: npz.Member, at_most: int) -> np.ndarray:
    """All bytes of a storage, expanded."""
    out = np.empty(min(storage.expanded, at_most), np.uint8)
    file.seek(storage.start)
    crc = npz.inflate(file, storage.size, out) if storage.compressed else npz.copy(file, out)
    if len(out) == storage.expanded and storage.crc not in (0, crc):
        raise ValueError("corrupt: its checksum differs from the archive's")
    return out
