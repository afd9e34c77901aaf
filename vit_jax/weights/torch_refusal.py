"""The error for a file of torch.save that is not read here, with a command that converts it where PyTorch is."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from vit_jax.errors import UserError, few

SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar")
_UNKNOWN = "objects that cannot be listed"

# What torch.load accepts with weights_only=True; the second after add_safe_globals.
_ARRAYS = (
    r"(?:__builtin__|builtins)\.set|collections\.OrderedDict|"
    r"torch\._utils\._rebuild_\w+|torch\.(?:storage\.)?\w+Storage|torch\.(?:Size|device)"
)
_NAMESPACE = "argparse.Namespace"

# Nested dictionaries become names with dots. What is no array is left out, and so is an optimizer's state.
_CONVERT = (
    "import argparse, sys, torch, safetensors.torch as s; {namespace}"
    "f = lambda p, x: {{k: t for n, v in x.items() if str(n)[:5] not in ('optim', 'sched') "
    "for k, t in f(p + '.' + str(n), v).items()}} if isinstance(x, dict) "
    "else f(p, x.state_dict()) if hasattr(x, 'state_dict') "
    "else {{p[1:]: x.detach().clone().contiguous()}} if torch.is_tensor(x) else {{}}; "
    "d = [f('', torch.load(n, map_location='cpu', weights_only={only})) for n in sys.argv[1:-1]]; "
    "s.save_file({{k: t for x in d for k, t in x.items()}}, sys.argv[-1])"
)


def refusal(path: Path, reason: object, names: Iterable[str]) -> UserError:
    """The error for a file of torch.save, with a command that converts it.

    Args:
        path: the file.
        reason: why it is not read.
        names: of the classes and functions that its pickle uses.
    """
    more = {name if re.fullmatch(r"[\w.]{1,100}", name) else _UNKNOWN for name in names if not _makes_arrays(name)}
    others = sorted(more - {_NAMESPACE})
    namespace = "torch.serialization.add_safe_globals([argparse.Namespace]); " if more and not others else ""
    command = _CONVERT.format(namespace=namespace, only=not others)
    risk = f"it holds more than arrays ({few(others, 2)}), which can execute code: only if you trust it, "
    return UserError(
        f"{path} is a pickle (torch.save) that cannot be read without PyTorch: {reason}\n"
        f"  {risk if others else ''}convert it where PyTorch and safetensors are installed:\n"
        f'  python -c "{command}" {_sources(path)} {shlex.quote(str(_target(path)))}'
    )


def _makes_arrays(name: str) -> bool:
    return re.fullmatch(_ARRAYS, name) is not None


def _target(path: Path) -> Path:
    name = re.sub(r"-\d+-of-\d+(?=\.)", "", path.name)
    while Path(name).suffix.lower() in SUFFIXES:
        name = name.removesuffix(Path(name).suffix)
    target = path.with_name(f"{name}.safetensors")
    return path.with_name(f"{name}-converted.safetensors") if target.exists() else target


def _sources(path: Path) -> str:
    """The file, or all parts of a file in several, as arguments of a command."""
    parts = re.fullmatch(r"(.+-)\d+(-of-\d+\.\w+)", path.name)
    if parts is None:
        return shlex.quote(str(path))
    return f"{shlex.quote(str(path.with_name(parts[1])))}*{shlex.quote(parts[2])}"
