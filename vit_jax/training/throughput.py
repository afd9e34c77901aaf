"""How fast a run is: images a second, model FLOPs utilisation, time left; pauses do not count."""

import time


class Clock:
    """Seconds of training. Runs that take their steps at once have one in common: the pauses of each are all's."""

    def __init__(self):
        """Starts paused, at 0."""
        self._passed, self._since = 0.0, None

    def run(self) -> None:
        """Goes on."""
        if self._since is None:
            self._since = time.monotonic()

    def pause(self) -> None:
        """Stands still."""
        self._passed, self._since = self.read(), None

    def read(self) -> float:
        """Seconds so far."""
        return self._passed + (time.monotonic() - self._since if self._since is not None else 0.0)


class Meter:
    """Counts the seconds of training, and from them the speed since the last record."""

    def __init__(
        self,
        images_per_step: int,
        flops_per_image: float,
        peak: float | None,
        seconds: float = 0.0,
        clock: Clock | None = None,
    ):
        """Starts paused.

        Args:
            images_per_step: the batch size.
            flops_per_image: of a training step, forward and backward.
            peak: FLOP/s of all devices together; None where it is not known.
            seconds: of training before this process.
            clock: that counts them from here on; None for one of its own.
        """
        self._images, self._flops, self._peak = images_per_step, flops_per_image, peak
        self._before, self._clock = seconds, clock or Clock()
        self._first_step = self._mark_step = None
        self._mark_seconds = 0.0

    def run(self, step: int) -> None:
        """Training goes on, at `step`."""
        self._clock.run()
        if self._first_step is None:
            self._first_step = self._mark_step = step

    def pause(self) -> None:
        """Training stands still."""
        self._clock.pause()

    def seconds(self) -> float:
        """Seconds of training, those before this process included."""
        return self._before + self._clock.read()

    def speed(self, step: int, mark: bool) -> dict[str, float]:
        """`images_per_second` and, where the peak is known, `mfu`, since the last call with `mark`."""
        here = self._clock.read()
        if step == self._mark_step:
            return {}
        rate = (step - self._mark_step) * self._images / max(here - self._mark_seconds, 1e-9)
        if mark:
            self._mark_step, self._mark_seconds = step, here
        return {"images_per_second": rate} | ({"mfu": rate * self._flops / self._peak} if self._peak else {})

    def go_back(self, step: int) -> None:
        """Training goes on from an earlier step; what it took to get here stays counted as time."""
        self._mark_step, self._mark_seconds = step, self._clock.read()
        self._first_step = min(self._first_step, step)

    def left(self, step: int, steps: int) -> float:
        """Seconds that training will still take, at this process's speed so far."""
        return (steps - step) * self._clock.read() / max(step - self._first_step, 1)
