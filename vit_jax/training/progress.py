"""What a run shows while it trains."""

import contextlib
import io
import math
import os
import sys


class Progress:
    """One line that is overwritten in a terminal; elsewhere a plain line for each record."""

    def __init__(
        self,
        steps: int,
        steps_per_epoch: float,
        stream: io.TextIOBase | None = None,
        enabled: bool = True,
        name: str = "",
        live: bool = True,
    ):
        """Of a run of so many steps.

        Args:
            steps: of the run.
            steps_per_epoch: of them.
            stream: where to; None for standard output.
            enabled: False to show nothing.
            name: of the run, which every line then begins with; '' for none.
            live: False for plain lines in a terminal too.
        """
        self._steps, self._steps_an_epoch = steps, steps_per_epoch
        self._stream, self._enabled = stream or sys.stdout, enabled
        self._live = live and self._stream.isatty()
        self._name = f"{name}: " if name else ""
        self._open = False

    def show(self, step: int, metrics: dict[str, float], seconds_left: float, recorded: bool) -> None:
        """Shows where the run stands. Off a terminal only what is `recorded` is shown."""
        if not self._enabled or not (recorded or self._live):
            return
        width = _terminal_width() - len(self._name) if self._live else None
        text = self._name + progress_line(step, self._steps, step / self._steps_an_epoch, metrics, seconds_left, width)
        self._print(f"\r\x1b[K{text}" if self._live else text + "\n")
        self._open = self._live

    def say(self, text: str) -> None:
        """Prints a line of its own, below the live one."""
        if self._enabled:
            self._print(("\n" if self._open else "") + self._name + text + "\n")
        self._open = False

    def _print(self, text: str) -> None:
        # A terminal that was closed, or a pipe that nobody reads any more, is no reason to stop training.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 120


def progress_line(
    step: int, steps: int, epoch: float, metrics: dict[str, float], seconds_left: float, width: int | None = None
) -> str:
    """'step 200/4400  epoch 17.9  loss 0.5120  accuracy 91.2 %  rate 9.80e-04  1,234 images/s  left 1:05'.

    Where the terminal is narrower, the learning rate, then the epoch, then the MFU give way.
    """
    parts = {
        "step": f"step {step:>{len(str(steps))}}/{steps}",
        "epoch": f"epoch {epoch:.1f}",
        "loss": f"loss {metrics.get('train/loss', math.nan):.4f}",
        "accuracy": f"accuracy {100 * metrics.get('train/accuracy', math.nan):.1f} %",
        "rate": f"rate {metrics['train/learning_rate']:.2e}",
        "speed": f"{metrics.get('images_per_second', math.nan):,.0f} images/s",
    }
    if "train/loss" in metrics and "train/accuracy" not in metrics:  # not every run has one
        del parts["accuracy"]
    if "mfu" in metrics:
        parts["mfu"] = f"MFU {100 * metrics['mfu']:.1f} %"
    parts["left"] = f"left {clock(seconds_left)}"
    for name in ("rate", "epoch", "mfu"):
        if width is not None and len("  ".join(parts.values())) >= width:
            parts.pop(name, None)
    # A line as wide as the terminal would wrap, and could not be overwritten.
    return "  ".join(parts.values())[: width and width - 1]


def clock(seconds: float) -> str:
    """'1:05' or '2:03:20'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
