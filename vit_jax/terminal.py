"""What every command does at its start and end, and printing that cannot end it.

Standard streams may be closed, full, broken, or not UTF-8.
"""

import argparse
import codecs
import contextlib
import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, runtime_checkable

from vit_jax import machine_errors
from vit_jax.errors import UserError

SCRIPT = "vit-jax"  # the name of the installed command
ERRORS = "vit_jax.terminal"  # the error handler of the streams
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"  # word processors replace hyphens by others
_lost: list[str] = []  # why standard output has not received all of `output`; at most one
_absent: list[io.TextIOBase] = []  # streams that stand for those that were closed when the process started
_STYLES = {"error:": "\x1b[1;31m", "warning:": "\x1b[33m", "finished:": "\x1b[1m"}
_CLEARED = "\r\x1b[K"  # what empties the line of a terminal


@runtime_checkable
class Stream(Protocol):
    """What a standard stream may be: a file, or what a program has put in its place."""

    def write(self, text: str, /) -> object:
        """Writes text."""


def program() -> str | None:
    """Returns how this process was started as a command: 'vit-jax', 'python -m vit_jax' or 'python -m vit_jax.predict'.

    None if another program was started.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith("vit_jax."):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return SCRIPT if os.path.basename("".join(sys.argv[:1])) == SCRIPT else None


def prog(module: str) -> str:
    """Returns how to start a command in the way this process was started: 'vit-jax predict', 'python -m MODULE'."""
    started = program()
    return f"{started} {sys.argv[1]}" if started in (SCRIPT, "python -m vit_jax") else f"python -m {module}"


def say(text: str = "", end: str = "\n") -> None:
    """Prints to standard output, if that is possible: for what is also in files, such as the progress of a run."""
    print_below(sys.stdout, text + end)


def warn(text: str = "", end: str = "\n") -> None:
    """Prints to standard error, if that is possible."""
    print_below(sys.stderr, text + end)


def output(text: str = "", end: str = "\n") -> None:
    """Prints the result of a command to standard output, if that is possible.

    After a failure nothing more is printed, and `commands.finish` ends the command with the reason (`lost`).
    """
    if not _lost and (reason := print_below(sys.stdout, text + end)) is not None:
        _lost.append(reason)


def finish(action: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status; an error that the user can fix is printed and gives status 2.

    If a part of the command's result could not be printed (`output`), the reason is printed and the status is 2; it is
    1, without a message, if the reader closed the pipe, as `head` does.
    """
    prepare()
    try:
        return _closed(_run(action))
    except SystemExit as end:  # --help, or a mistake that argparse has found
        end.code = _closed(end.code)
        raise


