"""How a run is cut into chunks of training steps, one jitted call each, and what happens at the end of each chunk.

Pure functions of the config and the step: no bit of a run depends on how it is cut.
"""

from collections.abc import Container, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_jax.runtime import profiling

CHUNK_SECONDS = 0.4  # target duration of a chunk, so that a run stops soon after a stop request


class Chunk(NamedTuple):
    """The training steps start .. end - 1, and what is due after them."""

    start: int
    end: int
    logs: bool
    evaluates: bool
    saves: bool

    @property
    def count(self) -> int:
        """Number of steps."""
        return self.end - self.start

    @property
    def waits(self) -> bool:
        """Whether the devices wait for the host after it."""
        return self.evaluates or self.saves


class ChunkLength:
    """The maximum number of steps per chunk, adapted while training so that a chunk takes `CHUNK_SECONDS`."""

    def __init__(self, maximum: int, adaptive: bool):
        """Starts at 1; stays at `maximum` if not `adaptive`."""
        self.steps, self._maximum, self._adaptive = 1 if adaptive else maximum, maximum, adaptive

    def adapt(self, steps: int, seconds: float) -> None:
        """Records that a chunk of `steps` steps took `seconds`; at most doubles the length."""
        if self._adaptive:
            fitting = int(CHUNK_SECONDS * steps / max(seconds, 1e-6))
            self.steps = max(1, min(2 * self.steps, fitting, self._maximum))


def chunks(start: int, num_steps: int, length: ChunkLength, config: ConfigDict) -> Iterator[Chunk]:
    """Yields the chunks from step `start` to the end of the run; the maximum length of each is the current `length`."""
    while start < num_steps:
        end = next_boundary(start, num_steps, length.steps, config)
        yield chunk(start, end, num_steps, config)
        start = end


def next_boundary(start: int, num_steps: int, max_steps: int, config: ConfigDict) -> int:
    """Returns the next step to log, evaluate, save or profile at; at most `max_steps` after `start`."""
    intervals = (
        config.train.steps_per_dispatch,
        config.train.evaluate_every,
        config.log.every,
        config.checkpoint.every,
    )
    multiples = [(start // every + 1) * every for every in intervals if every]
    profiled = [step for step in profiling.boundaries(config.log.profile) if step > start]
    return min(num_steps, start + max_steps, *multiples, *profiled)


def chunk(start: int, end: int, num_steps: int, config: ConfigDict) -> Chunk:
    """Returns the chunk from `start` to `end` of a run of `num_steps` steps."""

    def is_due(every: int) -> bool:
        return end == num_steps or bool(every and end % every == 0)

    intervals = (config.log.every, config.train.evaluate_every, config.checkpoint.every)
    return Chunk(start, end, *map(is_due, intervals))


def evaluated(roles: Container[str], at_end: bool) -> list[str]:
    """Returns the splits to evaluate: 'validation' if there is one, and the test split at the end.

    Without a validation split the test split is evaluated during training as well; nothing is chosen by it.
    """
    present = [role for role in ("validation", "test") if role in roles]
    return present if at_end else present[:1]
