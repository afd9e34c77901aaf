"""Files of torch.save, which are not opened: what they hold, and how the user converts them where PyTorch is installed.

Nothing in this module unpickles. The operations of a pickle are listed, without being executed.
"""

import io
import pickletools
import re
import shlex
import zipfile
from pathlib import Path
from typing import BinaryIO

from vit_jax.errors import UserError, few
from vit_jax.weights import npz

SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar")
_PARTS = 4  # the old format of torch.save is a sequence of pickles: three short ones, then the content
_MAX_BYTES, _MAX_OPERATIONS = 50 * 10**6, 10**6
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


def is_pickle(file: BinaryIO) -> bool:
    """Whether a file, not a zip archive, is one or more pickles."""
    file.seek(0)
    return bool(_listed(file.read(_MAX_BYTES))[1])


def refusal(path: Path, shown: object = None) -> UserError:
    """The error for a file of torch.save, with a command that converts it.

    Args:
        path: the file; if it does not exist on this machine, only its name is used.
        shown: its name in the message, by default the path.
    """
    more = _more_than_arrays(path)
    others = sorted(more - {_NAMESPACE})
    namespace = "torch.serialization.add_safe_globals([argparse.Namespace]); " if more and not others else ""
    command = _CONVERT.format(namespace=namespace, only=not others)
    if others:
        how = f"it holds more than arrays ({few(others, 2)}), which weights_only=True refuses; only if you trust it,"
    else:
        how = "use the .safetensors file of the model; or, as only arrays are loaded here,"
    return UserError(
        f"{shown or path} is a pickle (torch.save), which can execute code when it is opened\n"
        f"  {how} convert it where PyTorch and safetensors are installed:\n"
        f'  python -c "{command}" {_sources(path)} {shlex.quote(str(_target(path)))}'
    )


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


def _more_than_arrays(path: Path) -> set[str]:
    """The classes and functions that opening the file would use, apart from those that make arrays."""
    try:
        with path.open("rb", buffering=0) as file:
            if file.read(2) != b"PK":
                file.seek(0)
                found = _listed(file.read(_MAX_BYTES))[0]
            else:
                with npz.open_zip(file, path.stat().st_size) as archive:
                    name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                    with archive.open(name) as member:
                        found = _listed(member.read(_MAX_BYTES))[0]
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, StopIteration, NotImplementedError, zipfile.BadZipFile):
        found = {_UNKNOWN}
    return {name for name in found if re.fullmatch(_ARRAYS, name) is None}


def _listed(data: bytes) -> tuple[set[str], int]:
    """The names of the classes and functions that pickles use, and the number of pickles that could be listed."""
    stream = io.BytesIO(data)
    found, whole, operations = set(), 0, 0
    for _ in range(_PARTS):
        strings = ["", ""]
        try:
            for operation, argument, _ in pickletools.genops(stream):
                operations += 1
                if operation.name == "GLOBAL":
                    found.add(argument.replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    found.add(".".join(strings[-2:]))
                elif operation.name in ("INST", "EXT1", "EXT2", "EXT4") or operations > _MAX_OPERATIONS:
                    found.add(_UNKNOWN)
                    return found, whole
                if isinstance(argument, str):
                    strings = [strings[-1], argument]
        except (ValueError, OverflowError, EOFError):  # ends, or was cut; what follows the pickles is data
            return (found if whole else {_UNKNOWN}), whole
        whole += 1
    return found, whole
