"""How fast a run is: images a second, model FLOPs utilisation, time left; pauses do not count."""

import time


class Meter:
    """Counts the seconds of training, and from them the speed since the last record."""

    def __init__(self, images_a_step: int, flops_an_image: float, peak: float | None, seconds: float = 0.0):
        """Starts paused.

        Args:
            images_a_step: the batch size.
            flops_an_image: of a training step, forward and backward.
            peak: FLOP/s of all devices together; None where it is not known.
            seconds: of training before this process.
        """
        self._images, self._flops, self._peak = images_a_step, flops_an_image, peak
        self._before, self._passed, self._since = seconds, 0.0, None
        self._first_step = self._mark_step = None
        self._mark_seconds = 0.0

    def run(self, step: int) -> None:
        """Training goes on, at `step`."""
        self._since = time.monotonic()
        if self._first_step is None:
            self._first_step = self._mark_step = step

    def pause(self) -> None:
        """Training stands still."""
        self._passed, self._since = self._here(), None

    def _here(self) -> float:
        return self._passed + (time.monotonic() - self._since if self._since is not None else 0.0)

    def seconds(self) -> float:
        """Seconds of training, those before this process included."""
        return self._before + self._here()

    def speed(self, step: int, mark: bool) -> dict[str, float]:
        """`images_per_second` and, where the peak is known, `mfu`, since the last call with `mark`."""
        here = self._here()
        if step == self._mark_step:
            return {}
        rate = (step - self._mark_step) * self._images / max(here - self._mark_seconds, 1e-9)
        if mark:
            self._mark_step, self._mark_seconds = step, here
        return {"images_per_second": rate} | ({"mfu": rate * self._flops / self._peak} if self._peak else {})

    def go_back(self, step: int) -> None:
        """Training goes on from an earlier step; what it took to get here stays counted as time."""
        self._mark_step, self._mark_seconds = step, self._here()
        self._first_step = min(self._first_step, step)

    def left(self, step: int, steps: int) -> float:
        """Seconds that training will still take, at this process's speed so far."""
        return (steps - step) * self._here() / max(step - self._first_step, 1)
