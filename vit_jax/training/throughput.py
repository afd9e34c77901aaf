"""How fast a run is: images per second, model FLOPs utilization, time left; pauses do not count."""

import time


class Throughput:
    """Counts the seconds of training, and computes the speed since the last mark."""

    def __init__(self, images_per_step: int, flops_per_image: float, peak_flops: float | None, seconds: float = 0.0):
        """Starts paused.

        Args:
            images_per_step: batch size.
            flops_per_image: floating-point operations of a training step per image, forward and backward.
            peak_flops: FLOP/s of all devices together; None if unknown.
            seconds: seconds of training before this process.
        """
        self._images_per_step, self._flops_per_image, self._peak_flops = images_per_step, flops_per_image, peak_flops
        self._seconds_before, self._seconds_until_pause = seconds, 0.0
        self._running_since: float | None = None
        self._first_step = self._mark_step = None
        self._mark_seconds = 0.0

    def start(self, step: int) -> None:
        """Starts or continues to count, at `step`."""
        if self._running_since is None:
            self._running_since = time.monotonic()
        if self._first_step is None:
            self._first_step = self._mark_step = step

    def pause(self) -> None:
        """Stops counting until `start`."""
        self._seconds_until_pause, self._running_since = self._seconds_here(), None

    def seconds(self) -> float:
        """Returns the seconds of training, those before this process included."""
        return self._seconds_before + self._seconds_here()

    def speed(self, step: int, mark: bool) -> dict[str, float]:
        """Returns `images_per_second` and, if the peak is known, `mfu`, both since the last call with `mark`."""
        now = self._seconds_here()
        if step == self._mark_step:
            return {}
        rate = (step - self._mark_step) * self._images_per_step / max(now - self._mark_seconds, 1e-9)
        if mark:
            self._mark_step, self._mark_seconds = step, now
        mfu = {"mfu": rate * self._flops_per_image / self._peak_flops} if self._peak_flops else {}
        return {"images_per_second": rate} | mfu

    def rewind(self, step: int) -> None:
        """Continues from an earlier step; the seconds spent so far stay counted."""
        self._mark_step, self._mark_seconds = step, self._seconds_here()
        self._first_step = min(self._first_step, step)

    def time_left(self, step: int, steps: int) -> float:
        """Returns the seconds from `step` to the end of a run of `steps`, at this process's average speed."""
        return (steps - step) * self._seconds_here() / max(step - self._first_step, 1)

    def _seconds_here(self) -> float:
        running = time.monotonic() - self._running_since if self._running_since is not None else 0.0
        return self._seconds_until_pause + running
