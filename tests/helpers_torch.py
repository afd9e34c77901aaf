"""A stand-in for torch that writes files as torch.save does, for tests that need files of their own.

`save` writes the zip format, with the names that torch uses; arrays in `content` become tensors. That the layout is
torch's own is tested with recorded files (tests/weights/make_torch_files.py).
"""

import collections
import io
import pickle
import sys
import types
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np

_NAMES = {"float32": "Float", "float16": "Half", "float64": "Double", "bfloat16": "BFloat16", "int64": "Long"}
_NAMES |= {"int32": "Int", "bool": "Bool", "uint8": "Byte"}


class Storage:
    """A flat array that is stored outside the pickle."""

    def __init__(self, array):
        self.array = array


def _rebuild_tensor_v2(storage, offset, shape, strides, *_):
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, [step * storage.itemsize for step in strides])
    return Tensor(view.copy())


class Tensor:
    """A tensor of the stand-in."""

    def __init__(self, array):
        self.array = np.asarray(array)

    def __reduce__(self):
        shape = self.array.shape
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        flat = Storage(np.ascontiguousarray(self.array).reshape(-1))
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (
            flat,
            0,
            shape,
            strides,
            False,
            collections.OrderedDict(),
        )

    def detach(self):
        return self

    clone = contiguous = detach


def modules():
    """Modules called torch and torch._utils, with what files of arrays name."""
    torch, inner = types.ModuleType("torch"), types.ModuleType("torch._utils")
    _rebuild_tensor_v2.__module__ = "torch._utils"
    inner._rebuild_tensor_v2 = _rebuild_tensor_v2
    for dtype, name in _NAMES.items():
        kind = type(f"{name}Storage", (), {"__module__": "torch", "dtype": np.dtype(getattr(ml_dtypes, dtype, dtype))})
        setattr(torch, kind.__name__, kind)
    return {"torch": torch, "torch._utils": inner}


class _Pickler(pickle.Pickler):
    """Puts storages outside the pickle."""

    def __init__(self, stream):
        super().__init__(stream, protocol=2)
        self.storages = []

    def persistent_id(self, one):
        if not isinstance(one, Storage):
            return None
        self.storages.append(one.array)
        kind = getattr(sys.modules["torch"], f"{_NAMES[one.array.dtype.name]}Storage")
        return "storage", kind, str(len(self.storages) - 1), "cpu", one.array.size

    def reducer_override(self, one):
        return Tensor(one).__reduce__() if isinstance(one, np.ndarray) else NotImplemented


def save(content, path):
    """Writes a file as torch.save does."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    with mock.patch.dict(sys.modules, modules() | {k: m for k, m in sys.modules.items() if k.startswith("torch")}):
        pickler.dump(content)
    write(path, stream.getvalue(), [array.tobytes() for array in pickler.storages])


def write(path, pickled, storages=(b"\0" * 64,), byteorder=b"little", compression=zipfile.ZIP_STORED, more=()):
    """Writes an archive with a given pickle, storages called 0, 1, ..., and more members."""
    members = [("a/data.pkl", pickled), ("a/byteorder", byteorder), ("a/version", b"3\n"), *more]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # about names used twice
        for name, data in members + [(f"a/data/{key}", data) for key, data in enumerate(storages)]:
            archive.writestr(name, data)
    return Path(path)


class _Unpickler(pickle.Unpickler):
    """Finds the classes that are safe, or all."""

    def __init__(self, path, safe):
        with zipfile.ZipFile(path) as archive:
            super().__init__(io.BytesIO(archive.read("a/data.pkl")))
            self.storages = {name: archive.read(name) for name in archive.namelist()}
        self.safe = safe

    def find_class(self, module, name):
        if self.safe is not None and f"{module}.{name}" not in self.safe and not name.endswith("Storage"):
            raise pickle.UnpicklingError(f"Weights only load failed: {module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, reference):
        return np.frombuffer(self.storages[f"a/data/{reference[2]}"], reference[1].dtype)


def load(path, safe):
    """What torch.load makes of a file; with `safe`, names of classes, it refuses others."""
    return _Unpickler(path, safe).load()
