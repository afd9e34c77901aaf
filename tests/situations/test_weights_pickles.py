"""Files of torch.save as projects write them are read; for others, the command in the error converts them.

A stand-in for torch writes the files, and reads them for the command. With weights_only=True it refuses what torch
refuses. Where torch is installed, it is used as well.
"""

import argparse
import collections
import glob
import importlib
import importlib.util
import json
import shlex
import sys
import types
from pathlib import Path

import helpers_torch
import numpy as np
import pytest

from vit_jax import convert, weights
from vit_jax.errors import UserError
from vit_jax.weights import files, pickles
from vit_jax.weights.save import flattened

REFERENCE = Path(__file__).resolve().parents[1] / "weights" / "references" / "timm_vit"


class Module:
    """An object whose state only its method knows: no nn.Module, which would be read."""

    def state_dict(self):
        return self.hidden


def stand_in(monkeypatch):
    """Modules called torch, put in place, that do what the command and these tests need."""
    safe = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}
    found = helpers_torch.modules()
    torch, nn, library = found["torch"], types.ModuleType("torch.nn"), types.ModuleType("safetensors.torch")

    def add_safe_globals(classes):
        safe.update(f"{one.__module__}.{one.__name__}" for one in classes)

    def load(path, map_location, weights_only):
        return helpers_torch.load(path, safe if weights_only else None)

    def save_file(tensors, path):
        files.write_safetensors(path, {name: tensor.array for name, tensor in tensors.items()})

    def is_tensor(one):
        return isinstance(one, helpers_torch.Tensor)

    monkeypatch.setattr(Module, "__module__", "torch.nn")
    nn.Module, library.save_file = Module, save_file
    torch.save, torch.load, torch.tensor, torch.nn = helpers_torch.save, load, helpers_torch.Tensor, nn
    torch.is_tensor, torch.serialization = is_tensor, types.SimpleNamespace(add_safe_globals=add_safe_globals)
    for name, module in (found | {"torch.nn": nn, "safetensors.torch": library}).items():
        monkeypatch.setitem(sys.modules, name, module)
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
        module.hidden = tensors
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
    assert message.count("\n") == 2
    assert message.startswith(f"{path} is a pickle (torch.save) that cannot be read without PyTorch: ")
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
def test_files_of_projects(tmp_path, monkeypatch, torch, kind):
    """All are read, but for objects of unknown classes: those the printed command converts."""
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    arrays = dict(files.open_file(REFERENCE).arrays)
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    other = {name: torch.tensor(array + 1) for name, array in arrays.items()}
    source = folder / "model.pth.tar"
    torch.save(KINDS[kind](tensors, other, torch), source)
    options = {"heads": 3, "prefix": PREFIXES.get(kind)}
    if "whole" in kind and not hasattr(torch, "__version__"):
        message = refused(source)
        # Only what cannot be opened otherwise is opened in a way that executes code, and then the risk is named.
        assert "weights_only=False" in message and "only if you trust it" in message
        assert run_printed(message, monkeypatch) == folder / "model.safetensors"
        source = folder / "model.safetensors"
    _, parameters, _ = weights.load(source, **options)
    expected = flattened(weights.load(REFERENCE)[1])
    for path, array in flattened(parameters).items():
        np.testing.assert_array_equal(array, expected[path])


def test_convert(tmp_path, capsys):
    content = {"teacher": dict(files.open_file(REFERENCE).arrays), "student": {"x": np.ones(2, "f")}} | NAMESPACE
    helpers_torch.save(content, tmp_path / "dino.pth")
    arguments = [str(tmp_path / "dino.pth"), str(tmp_path / "vit.safetensors"), "--heads=3", "--prefix=teacher"]
    assert convert.main(arguments) == 0
    written = files.open_file(tmp_path / "vit.safetensors")
    assert set(written.arrays) == set(content["teacher"])
    for name, array in content["teacher"].items():
        np.testing.assert_array_equal(written.arrays[name], array)
    assert "student.x" in capsys.readouterr().out


