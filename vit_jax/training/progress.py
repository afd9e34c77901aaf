"""What a run prints while it trains."""

import io
import math
import os
import sys

from vit_jax import terminal


class Progress:
    """On a terminal one line that is overwritten; elsewhere one line per record."""

    def __init__(
        self,
        steps: int,
        steps_per_epoch: float,
        stream: io.TextIOBase | None = None,
        enabled: bool = True,
        name: str = "",
        live: bool = True,
    ):
        """Prints nothing yet.

        Args:
            steps: number of steps of the run.
            steps_per_epoch: number of steps per pass over the training split.
            stream: where to print; None for standard output.
            enabled: False to print nothing.
            name: printed at the start of each line; '' for none.
            live: False to print one line per record on a terminal too.
        """
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._stream, self._enabled = stream or sys.stdout, enabled
        self._live = live and terminal.is_live(self._stream)
        self._prefix = f"{name}: " if name else ""
        self._line_is_open = False

    def show(self, step: int, metrics: dict[str, float], seconds_left: float, recorded: bool) -> None:
        """Prints the state of the run; not on a terminal, only if the metrics are `recorded` too."""
        if not self._enabled or not (recorded or self._live):
            return
        width = max(_terminal_width() - len(self._prefix), 1) if self._live else None
        epoch = step / self._steps_per_epoch
        text = self._prefix + progress_line(step, self._steps, epoch, metrics, seconds_left, width)
        self._print(f"\r\x1b[K{text}" if self._live else text + "\n")
        self._line_is_open = self._live

    def say(self, text: str) -> None:
        """Prints a separate line, below the one that is overwritten."""
        if self._enabled:
            self._print(("\n" if self._line_is_open else "") + self._prefix + text + "\n")
        self._line_is_open = False

    def _print(self, text: str) -> None:
        # Training continues when the terminal is closed or nobody reads the pipe any more.
        terminal.write(self._stream, text)


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns or 120  # 0 columns: unknown
    except (OSError, ValueError):
        return 120


def progress_line(
    step: int, steps: int, epoch: float, metrics: dict[str, float], seconds_left: float, width: int | None = None
) -> str:
    """Returns 'step 200/4400  epoch 17.9  loss 0.5120  accuracy 91.2 %  rate 9.80e-04  1,234 images/s  left 1:05'.

    On a terminal of fewer than `width` columns the learning rate is left out, then the epoch, then the MFU.
    """
    parts = {
        "step": f"step {step:>{len(str(steps))}}/{steps}",
        "epoch": f"epoch {epoch:.1f}",
        "loss": f"loss {metrics.get('train/loss', math.nan):.4f}",
        "accuracy": f"accuracy {100 * metrics.get('train/accuracy', math.nan):.1f} %",
        "rate": f"rate {metrics['train/learning_rate']:.2e}",
        "speed": f"{metrics.get('images_per_second', math.nan):,.0f} images/s",
    }
    if "train/loss" in metrics and "train/accuracy" not in metrics:  # an objective without accuracy
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
    """Returns a duration as '1:05' or '2:03:20'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
