"""Stopping a run: at a signal, or after a given time. The first signal saves, the second one exits at once."""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

from vit_jax import terminal
from vit_jax.errors import UserError, no_thread

# The last two announce the end of a job on some clusters.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_AFTER = 1.0  # seconds; the same signal within this time is the first one delivered twice (a shell and `timeout`)


class StopRequest:
    """Whether the run has been requested to stop; a context manager that receives signals while it is open.

    A thread receives them, so that they are handled also while the main thread compiles or waits for a device.

    Attributes:
        on_exit: called before this object ends the process.
    """

    def __init__(self, max_minutes: float | None = None):
        """Starts the clock.

        Args:
            max_minutes: time after which the run stops; None for no limit.
        """
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._max_minutes = max_minutes
        self.on_exit: Callable[[], None] = _do_nothing
        self._reason: str | None = None
        self._received: tuple[signal.Signals, float] | None = None
        self._exit_on_signal = threading.Event()

    @property
    def reason(self) -> str | None:
        """Why the run is to stop: 'SIGTERM', 'SIGINT', 'train.max_minutes is 5'; None if it is not."""
        if self._reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = f"train.max_minutes is {self._max_minutes:g}"
        return self._reason

    @property
    def exit_on_signal(self) -> bool:
        """Whether the first signal ends the process at once, with status 0, because there is nothing to save."""
        return self._exit_on_signal.is_set()

    @exit_on_signal.setter
    def exit_on_signal(self, value: bool) -> None:
        (self._exit_on_signal.set if value else self._exit_on_signal.clear)()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread can receive signals
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        # Signals that are ignored stay ignored: nohup and shells (for background jobs) rely on it.
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._old_handlers = {number: signal.signal(number, _do_nothing) for number in handled}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="signals", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._restore()
            raise no_thread() from error
        return self

    def __exit__(self, *_: object) -> None:
        if not hasattr(self, "_thread"):
            return
        self._closed.set()
        self._thread.join()
        self._restore()

    def _restore(self) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._receiver.close()
        self._sender.close()

    def _receive(self) -> None:
        while not self._closed.is_set():
            ready, _, _ = select.select([self._receiver], [], [], 0.1)
            for byte in self._receiver.recv(16) if ready else b"":
                if byte in SIGNALS:
                    self._handle(signal.Signals(byte))

    def _handle(self, number: signal.Signals) -> None:
        now, first = time.monotonic(), self._received
        if first is not None:
            if number != first[0] or now > first[1] + REPEAT_AFTER:
                self._exit(f"{number.name} again: exiting at once, without saving", 128 + number)
            return
        if self.exit_on_signal:
            self._exit(f"{number.name}: stopped; everything is saved", 0)
        self._received, self._reason = (number, now), self._reason or number.name
        terminal.warn(f"{number.name}: saving, then stopping; repeat to exit at once")

    def exit_without_saving(self, text: str) -> None:
        """Prints `text` and ends the process at once, with status 2: another process owns the run directory."""
        self._exit(text, 2)

    def _exit(self, text: str, status: int) -> None:
        terminal.warn(f"\n{text}")
        try:
            self.on_exit()
        finally:
            os._exit(status)


class Interruption(StopRequest):
    """As `StopRequest`, for a program or notebook that calls `vit_jax.train`: its process is never ended.

    Ctrl-C alone is received, in the main thread. The first one saves the run if there is something to save; a second
    one, or one without anything to save, raises KeyboardInterrupt at once.
    """

    def __init__(self, max_minutes: float | None = None):
        super().__init__(max_minutes)
        self._lost: str | None = None
        self.interrupted = False

    @property
    def reason(self) -> str | None:
        """As `StopRequest.reason`.

        Raises:
            UserError: another process has taken the run directory over.
        """
        if self._lost is not None:
            raise UserError(f"{self._lost}\n  use another workdir, or wait for that process")
        return super().reason

    def __enter__(self) -> "Interruption":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._old_handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_old_handler"):
            signal.signal(signal.SIGINT, self._old_handler)

    def _interrupt(self, *_: object) -> None:
        if self.exit_on_signal or self.interrupted:
            raise KeyboardInterrupt
        self.interrupted, self._reason = True, self._reason or signal.SIGINT.name
        terminal.warn(f"{signal.SIGINT.name}: saving, then stopping; repeat to stop at once, without saving")

    def exit_without_saving(self, text: str) -> None:
        """Makes `reason` raise an error with this text: another process owns the run directory."""
        self._lost = text


def _do_nothing(*_: object) -> None:
    pass
