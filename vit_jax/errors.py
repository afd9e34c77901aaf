"""The exception for mistakes of the user, and helpers for texts of messages."""

from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix: wrong input, a full disk, a missing file.

    The message has at most three lines: what is wrong, what was given, what is allowed or what to do. Commands print it
    without a traceback and exit with status 2.
    """


def one_line(error: BaseException | str, max_length: int = 200) -> str:
    """Returns an exception's message in one line of at most `max_length` characters; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def few(names: Iterable[str], shown: int = 3) -> str:
    """Returns the first names of a list and how many more there are: 'a, b, c and 4 more'."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
