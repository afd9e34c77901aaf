"""How far a task is, for everything that may take more than two seconds."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from vit_jax import terminal

AFTER = 2.0  # seconds after which a task is shown
LIVE_SECONDS = 0.5  # between two updates of a line on a terminal
PLAIN_SECONDS = 30.0  # between two lines elsewhere

T = TypeVar("T")


class Counter:
    """A context manager that shows on standard error how far a task is, once it has taken `AFTER` seconds.

    On a terminal it is one line, which is overwritten, and removed at the end; elsewhere it is a line every
    `PLAIN_SECONDS`. A thread prints it, so that it also works while a library computes.
    """

    def __init__(self, task: str, total: float | None = None, unit: str = "", enabled: bool = True):
        """Prints nothing yet.

        Args:
            task: what is done, such as 'decoding'.
            total: number of things to do; None if it is not known.
            unit: what is counted, such as 'images'; '' to show the time only.
            enabled: False to print nothing.
        """
        self._task, self._total, self._unit, self._enabled = task, total, unit, enabled
        self._done: float = 0
        self._first: tuple[float, float] | None = None  # time and count when the first things were done
        self._last = 0.0  # time when the last things were done
        self._line = terminal.LiveLine(sys.stderr)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Counter":
        self._began = time.monotonic()
        if self._enabled:
            self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no further thread can be started
                self._thread = None
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._line.end()

    def add(self, count: float = 1) -> None:
        """Counts what has been done since the last call."""
        self._done += count
        self._last = time.monotonic()
        self._first = self._first or (self._last, self._done)

    def over(self, items: Iterable[T], each: int = 1) -> Iterator[T]:
        """Yields the items; counts `each` after each of them has been used."""
        for item in items:
            yield item
            self.add(each)

    def text(self, now: float) -> str:
        """Returns 'decoding 12,300 of 50,000 images  4,100/s  left 0:09' at a time of `time.monotonic`."""
        elapsed = clock(now - self._began)
        if not self._unit:
            return f"{self._task}  {elapsed}"
        done = self._done if self._total is None else min(self._done, self._total)
        count = f"{done:,.0f}" if self._total is None else f"{done:,.0f} of {self._total:,.0f}"
        shown = f"{self._task} {count} {self._unit}"
        began, before = self._first or (now, 0)
        if done <= before or self._last <= began:
            return f"{shown}  {elapsed}"
        rate = (done - before) / (self._last - began)
        seconds = 0.0 if self._total is None else max((self._total - done) / rate - (now - self._last), 0.0)
        left = "" if self._total is None else f"  left {clock(seconds)}"
        return f"{shown}  {rate:,.{0 if rate >= 10 else 1}f}/s{left}"

    def _show(self) -> None:
        is_live = self._line.is_live
        wait = AFTER if is_live else PLAIN_SECONDS
        while not self._ended.wait(wait):
            text = self.text(time.monotonic())
            if is_live:
                self._line.show(text)
            else:
                terminal.warn(text)
            wait = LIVE_SECONDS if is_live else PLAIN_SECONDS


def clock(seconds: float) -> str:
    """Returns a duration as '1:05' or '2:03:20'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
