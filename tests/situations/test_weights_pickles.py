"""Files of torch.save: the command in the error converts all kinds of them, and the result is read.

A stand-in for torch writes and reads the files, with the names that torch uses in them. With weights_only=True it
refuses what torch refuses. Where torch is installed, it is used as well.
"""

import argparse
import collections
import glob
import importlib
import importlib.util
import io
import pickle
import shlex
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.weights import files
from vit_jax.weights.save import flattened

REFERENCE = Path(__file__).resolve().parents[1] / "weights" / "references" / "timm_vit"


class Tensor:
    """A tensor of the stand-in."""

    def __init__(self, array):
        self.array = np.asarray(array, np.float32)

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (self.array.tolist(), self.array.shape)

    def detach(self):
        return self

    clone = contiguous = detach


class Module:
    """A whole module of the stand-in."""

    def state_dict(self):
        return self.parameters


def _rebuild_tensor_v2(values, shape):
    return Tensor(np.asarray(values, np.float32).reshape(shape))


class Unpickler(pickle.Unpickler):
    """Finds the classes that are safe, or all."""

    def __init__(self, stream, safe):
        super().__init__(stream)
        self.safe = safe

    def find_class(self, module, name):
        if self.safe is not None and f"{module}.{name}" not in self.safe:
            raise pickle.UnpicklingError(f"Weights only load failed: {module}.{name}")
        return super().find_class(module, name)


def stand_in(monkeypatch):
    """Modules called torch, put in place, that do what the command and these tests need."""
    safe = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}
    torch, inner, nn = (types.ModuleType(name) for name in ("torch", "torch._utils", "torch.nn"))

    def save(content, path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
            archive.writestr("archive/data/0", b"1234")

    def load(path, map_location, weights_only):
        with zipfile.ZipFile(path) as archive:
            return Unpickler(io.BytesIO(archive.read("archive/data.pkl")), safe if weights_only else None).load()

    def add_safe_globals(classes):
        safe.update(f"{one.__module__}.{one.__name__}" for one in classes)

    def is_tensor(one):
        return isinstance(one, Tensor)

    def save_file(tensors, path):
        files.write_safetensors(path, {name: tensor.array for name, tensor in tensors.items()})

    for function, module in ((_rebuild_tensor_v2, "torch._utils"), (Module, "torch.nn")):
        monkeypatch.setattr(function, "__module__", module)
    inner._rebuild_tensor_v2, nn.Module = _rebuild_tensor_v2, Module
    torch.save, torch.load, torch.tensor, torch.is_tensor, torch.nn = save, load, Tensor, is_tensor, nn
    torch.serialization = types.SimpleNamespace(add_safe_globals=add_safe_globals)
    library = types.ModuleType("safetensors.torch")
    library.save_file = save_file
    for module in (torch, inner, nn, library):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["safetensors"], "torch", library, raising=False)
    return torch


@pytest.fixture(params=["stand-in", "torch"])
def torch(request, monkeypatch):
    """The stand-in, and torch where it is installed."""
    importlib.import_module("safetensors")
    if request.param == "stand-in":
        return stand_in(monkeypatch)
    return pytest.importorskip("torch")


