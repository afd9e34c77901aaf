"""What every seed of a run shares: its data on the devices, and the programs compiled for them."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax import sharding
from vit_jax.data.pipeline import Feed
from vit_jax.evaluation import exact
from vit_jax.runtime import hardware
from vit_jax.training.setup import Run
from vit_jax.training.state import TrainState
from vit_jax.training.step import make_update

SENT_STEPS = 4  # that a dispatch has at most, on a CPU, of a set that is sent


class Program:
    """Data and compiled functions of a run; none of it depends on the seed.

    Attributes:
        run: its parts.
        feeds: by role, as `run.sources`.
        overlaps: whether the devices compute while the host does something else. A CPU is host and device in one.
        rows: how many steps a dispatch has room for.
        scorer: see `evaluate.make_scorer`.
    """

    def __init__(self, run: Run):
        """Brings the data to the devices; nothing is compiled yet."""
        self.run = run
        self.feeds = {role: run.feeds(role) for role in run.sources}
        self.overlaps = run.mesh.devices.flat[0].platform != "cpu"
        self.rows = self._rows()
        self.scorer = exact.make_scorer(run.applied, run.augment, run.mesh, run.objective)
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def _rows(self) -> int:
        train, feeds = self.run.config.train, self.feeds["train"]
        rows = feeds.rows(train.batch_size, train.steps_per_dispatch)
        # What is sent is cut before it is known how long a step takes, which on a CPU may be long.
        return rows if feeds.resident is not None or self.overlaps else min(rows, SENT_STEPS)

    def compile(self, say: Callable[[str], None], seeds: int | None = None) -> jax.stages.Compiled:
        """The update (state, feed, count, seed) -> (state, sums) of `step.make_update`, compiled once.

        With a number of `seeds`, that of so many at once: each argument is then a tuple with one for each.
        """
        if seeds not in self._compiled:
            began = time.monotonic()
            say("compiling the training step ..." if seeds is None else f"compiling the step of {seeds} seeds ...")
            self._compiled[seeds] = self._lower(seeds).compile()
            say(f"compiled in {time.monotonic() - began:.1f} s")
        return self._compiled[seeds]

    def _lower(self, seeds: int | None) -> jax.stages.Lowered:
        run = self.run
        update = make_update(run.applied, run.optimizer, run.augment, run.config, run.mesh, run.mask)
        feed = self.feeds["train"].abstract_feed(self.rows, run.config.train.batch_size)
        one = (run.abstract_state(), feed, np.int32(0), np.int32(0))
        if seeds is None:
            return update.lower(*one)
        return make_update_of_seeds(update, run.mesh).lower(*((argument,) * seeds for argument in one))


def make_update_of_seeds(update: Callable, mesh: Mesh) -> Callable[..., tuple[tuple[TrainState, dict], ...]]:
    """The compiled function (states, feeds, counts, seeds) -> one (state, sums) for each; each argument is a tuple.

    It is `update` of `step.make_update`, vectorised: the seeds' arrays lie side by side in one program, and each has
    its own count, so that they need stand neither at the same step nor make equally many. The states are donated.
    """

    def together(
        states: tuple[TrainState, ...], feeds: tuple[Feed, ...], counts: tuple, seeds: tuple
    ) -> tuple[tuple[TrainState, dict[str, Any]], ...]:
        feed, axes = _stack_feeds(feeds)
        # Unwrapped: a compiled function within another one may not have options of the compiler.
        vectorised = jax.vmap(update.__wrapped__, in_axes=(0, axes, 0, 0))
        ends = vectorised(_stack(states), feed, jnp.stack(counts), jnp.stack(seeds))
        return tuple(jax.tree.map(lambda leaf, place=place: leaf[place], ends) for place in range(len(states)))

    everywhere, options = sharding.replicated(mesh), hardware.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(together, donate_argnums=0, out_shardings=everywhere, compiler_options=options)


def _stack(trees: tuple[Any, ...]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _stack_feeds(feeds: tuple[Feed, ...]) -> tuple[Feed, Feed]:
    """The feeds as one, and along which axes it is mapped over: a resident set is the same for all seeds."""
    if feeds[0].indices is None:
        return _stack(feeds), Feed(0, 0, None)
    indices = jnp.stack([feed.indices for feed in feeds])
    return Feed(feeds[0].images, feeds[0].labels, indices), Feed(None, None, 0)