def test_rng_states_and_numbers_beside_a_model_are_ignored(tmp_path):
    state = np.arange(5056, dtype=np.uint8)
    content = {
        "model": dict(files.open_file(REFERENCE).arrays),
        "torch_rng_state": state,
        "cuda_rng_states": {0: state},
    }
    helpers_torch.save(content, tmp_path / "a.pth")
    _, parameters, report = weights.load(tmp_path / "a.pth", heads=3)
    expected = flattened(weights.load(REFERENCE)[1])
    assert all((array == expected[path]).all() for path, array in flattened(parameters).items())
    ignored = {row.names[0]: row.detail for row in report.rows if row.action == "ignored"}
    assert ignored == dict.fromkeys(["torch_rng_state", "cuda_rng_states.0"], "training state")


def shards(folder, content):
    names = sorted(files.open_file(REFERENCE).arrays)
    for part in range(3):
        own = {name: content[name] for name in names[part::3]}
        helpers_torch.save(own, folder / f"pytorch_model-0000{part + 1}-of-00003.bin")
    helpers_torch.save({}, folder / "training_args.bin")
    return {name: f"pytorch_model-0000{part + 1}-of-00003.bin" for part in range(3) for name in names[part::3]}


@pytest.mark.parametrize("index", [False, True])
def test_shards(tmp_path, index):
    shown = shards(tmp_path, dict(files.open_file(REFERENCE).arrays))
    if index:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shown}))
    _, parameters, _ = weights.load(tmp_path, heads=3)
    expected = flattened(weights.load(REFERENCE)[1])
    assert set(flattened(parameters)) == set(expected)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match=r"its shard pytorch_model-00002-of-00003\.bin is missing"):
        weights.load(tmp_path, heads=3)


def test_several_files_are_converted_together(tmp_path, monkeypatch):
    torch = stand_in(monkeypatch)
    arrays = dict(files.open_file(REFERENCE).arrays)
    shards(tmp_path, {name: whole(torch, {name: torch.tensor(array)}) for name, array in arrays.items()})
    with pytest.raises(UserError) as caught:
        weights.load(tmp_path)
    target = run_printed(str(caught.value), monkeypatch)
    assert target == tmp_path / "pytorch_model.safetensors"
    assert set(files.open_file(tmp_path).arrays) == {f"{name}.{name}" for name in arrays}


def test_the_command_overwrites_nothing(tmp_path, monkeypatch):
    torch = stand_in(monkeypatch)
    torch.save(whole(torch, {"a": torch.tensor([1.0])}), tmp_path / "model.pt")
    files.write_safetensors(tmp_path / "model.safetensors", {"b": np.ones(2)})
    assert run_printed(refused(tmp_path / "model.pt"), monkeypatch) == tmp_path / "model-converted.safetensors"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"cos\nsystem\n(S'touch ran'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.", "posix.system"),
        (b"\x80\x02ctorch.nn\nModule\n)\x81.", "torch.nn.Module"),
        (b"\x80\x02c" + b"x" * 5000 + b"\nsystem\n)R.", "objects that cannot be listed"),
        (b"\x80\x02cos\r\x1b[31m\nsystem\n)R.", "objects that cannot be listed"),
        (b"\x80\x02" + b"]" * 2000 + b".", "objects that cannot be listed"),
        (b"\x80\x02\x82\x01.", "objects that cannot be listed"),
        (b"\x80\x02(S'a'\nios\nsystem\n.", "os.system"),
    ],
)
def test_what_a_pickle_would_call_is_named_and_not_called(tmp_path, monkeypatch, data, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickles, "_MAX_OPERATIONS", 1000)
    (tmp_path / "a.pt").write_bytes(data)
    assert f"it holds more than arrays ({named})" in refused(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()