def below(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def whole(torch, tensors):
    module = torch.nn.Module()
    if not hasattr(torch, "__version__"):
        module.parameters = tensors
        return module
    for name, tensor in tensors.items():  # a tree of modules
        *parents, last = name.split(".")
        inner = module
        for parent in parents:
            if not hasattr(inner, parent):
                setattr(inner, parent, torch.nn.Module())
            inner = getattr(inner, parent)
        inner.register_buffer(last, tensor)
    return module


OTHERS = {"epoch": 3, "loss": 0.1, "arch": "vit", "history": [1, 2], None: None}
NAMESPACE = {"args": argparse.Namespace(lr=0.1)}
KINDS = {
    "plain": lambda d, other, torch: d,
    "OrderedDict": lambda d, other, torch: collections.OrderedDict(d),
    "model and args": lambda d, other, torch: {"model": d, "optimizer": {"state": {0: {"m": other}}}} | NAMESPACE,
    "DINO": lambda d, other, torch: {"student": below("module.", other), "teacher": d} | NAMESPACE | OTHERS,
    "DINOv2": lambda d, other, torch: {"teacher": below("backbone.", d) | {"dino_head.mlp.0.bias": d["norm.bias"]}},
    "tutorial": lambda d, other, torch: {"model_state_dict": d, "optimizer_state_dict": {"state": other}} | OTHERS,
    "net": lambda d, other, torch: {"net": below("module.", d), "acc": 90.0},
    "timm": lambda d, other, torch: {"state_dict": other, "state_dict_ema": d} | NAMESPACE | OTHERS,
    "Lightning": lambda d, other, torch: {
        "state_dict": below("model.", d),
        "pytorch-lightning_version": "2",
        "callbacks": {"x": {"best": 1}},
        "hyper_parameters": {"lr": 1},
    },
    "DeepSpeed": lambda d, other, torch: {"module": d, "optimizer": None, "ds_config": {}},
    "a number among tensors": lambda d, other, torch: d | {"step": 7},
    "whole module": lambda d, other, torch: whole(torch, d),
    "whole module in a dictionary": lambda d, other, torch: {"ema": whole(torch, d), "epoch": 1} | NAMESPACE,
    "three deep": lambda d, other, torch: {"checkpoint": {"ema": {"params": below("module.", d)}}, 5: {6: "x"}},
}
PREFIXES = {"DINO": "teacher", "timm": "state_dict_ema"}


def refused(path):
    with pytest.raises(UserError) as caught:
        weights.load(path)
    message = str(caught.value)
    assert message.count("\n") == 2 and message.startswith(f"{path} is a pickle (torch.save), which can execute code")
    return message


def run_printed(message, monkeypatch):
    """Runs the command of an error message in this process, as a shell would split it; returns the file written."""
    line = message.splitlines()[-1].strip()
    python, flag, code, *arguments = shlex.split(line)
    assert (python, flag) == ("python", "-c") and not set("$`!\\") & set(line.split('"')[1])
    sources = [name for argument in arguments[:-1] for name in sorted(glob.glob(argument))]
    monkeypatch.setattr(sys, "argv", ["-c", *sources, arguments[-1]])
    exec(code, {"__name__": "__main__"})
    return Path(arguments[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_command_converts(tmp_path, monkeypatch, torch, kind):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    arrays = dict(files.open_file(REFERENCE).arrays)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    other = {name: torch.tensor(array + 1) for name, array in arrays.items()}
    torch.save(KINDS[kind](tensors, other, torch), folder / "model.pth.tar")
    message = refused(folder / "model.pth.tar")
    # Only what cannot be opened otherwise is opened in a way that executes code, and then the risk is named.
    assert ("weights_only=False" in message) == ("whole" in kind) == ("only if you trust it" in message)
    target = run_printed(message, monkeypatch)
    assert target == folder / "model.safetensors"
    options = {"heads": 3, "prefix": PREFIXES.get(kind)}
    _, parameters, _ = weights.load(target, **options)
    expected = flattened(weights.load(REFERENCE)[1])
    for path, array in flattened(parameters).items():
        np.testing.assert_array_equal(array, expected[path])


def test_several_files_are_converted_together(tmp_path, monkeypatch):
    torch = stand_in(monkeypatch)
    arrays = dict(files.open_file(REFERENCE).arrays)
    names = sorted(arrays)
    for part in range(3):
        own = {name: torch.tensor(arrays[name]) for name in names[part::3]}
        torch.save(own, tmp_path / f"pytorch_model-0000{part + 1}-of-00003.bin")
    torch.save({}, tmp_path / "training_args.bin")
    with pytest.raises(UserError) as caught:
        weights.load(tmp_path)
    target = run_printed(str(caught.value), monkeypatch)
    _, parameters, _ = weights.load(tmp_path, heads=3)
    assert target == tmp_path / "pytorch_model.safetensors"
    assert set(flattened(parameters)) == set(flattened(weights.load(REFERENCE)[1]))


def test_the_command_overwrites_nothing(tmp_path, monkeypatch):
    torch = stand_in(monkeypatch)
    torch.save({"a": torch.tensor([1.0])}, tmp_path / "model.pt")
    files.write_safetensors(tmp_path / "model.safetensors", {"b": np.ones(2)})
    assert run_printed(refused(tmp_path / "model.pt"), monkeypatch) == tmp_path / "model-converted.safetensors"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"cos\nsystem\n(S'touch ran'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.", "posix.system"),
        (b"\x80\x02ctorch.nn\nModule\n)\x81.", "torch.nn.Module"),
        (b"\x80\x02U\x05hello", "objects that cannot be listed"),
        (b"\x80\x02" + b"]" * 10**6 * 2 + b".", "objects that cannot be listed"),
        (b"\x80\x02(S'a'\niios\nsystem\n.", "objects that cannot be listed"),
    ],
)
def test_what_a_pickle_would_call_is_named_and_not_called(tmp_path, monkeypatch, data, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(data)
    assert f"it holds more than arrays ({named})" in refused(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()
