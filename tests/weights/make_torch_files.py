"""Makes torch_files/: small files of torch.save in every layout, each with its tensors in a .safetensors file.

    python tests/weights/make_torch_files.py

It takes torch and safetensors; the tests read what it has written and need neither. Written with torch 2.13.0.
"""

import argparse
import collections
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent / "torch_files"
OLD = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]
DTYPES = [*OLD, "float8_e4m3fn", "uint16"]


def record(name, content, tensors, **options):
    """Saves `content`, and what `tensors` are, by the names that a reader gives them."""
    torch.save(content, FOLDER / name, **options)
    expect(name, tensors)


def expect(name, tensors):
    save_file({key: x.detach().clone().contiguous() for key, x in tensors.items()}, FOLDER / f"{name}.safetensors")


def below(prefix, tensors):
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def main():
    FOLDER.mkdir(exist_ok=True)
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    dtypes = {name: torch.randn(2, 3, generator=generator).mul(9).to(getattr(torch, name)) for name in DTYPES}
    record("dtypes.pth", dtypes, dtypes)
    typed = {name: dtypes[name] for name in OLD}
    record("legacy.pth", typed, typed, _use_new_zipfile_serialization=False)
    base = torch.arange(24.0).reshape(2, 3, 4)
    views = {
        "base": base,
        "same": base,
        "transposed": base.permute(2, 0, 1),
        "part": base[1],
        "strided": base[:, ::2, 1:],
        "column": base[:, 1, 3],
        "number": base[1, 2, 3],
        "empty": base[:0],
        "channels_last": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": base.half()[:, 1:],
    }
    record("views.pth", views, views)
    record("legacy_views.pth", views, views, _use_new_zipfile_serialization=False)
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.BatchNorm2d(2), torch.nn.MultiheadAttention(2, 1))
    module[0].register_buffer("positions", torch.arange(3), persistent=False)
    module[0].weight.no_decay = True  # an attribute of a parameter
    optimizer = torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.1))
    module[0](torch.ones(1, 1, 3, 3)).sum().backward()
    optimizer.step()
    training = {
        "model": module.state_dict(),
        "parameters": collections.OrderedDict(module.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last": torch.ones(1)},
        "args": argparse.Namespace(lr=0.1, size=torch.Size([1, 2]), device=torch.device("cpu"), dtype=torch.float16),
        "loss": np.float64(0.5),
        "history": [torch.ones(2), {1, 2}, np.arange(3)],
        "counts": collections.Counter(a=1),
        "best": collections.defaultdict(list, a=[1]),
        5: {None: {True: torch.ones(1)}},
        "nothing": None,
    }
    expected = below("model", module.state_dict()) | below("parameters", dict(module.named_parameters()))
    expected |= {"5.None.True": torch.ones(1)}
    record("training.pth", training, expected)
    record("protocol_4.pth", training, expected, pickle_protocol=4)
    record("module.pt", module, module.state_dict())
    record("module_inside.pt", {"ema": torch.nn.DataParallel(module)}, below("ema.module", module.state_dict()))
    scripted = torch.jit.trace(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)), torch.ones(1, 2))
    torch.jit.save(scripted, FOLDER / "script.pt")
    expect("script.pt", scripted.state_dict())
    torch.serialization.set_crc32_options(False)
    record("without_checksums.pth", {"base": base}, {"base": base})
    torch.serialization.set_crc32_options(True)
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    torch.save({"weight": quantized}, FOLDER / "refused_quantized.pth")
    torch.save({"weight": torch.ones(1).expand(1000)}, FOLDER / "refused_expanded.pth")


if __name__ == "__main__":
    main()
