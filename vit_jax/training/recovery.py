"""Recovery from non-finite losses and gradients: a rollback that skips batches, or a report."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import atomic, optim, sharding
from vit_jax.checkpoint import integrity
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.data import finite, order, pipeline
from vit_jax.errors import UserError, few
from vit_jax.optim import trainable
from vit_jax.sharding import multihost
from vit_jax.training import init_from, step
from vit_jax.training.setup import Experiment
from vit_jax.training.state import TrainState

REPORT = "not_finite.json"
MAX_ROLLBACKS = 3  # without a save in between, before the run fails
OTHER_RUN = "train again in another --workdir with a lower config.optimizer.learning_rate or a gradient_clip"


class NonFinite(UserError):
    """Losses or gradients stayed non-finite after several rollbacks."""


class Recovery:
    """Returns a run to its newest checkpoint after a burst of non-finite steps.

    Attributes:
        rollbacks: how often it has done so since the last save.
    """

    def __init__(
        self,
        experiment: Experiment,
        seed: int,
        checkpoints: CheckpointManager,
        workdir: Path,
        say: Callable[[str], Any],
    ):
        """For the run of one seed."""
        self.rollbacks = 0
        self._experiment, self._seed, self._checkpoints = experiment, seed, checkpoints
        self._workdir, self._say = workdir, say

    def roll_back(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state of the newest checkpoint and its metadata; without one, the state at the start and {}.

        Training continues with the batches after the non-finite ones.

        `state`, that after the burst, must not be used afterwards.

        Raises:
            NonFinite: it has been called too often.
        """
        failed, next_batch = int(state.step), int(state.step) + int(state.skipped_batches)
        streak = int(state.nonfinite_streak)
        self.rollbacks += 1
        if self.rollbacks > MAX_ROLLBACKS:
            self._fail(state)
        jax.tree.map(lambda leaf: leaf.delete(), state)  # there may be no memory for two states
        state, metadata = init_from.start(self._experiment, self._seed, self._checkpoints, self._say)
        back = int(state.step)
        counters = (jnp.int32(next_batch - back), jnp.int32(0))
        skipped, none = jax.device_put(counters, sharding.replicated(self._experiment.mesh))
        self._say(
            f"warning: the loss or gradient was non-finite in {streak} consecutive steps, up to step {failed:,}; "
            f"back to step {back:,}, skipping their batches"
        )
        return state.replace(skipped_batches=skipped, nonfinite_streak=none), metadata

    def _fail(self, state: TrainState) -> NoReturn:
        found = report(self._experiment, self._seed, state)
        tried = f", after {MAX_ROLLBACKS} rollbacks" if self.rollbacks > MAX_ROLLBACKS else ""
        self._report(
            found,
            f"the loss or gradient is not finite at step {found['step']:,}{tried}: first in "
            f"{few(found['examples']) or found['first']}, learning rate {found['learning_rate']:.3g}, "
            f"gradient norm {found['gradient_norm']}",
            f"the batch is recorded in {self._workdir / REPORT}\n  {advice(found)}",
        )

    def check_end(self, state: TrainState, results: Mapping[str, float]) -> None:
        """Checks that a run may end as finished; says how many steps had no update.

        Args:
            state: after the last step.
            results: metrics of the last evaluation of every split.

        Raises:
            NonFinite: as `check_steps`; or a result is not finite.
        """
        last, skipped = int(state.step), self.check_steps(state)
        wrong = [name for name, value in results.items() if not math.isfinite(value)]
        if wrong:
            names = integrity.not_finite(state.for_evaluation())
            self._report(
                {"step": last, "results": dict(results), "first": names[0] if names else "outputs"},
                f"{few(wrong)} is not finite after step {last:,}: {describe_parameters(names)}",
                OTHER_RUN,
            )
        if skipped:
            self._say(f"warning: {skipped:,} of {last:,} steps were skipped: their loss or gradient was not finite")

    def check_steps(self, state: TrainState) -> int:
        """Returns the number of steps without an update.

        Raises:
            NonFinite: these are the last steps, or most steps.
        """
        last, skipped = int(state.step), int(state.step) - int(state.updates)
        if int(state.nonfinite_streak):
            self._fail(state)
        if 2 * skipped > last:
            self._report(
                {"step": last, "skipped": skipped},
                f"{skipped:,} of {last:,} steps were skipped: their loss or gradient was not finite",
                OTHER_RUN,
            )
        return skipped

    def _report(self, content: dict[str, Any], message: str, way_out: str) -> NoReturn:
        if multihost.is_rank_0():
            atomic.write_json(self._workdir / REPORT, content)
        raise NonFinite(f"{message}\n  {way_out}")