def _run(action: Callable[[], int | None]) -> int:
    try:
        return action() or 0
    except UserError as error:
        warn(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        warn("stopped")
        return 130
    except Exception as error:
        if (message := machine_errors.explain(error)) is None:
            raise
        warn(f"error: {message}")
        return 2


def _closed(status: int | None) -> int | None:
    """Closes the streams; returns the exit status with which the command ends."""
    if (reason := lost()) is not None:
        is_broken_pipe = reason == os.strerror(errno.EPIPE)  # its reader wanted no more, as `head` does
        if not is_broken_pipe:
            warn(f"error: standard output: {reason}\n  the result was not printed, or not all of it")
        status = max(status or 0, 1 if is_broken_pipe else 2)
    close()
    return status


class Parser(argparse.ArgumentParser):
    """Prints its help as the result of the command, and its errors in two lines, so that they cannot fail.

    Attributes:
        may_be_empty: the names of the flags whose value may be an empty text.
    """

    may_be_empty: tuple[str, ...] = ()

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Returns the flags and the other arguments.

        Raises:
            UserError: a flag is empty, or begins with a dash in place of hyphens.
        """
        for argument in sys.argv[1:] if args is None else args:
            _check_hyphens(argument)
        flags, others = super().parse_known_args(args, namespace)
        for action in self._actions:
            if (
                action.option_strings
                and action.dest not in self.may_be_empty
                and getattr(flags, action.dest, None) == ""
            ):
                raise UserError(
                    f"{action.option_strings[-1]}= is empty\n  give it a value (is a variable of the shell not set?)"
                    f"{'' if action.required else ', or omit it'}"
                )
        return flags, others

    def error(self, message: str) -> NoReturn:
        """Ends the command with status 2, and says what is wrong with its arguments."""
        self.exit(2, f"error: {message}\n  see {self.prog} --help\n")

    def _print_message(self, message: str, file: io.TextIOBase | None = None) -> None:
        (output if file is sys.stdout else warn)(message, end="")


def _check_hyphens(argument: str) -> None:
    name = argument.lstrip(_DASHES)
    dashes = argument.removesuffix(name)
    if dashes.strip("-") and name[:1].isalpha() and not os.path.lexists(argument):
        raise UserError(f"{argument[:200]} begins with {dashes!r} in place of two hyphens\n  type --{name[:200]}")


def lost() -> str | None:
    """Returns why a part of the `output` could not be printed; None if all of it was."""
    return _lost[0] if _lost else None


def write(stream: Stream | None, text: str) -> str | None:
    r"""Writes text to a stream and flushes it; returns the reason if that fails, else None.

    Characters that the stream's encoding does not have are written as escapes (\xe9); file names that are not text, as
    the bytes that they are.
    """
    if stream is None or stream in _absent:
        return os.strerror(errno.EBADF)
    try:
        _tolerate(stream)
        stream.write(text)
        getattr(stream, "flush", _nothing)()
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # closed by the program
        return str(error)
    return None


def is_live(stream: Stream | None) -> bool:
    """Returns whether a stream is a terminal on which a line can be overwritten."""
    try:
        return bool(getattr(stream, "isatty", _nothing)()) and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed by the program
        return False


class LiveLine:
    """A line of a terminal that is overwritten. At most one is open; whatever else is printed ends it first."""

    _lock = threading.RLock()  # lines are shown by several threads
    _open: "LiveLine | None" = None

    def __init__(self, stream: Stream | None, kept: bool = False):
        """Prints nothing yet.

        Args:
            stream: where to print.
            kept: whether its last text stays when it ends; else it is removed.
        """
        self._stream, self._kept = stream, kept
        self.is_live = is_live(stream)

    def show(self, text: str) -> None:
        """Replaces the text of the line, cut to the width of the terminal; a line that is not live is not printed."""
        if self.is_live:
            with LiveLine._lock:
                if LiveLine._open is not self:
                    LiveLine.end_open()
                LiveLine._open = self
                write(self._stream, _CLEARED + text[: max(width(self._stream) - 1, 0)])

    def end(self) -> None:
        """Ends the line if it is open."""
        with LiveLine._lock:
            if LiveLine._open is self:
                LiveLine.end_open()

    @classmethod
    def end_open(cls) -> None:
        """Ends the line that is open, if there is one."""
        with LiveLine._lock:
            line, LiveLine._open = LiveLine._open, None
            if line is not None:
                write(line._stream, "\n" if line._kept else _CLEARED)


def print_below(stream: Stream | None, text: str) -> str | None:
    """As `write`, below a line that is open; 'error:', 'warning:' or 'finished:' at the start may be colored."""
    LiveLine.end_open()
    return write(stream, styled(stream, text))


def styled(stream: Stream | None, text: str) -> str:
    """Returns the text with its first word in color, if it has one and the stream is a terminal without NO_COLOR."""
    word = text.partition(" ")[0]
    if word not in _STYLES or os.environ.get("NO_COLOR") or not is_live(stream):
        return text
    return f"{_STYLES[word]}{word}\x1b[0m{text.removeprefix(word)}"


def width(stream: Stream | None) -> int:
    """Returns the number of columns of a terminal; 120 if it is not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 120
    except (OSError, ValueError, AttributeError):  # AttributeError: no real file
        return 120


def prepare() -> None:
    """Makes the standard streams usable; called when a command starts.

    A descriptor that is closed is opened on the null device. Otherwise the next file would get its number, and what
    libraries print would be written into that file.
    """
    _lost.clear()
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # libraries write to it without asking
            _absent.append(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
            setattr(sys, name, _absent[-1])
        with contextlib.suppress(OSError, ValueError):
            _tolerate(getattr(sys, name))


def close() -> None:
    """Flushes the standard streams; one that fails is replaced, because the interpreter would fail at its exit."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and write(stream, "") is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: no real file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _nothing() -> None:
    """Stands for what a stream of a program, such as one that writes to a log, does not have."""


def _tolerate(stream: Stream) -> None:
    if hasattr(stream, "reconfigure") and stream.errors != ERRORS:
        stream.reconfigure(errors=ERRORS)


def _escape(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = []
    for character in error.object[error.start : error.end]:
        byte = ord(character) - 0xDC00  # how Python represents a byte of a file name that is not text
        parts.append(bytes([byte]) if 0x80 <= byte <= 0xFF else character.encode("ascii", "backslashreplace"))
    return b"".join(parts), error.end


codecs.register_error(ERRORS, _escape)
