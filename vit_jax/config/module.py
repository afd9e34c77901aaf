"""Config files as Python modules: finding, importing and calling them."""

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from importlib.machinery import FileFinder, ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

from vit_jax import paths
from vit_jax.errors import UserError, few, nearest, one_line

_PACKAGE = Path(__file__).resolve().parents[1]
# The shipped config files: in an installed package they are part of it; in a clone they are beside it.
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
# Installed packages keep their meaning beside a config file that has the name of one of them; these wherever they are.
DEPENDENCIES = ("vit_jax", "jax", "jaxlib", "flax", "optax", "numpy", "ml_collections")
OTHER_SUFFIXES = (".ipynb", ".json", ".yaml", ".yml", ".toml", ".pyc")
_loaded: dict[str, types.ModuleType] = {}  # modules imported for the last config, but for the file itself


def call(spec: str) -> Any:
    """Returns what `get_config()` or `get_config(ARG)` of a config returns, 'CONFIG' or 'CONFIG:ARG'.

    CONFIG is the name of a shipped config or the path of a file; `_find` says which one is meant.
    The file is run anew at each call, as modules beside it that it imports. These are found before modules of the same
    name in the current directory, but not before those of the standard library and of installed packages.

    Raises:
        UserError: no such file, an error in it, or an argument that it does not accept.
    """
    path, argument = split(spec)
    file = _open(spec, path)
    with _siblings(file):
        with _errors(spec, file, f"importing {file} failed"):
            module = _import(file)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(
                f"--config={spec}: {file} has no function get_config\n  see docs/options.md and the files in configs/"
            )
        _check_argument(spec, file, get_config, argument)
        with _errors(spec, file, f"get_config of {file} failed"):
            return get_config(argument) if argument else get_config()


def call_adapt(spec: str, config: Any, typed: set[str]) -> None:
    """Calls `adapt(config, typed)` of a config file, if it has that function; the file is run anew.

    Raises:
        UserError: as `call`.
    """
    file = _open(spec, split(spec)[0])
    with _siblings(file), _errors(spec, file, f"adapt of {file} failed"):
        adapt = getattr(_import(file), "adapt", None)
        if adapt is not None:
            adapt(config, typed)


def shipped_arguments() -> dict[str, tuple[str, str]]:
    """Returns, by name, the title of every shipped config and the arguments that it takes, in words ('': none)."""
    found = {}
    for file in sorted(SHIPPED.glob("*.py")):
        with _siblings(file):
            module = _import(file)
        title, words = (module.__doc__ or "").partition("\n")[0], getattr(module, "ARGUMENTS", "")
        found[file.stem] = title, " ".join(words.split())
    return found


def split(spec: str) -> tuple[str, str]:
    """Returns name or path, and argument, of 'CONFIG' or 'CONFIG:ARG', either of which may contain colons.

    CONFIG is the longest part before a colon that is a name or a file; if none is, the part up to '.py'.
    """
    ends = [len(spec), *reversed([match.start() for match in re.finditer(":", spec)])]
    ending = re.search(r"\.py(?=:)", spec)
    guess = ending.end() if ending else ends[-1]
    end = next((end for end in ends if _find(spec[:end]) is not None), guess)
    return spec[:end], spec[end + 1 :]


def shipped() -> list[str]:
    """Returns the names of the shipped configs."""
    return sorted(file.stem for file in SHIPPED.glob("*.py"))


def _open(spec: str, path: str) -> Path:
    """Returns the file.

    Raises:
        UserError: there is none, or it is not a Python file.
    """
    if (file := _find(path)) is not None:
        if file.suffix in OTHER_SUFFIXES:
            raise UserError(
                f"--config={spec}: {path} is not a Python file\n  allowed: a Python file with a function get_config"
            )
        return file
    directory = paths.expand(path, "--config")
    if directory.is_dir():
        files = [*directory.glob("config.json"), *sorted(directory.glob("*.py"))]
        inside = [str(Path(path) / file.name) for file in files]
        hint = f"contains: {few(inside)}" if inside else "allowed: a Python file with a function get_config"
        raise UserError(f"--config={spec}: {path} is a directory\n  {hint}")
    own = [f"{path}.py"] if os.path.isfile(f"{directory}.py") else []
    near = own or nearest(Path(path).name.removesuffix(".py"), shipped())
    what = "file" if _is_path(path) else "config"
    meant = f"nearest: --config={near[0]}{spec.removeprefix(path)}\n  " if near else ""
    raise UserError(f"--config={spec}: no such {what}: {path}\n  {meant}available: {', '.join(shipped())}, or a file")


def _find(path: str) -> Path | None:
    """Returns the file that a config's name or path stands for, None if there is none; in this order.

    1. A name, such as cifar10, stands for the shipped config. A path has a slash, or ends in .py.
    2. A file, relative to the current directory.
    3. configs/NAME.py stands for the shipped config, also where there is no such directory.
    """
    if "\0" in path:
        return None
    ours = SHIPPED / f"{Path(path).name.removesuffix('.py')}.py"
    candidates = [Path(os.path.expanduser(path))]
    if not _is_path(path):
        candidates.insert(0, ours)
    elif Path(path) == Path("configs") / ours.name:
        candidates.append(ours)
    return next((file for file in candidates if os.path.isfile(file)), None)


