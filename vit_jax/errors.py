"""The exception for mistakes of the user, and helpers for texts of messages."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix: wrong input, a full disk, a missing file.

    The message has at most three lines: what is wrong, what was given, what is allowed or what to do. Commands print it
    without a traceback and exit with status 2.
    """


@contextlib.contextmanager
def os_errors_of_run(directory: Path) -> Iterator[None]:
    """Turns an error of the operating system that ends a run into a UserError: a broken disk, too many open files."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or directory}: {error.strerror or one_line(error)}\n"
            "  fix the cause, then run the same command again to resume"
        ) from error


def no_thread() -> UserError:
    """Returns the error for a thread that cannot be started."""
    return UserError(
        "no further thread can be started: the limit of this user or container is reached\n"
        "  raise it (ulimit -u, or pids.max of the container), then run the same command again"
    )


def one_line(error: BaseException | str, max_length: int = 200) -> str:
    """Returns an exception's message in one line of at most `max_length` characters; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def nearest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Returns the known names that a misspelled name may mean, the most similar first; [] if none is similar.

    Args:
        name: the misspelled name.
        known: the names that exist.
        count: how many to return at most.
        cutoff: minimum similarity, from 0 to 1, as of `difflib.get_close_matches`.
    """
    spelled = {one.lower().replace("-", "_"): one for one in known}
    found = difflib.get_close_matches(name[:100].lower().replace("-", "_"), spelled, n=count, cutoff=cutoff)
    return [spelled[one] for one in found]


def few(names: Iterable[str], shown: int = 3) -> str:
    """Returns the first names of a list and how many more there are: 'a, b, c and 4 more'."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
