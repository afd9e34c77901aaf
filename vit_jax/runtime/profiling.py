"""`config.log.profile`: a trace of what the devices do during some training steps, for TensorBoard and Perfetto."""

from pathlib import Path
from typing import Any

import jax

DIRECTORY = "profile"
Span = tuple[int, int]  # first step, and the step after the last one


def boundaries(span: Span | None) -> tuple[int, ...]:
    """Returns the steps at which a chunk of steps must end, so that the trace holds no other steps than the span's."""
    return span or ()


class Profiler:
    """Records the steps of a span in WORKDIR/profile; call `before` and `after` around each chunk of steps.

    A run that stops within the span leaves no trace; when it is resumed, the remaining steps are recorded.
    """

    def __init__(self, span: Span | None, workdir: Path):
        """Records nothing yet.

        Args:
            span: steps to record; None for none.
            workdir: the run directory.
        """
        self._start, self._stop = span or (0, 0)
        self._directory, self._recording = workdir / DIRECTORY, False
        self._previous: Any = None  # outputs of the chunk before the span

    def before(self, step: int) -> None:
        """Starts the trace if the chunk that begins at `step` is in the span."""
        if not self._recording and self._start <= step < self._stop:
            jax.block_until_ready(self._previous)  # or its steps would be in the trace as well
            jax.profiler.start_trace(self._directory)
            self._recording = True
        self._previous = None

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace, once `outputs` are computed, if the chunk that ended at `step` was the last of the span.

        Args:
            step: number of steps made.
            outputs: arrays that the chunk computes.
        """
        if not self._recording:
            self._previous = outputs if step == self._start else None
        elif step >= self._stop:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self._recording = False