def _is_path(text: str) -> bool:
    return os.sep in text or text.endswith(".py")


def _import(file: Path) -> types.ModuleType:
    """Returns the module of a file, imported anew; in the package of its directory, if that is one."""
    name = _unique_name(file)
    if (package := _package(file)) is None:
        return _execute(name, file)
    # For relative imports: a package with a name of its own.
    root = _root_name(file)
    for old in [old for old in sys.modules if old.partition(".")[0] == root]:
        del sys.modules[old]
    _execute(root, package / "__init__.py", [str(package)])
    inner = ".".join([root, *file.absolute().parent.relative_to(package).parts])
    importlib.import_module(inner)
    return _execute(f"{inner}.{name}", file)


def _unique_name(file: Path) -> str:
    digest = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:12]
    return f"config_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}_{digest}"


def _root_name(file: Path) -> str:
    return f"{_unique_name(file)}_package"


def _execute(name: str, file: Path, search: list[str] | None = None) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, file, loader=_Loader(name, str(file)), submodule_search_locations=search
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses and pickle look it up there
    spec.loader.exec_module(module)
    return module


def _package(file: Path) -> Path | None:
    """Returns the directory of the outermost package that a file belongs to; None if its directory is no package."""
    found = None
    for directory in file.absolute().parents:
        if not _is_package(directory):
            break
        found = directory
    return found


class _Loader(SourceFileLoader):
    """Reads the source each time: a bytecode file that is older, but not by a second, would be taken for up to date."""

    def get_code(self, fullname: str) -> types.CodeType:
        """Returns the code of the source."""
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder:
    """Finds modules beside a config file."""

    def __init__(self, file: Path):
        """Looks into the file's directory, and that of its package (for `from configs.common import ...`)."""
        directory, package = file.absolute().parent, _package(file)
        parents = {name: str(directory) for name in _importable(directory)}
        if package is not None:
            parents.setdefault(package.name, str(package.parent))
        self._parents = {name: parent for name, parent in parents.items() if not _is_installed(name)}
        self.names = {*self._parents, _root_name(file)}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Returns the spec of a module beside the file, None for other modules; see `importlib.abc.MetaPathFinder`."""
        top = name.partition(".")[0]
        if top not in self.names:
            return None
        for parent in path or filter(None, [self._parents.get(top)]):
            finder = FileFinder(str(parent), (_Loader, importlib.machinery.SOURCE_SUFFIXES))
            if found := finder.find_spec(name):
                return found
        return None


def _importable(directory: Path) -> list[str]:
    """Returns the names of the modules and packages in a directory, also of directories without __init__.py."""
    try:
        entries = list(os.scandir(directory))
    except OSError:  # it may not be listed: the file itself can be read all the same
        return []
    files = [entry.name.removesuffix(".py") for entry in entries if entry.name.endswith(".py")]
    folders = [entry.name for entry in entries if entry.name.isidentifier() and entry.is_dir()]
    return [*files, *(name for name in folders if _is_package(directory / name) or PathFinder.find_spec(name) is None)]


def _is_package(directory: Path) -> bool:
    return (directory / "__init__.py").is_file()


def _is_installed(name: str) -> bool:
    """Returns whether a name is that of a module of the standard library, of an installed package or a dependency."""
    if name in DEPENDENCIES or name in sys.stdlib_module_names:
        return True
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return PathFinder.find_spec(name, installed) is not None


@contextlib.contextmanager
def _siblings(file: Path) -> Iterator[None]:
    """Within the context, modules beside a file can be imported, and are imported anew."""
    finder = _Finder(file)
    for name, module in _loaded.items():  # those of the last config stay until now: its objects may need them
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _loaded.clear()
    others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in finder.names}
    for name in others:  # of the same name, from elsewhere
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        found = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in finder.names}
        _loaded.update(found)
        sys.modules.update(others)


def _check_argument(spec: str, file: Path, get_config: Callable[..., Any], argument: str) -> None:
    try:
        signature = inspect.signature(get_config)
    except (TypeError, ValueError):  # not written in Python: the call will show
        return
    try:
        signature.bind(*([argument] if argument else []))
    except TypeError as error:
        if argument and not signature.parameters:
            raise UserError(f"--config={spec}: get_config of {file} takes no argument\n  omit :{argument}") from None
        allowed = f"get_config{signature}: one positional argument, given as --config={file}:ARG"
        raise UserError(f"--config={spec}: get_config of {file}: {error}\n  declared: {allowed}") from None


@contextlib.contextmanager
def _errors(spec: str, file: Path, what: str) -> Iterator[None]:
    """Turns whatever user code raises into a UserError that names the line, except Ctrl-C and a UserError."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit: a config file must not end the command silently
        reason = one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise UserError(f"--config={spec}: {what}\n  {_line_of(error, file)}: {reason}") from error


def _line_of(error: BaseException, file: Path) -> str:
    """Returns 'FILE:LINE' of the innermost frame of an error in the config file's directory, or of a syntax error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno or 1}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[:1] != "<"]  # <frozen os>
    own = [frame for frame in frames if Path(frame.filename).absolute().parent == file.absolute().parent]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else str(file)
