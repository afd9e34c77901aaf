"""What a run prints while it trains."""

import io
import math
import sys
import time

from vit_jax import terminal
from vit_jax.progress import PLAIN_SECONDS, clock


class Progress:
    """On a terminal one line that is overwritten; elsewhere one line per record."""

    def __init__(
        self,
        steps: int,
        steps_per_epoch: float,
        stream: io.TextIOBase | None = None,
        enabled: bool = True,
        name: str = "",
        brief: bool = False,
    ):
        """Prints nothing yet.

        Args:
            steps: number of steps of the run.
            steps_per_epoch: number of steps per pass over the training split.
            stream: where to print; None for standard output.
            enabled: False to print nothing.
            name: printed at the start of each line; '' for none.
            brief: True for one of many runs: what `tell` prints is left out, the line is removed when others are
                printed, and elsewhere than on a terminal there is one every `PLAIN_SECONDS` at most.
        """
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._stream, self._enabled, self._brief = stream or sys.stdout, enabled, brief
        self._line = terminal.LiveLine(self._stream, kept=not brief)
        self._prefix = f"{name}: " if name else ""
        self._shown_at = time.monotonic()

    def show(self, step: int, metrics: dict[str, float], seconds_left: float, recorded: bool) -> None:
        """Prints the state of the run; not on a terminal, only if the metrics are `recorded` too."""
        live, now = self._line.is_live, time.monotonic()
        is_due = recorded and not (self._brief and now < self._shown_at + PLAIN_SECONDS)
        if not self._enabled or not (live or is_due):
            return
        self._shown_at = now
        width = max(terminal.width(self._stream) - len(self._prefix), 1) if live else None
        epoch = step / self._steps_per_epoch
        text = self._prefix + progress_line(step, self._steps, epoch, metrics, seconds_left, width)
        if live:
            self._line.show(text)
        else:
            self._print(text)

    def say(self, text: str) -> None:
        """Prints a separate line, below the one that is overwritten."""
        if self._enabled:
            self._print(self._prefix + terminal.styled(self._stream, text))

    def tell(self, text: str) -> None:
        """Prints a line about what every run does, as `say`; not if the progress is brief."""
        if not self._brief:
            self.say(text)

    def _print(self, text: str) -> None:
        # Training continues when the terminal is closed or nobody reads the pipe any more.
        terminal.print_below(self._stream, text + "\n")


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
