"""Stopping on request: by a signal, or after a given time; the first signal saves, the second does not wait."""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ECHO = 1.0  # seconds within which the same signal is the first one, passed on twice


class Stop:
    """Whether the run has been asked to stop; a context manager that listens while it is open.

    A thread hears the signals, so that they are heard also while the main thread compiles or waits for a device.
    """

    def __init__(self, max_minutes: float | None = None):
        """Begins to count.

        Args:
            max_minutes: the time after which it is to stop by itself.
        """
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._max_minutes = max_minutes
        # What is to be done, whatever happens, before the process ends at once.
        self.leave: Callable[[], None] = lambda: None
        self._reason: str | None = None
        self._heard: tuple[signal.Signals, float] | None = None
        self._free = threading.Event()

    @property
    def reason(self) -> str | None:
        """Why it is to stop: 'SIGTERM', 'SIGINT', 'train.max_minutes is 5', or None where it is not."""
        if self._reason is None and self._end is not None and time.monotonic() > self._end:
            self._reason = f"train.max_minutes is {self._max_minutes:g}"
        return self._reason

    def nothing_to_save(self, yes: bool) -> None:
        """Says whether everything there is has been saved: the process then ends at the first signal, at once."""
        (self._free.set if yes else self._free.clear)()

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's
        self._ours, theirs = socket.socketpair()
        self._theirs = theirs
        theirs.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        # What is ignored stays so: nohup, and shells for what runs in the background, ask for it.
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._old = {number: signal.signal(number, lambda *_: None) for number in heard}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not hasattr(self, "_thread"):
            return
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._done.set()
        self._thread.join()
        self._ours.close()
        self._theirs.close()

    def _listen(self) -> None:
        while not self._done.is_set():
            ready, _, _ = select.select([self._ours], [], [], 0.1)
            for byte in self._ours.recv(16) if ready else b"":
                if byte in SIGNALS:
                    self._hear(signal.Signals(byte))

    def _hear(self, number: signal.Signals) -> None:
        now, heard = time.monotonic(), self._heard
        if heard is not None and (number != heard[0] or now > heard[1] + ECHO):
            self._end_now(f"{number.name} again: stopped at once, without saving", 128 + number)
        if heard is not None:
            return
        self._heard, self._reason = (number, now), self._reason or number.name
        if self._free.is_set():
            self._end_now(f"{number.name}: stopped; nothing has been done since the last save", 0)
        with contextlib.suppress(OSError, ValueError):
            print(f"{number.name}: saving, then stopping; once more to stop at once", file=sys.stderr, flush=True)

    def without_saving(self, words: str) -> None:
        """Ends the process at once, with status 2: what it would write now is no longer its own."""
        self._end_now(words, 2)

    def _end_now(self, words: str, status: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"\n{words}", file=sys.stderr, flush=True)
        self.leave()
        os._exit(status)
