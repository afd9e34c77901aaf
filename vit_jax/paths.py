"""Paths that a user gives, and the directory for files that can be made again."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from vit_jax import arguments, terminal
from vit_jax.errors import UserError


def expand(path: str | bytes | os.PathLike, option: str) -> Path:
    """Returns a path given by the user, with '~' and '~user' expanded; nothing needs to exist there.

    Args:
        path: as the user gave it.
        option: what it was given for, such as '--workdir' or 'config.data.dir'; for the message of an error.

    Raises:
        UserError: it is empty, there is no such user or home directory, the system does not allow or cannot look up
            such a path, or it is relative and the current directory has been removed.
    """
    text = arguments.path(option, path)
    if not text:
        raise UserError(f"{option} is empty\n  allowed: a path; '.' for the current directory")
    try:
        expanded = _expand_user(text, option)
        os.stat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        if not expanded.is_absolute():
            _check_current_directory(text, option)
    except OSError as error:  # no permission, a name that is too long, a loop of links, an I/O error
        raise UserError(f"{option}={text[:200]} cannot be used: {error.strerror}\n  use another path") from error
    except ValueError as error:  # a NUL character, or a character that the file system's encoding does not have
        raise UserError(f"{option}={text!r} cannot be a path: {error}\n  use a path without such characters") from error
    return expanded


def cache_dir() -> Path:
    """Returns the user's directory for files that can be made again at any time; it may not exist.

    $XDG_CACHE_HOME/vit_jax or ~/.cache/vit_jax; without a home directory, a temporary one that is removed at exit.

    Raises:
        UserError: XDG_CACHE_HOME names a user who does not exist, or there is no directory for temporary files either.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return _expand_user(base, "XDG_CACHE_HOME") / "vit_jax"
    try:
        return Path("~/.cache/vit_jax").expanduser()
    except RuntimeError:
        return _temporary()


def check_source(source: str | os.PathLike[str], option: str) -> None:
    """Checks the path among a path, a URL and the name of a published model, as `expand`.

    Raises:
        UserError: as `expand`.
    """
    if "://" not in os.fspath(source):
        expand(source, option)


def _expand_user(text: str, option: str) -> Path:
    if not text.startswith("~"):
        path = Path(text)
        return path.absolute() if str(path).startswith("~") else path  # ./~name is not the home directory of a user
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = text.partition("/")[0][1:]
        reason = f"there is no user {user}" if user else "this user has no home directory"
        way_out = f"for a name that begins with '~': ./{text}" if user else "set HOME, or write the path in full"
        raise UserError(f"{option}={text}: {reason}\n  {way_out}") from None


def _check_current_directory(text: str, option: str) -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError(
            f"{option}={text} is relative, and the current directory has been removed\n"
            "  change to another directory (cd), or use an absolute path"
        ) from None


@functools.cache
def _temporary() -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="vit_jax-"))
    except OSError as error:
        raise UserError(
            f"there is neither a home directory nor one for temporary files: {error.strerror}\n"
            "  set XDG_CACHE_HOME to a directory that can be written to"
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    terminal.warn("warning: this user has no home directory, so nothing is cached; set HOME or XDG_CACHE_HOME")
    return folder