def advice(found: Mapping[str, Any]) -> str:
    """Returns what to do about the cause in a `report`."""
    if found["first"] == "inputs":
        return "a NaN or an infinity in the input is not the learning rate's fault: repair or remove these examples"
    if not found["updates"]:
        return (
            "no update was made, so the learning rate is not the cause: set config.model.dtype=float32, or use other "
            "parameters in config.checkpoint.init_from"
        )
    return "lower config.optimizer.learning_rate, lengthen its warm-up, or set config.optimizer.gradient_clip"


def describe_parameters(names: list[str]) -> str:
    """Returns which parameters are not finite, or that all are finite."""
    if names:
        return f"the parameters {few(names)} are not finite"
    return "the parameters are finite, but the outputs of the model are not"


def report(experiment: Experiment, seed: int, state: TrainState) -> dict[str, Any]:
    """Returns a report on the last step before `state`, whose loss or gradient was not finite.

    Its keys are `step`, `updates`, `learning_rate`, `loss`, `gradient_norm`, `batch` (the examples' indices in the
    training split), `examples` (where those with a NaN or an infinity in their input are stored), and `first`: the
    first that is not finite of 'inputs', 'parameters/NAME', a module by its output, and 'gradient of NAME'.
    """
    config, source = experiment.config, experiment.sources["train"]
    index = int(state.step) + int(state.skipped_batches) - 1
    where = (config.train.batch_size, index, 1, 1, len(source), config.augment.repeats)
    (batch,) = pipeline.train_indices(seed, *where)
    labels = jax.tree.map(lambda kind: kind[batch], source.targets())
    augment_key, dropout_key = order.keys(seed, index)
    targets = experiment.objective.make_targets(labels, experiment.module)
    images = source.read(batch)
    examples = [source.describe(int(batch[row])) for row in finite.not_finite_rows(images)]
    inputs, targets = experiment.objective.make_views(experiment.augment, augment_key, jnp.asarray(images), targets)
    state = jax.device_get(state)
    gradients, metrics = jax.jit(lambda *arrays: step.accumulate(experiment, *arrays))(
        state, inputs, targets, dropout_key
    )
    names = integrity.not_finite(gradients)
    wrong = [] if examples else integrity.not_finite(state.parameters)
    first = f"parameters/{wrong[0]}" if wrong else first_module(experiment, state, inputs, targets, dropout_key)
    norm = np.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(gradients)))
    if first is None:  # the squares of finite gradients may overflow in float32, in which the step adds them up
        overflows = norm**2 > np.finfo(np.float32).max
        first = f"gradient of {names[0]}" if names else "the squared gradient norm" if overflows else "nothing"
    return {
        "step": int(state.step),
        "updates": int(state.updates),
        "learning_rate": optim.learning_rate(experiment.schedule, int(state.updates)),
        "loss": float(metrics["loss"]),
        "gradient_norm": float(norm),
        "first": first,
        "examples": examples,
        "batch": [int(index) for index in batch],
    }


def first_module(experiment: Experiment, state: TrainState, inputs: Any, targets: Any, key: jax.Array) -> str | None:
    """Returns the first module, in order of computation, with a non-finite output; 'inputs' for the inputs.

    Scanned and rematerialised blocks cannot be looked into; the module around them is then the first.
    """
    if not all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(inputs)):
        return "inputs"
    found: list[str] = []

    def is_array(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)

    def check(call: Any, arguments: tuple, keywords: dict, context: nn.module.InterceptorContext) -> Any:
        outputs = call(*arguments, **keywords)
        leaves = [leaf for leaf in jax.tree.leaves(outputs) if is_array(leaf)]
        if not found and not all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in leaves):
            found.append("/".join(context.module.path) or "logits")
        return outputs

    with nn.intercept_methods(check):
        train, key = not trainable.only_head(experiment.mask), jax.random.fold_in(key, 0)
        experiment.objective.loss_and_metrics(
            experiment.module, state.parameters, inputs, targets, key, train, state.objective
        )
    return found[0] if found else None
