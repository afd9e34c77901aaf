"""Recovery from non-finite losses and gradients: a rollback that skips batches, or a report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import atomic, optim, sharding
from vit_jax.checkpoint import integrity
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.data import order, pipeline
from vit_jax.errors import UserError
from vit_jax.optim import trainable
from vit_jax.sharding import multihost
from vit_jax.training import init_from, step
from vit_jax.training.setup import Experiment
from vit_jax.training.state import TrainState

REPORT = "not_finite.json"
MAX_ROLLBACKS = 3  # without a save in between, before the run fails


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

    def roll_back(self, state: TrainState) -> TrainState:
        """Returns the state of the newest checkpoint, to continue with the batches after the non-finite ones.

        `state`, that after the burst, must not be used afterwards.

        Raises:
            NonFinite: it has been called too often.
        """
        failed, next_batch = int(state.step), int(state.step) + int(state.skipped_batches)
        self.rollbacks += 1
        if self.rollbacks > MAX_ROLLBACKS:
            self._fail(state)
        jax.tree.map(lambda leaf: leaf.delete(), state)  # there may be no memory for two states
        if multihost.on_rank_0(lambda: bool(self._checkpoints.steps())):
            state = init_from.restore(self._experiment, self._checkpoints)
        else:
            state = init_from.initial_state(self._experiment, self._seed, self._say)
        back = int(state.step)
        counters = (jnp.int32(next_batch - back), jnp.int32(0))
        skipped, streak = jax.device_put(counters, sharding.replicated(self._experiment.mesh))
        self._say(
            f"warning: the loss or gradient was non-finite in {step.BURST} consecutive steps, up to step {failed:,}; "
            f"back to step {back:,}, skipping their batches"
        )
        return state.replace(skipped_batches=skipped, nonfinite_streak=streak)

    def _fail(self, state: TrainState) -> NoReturn:
        found = report(self._experiment, self._seed, state)
        path = self._workdir / REPORT
        if multihost.is_rank_0():
            atomic.write_json(path, found)
        raise NonFinite(
            f"the loss or gradient is not finite at step {found['step']:,}, after {MAX_ROLLBACKS} rollbacks: first in "
            f"{found['first']}, learning rate {found['learning_rate']:.3g}, gradient norm {found['gradient_norm']}\n"
            f"  the batch is recorded in {path}\n"
            "  lower config.optimizer.learning_rate, lengthen its warm-up, or set config.optimizer.gradient_clip"
        )


def report(experiment: Experiment, seed: int, state: TrainState) -> dict[str, Any]:
    """Returns a report on the last step before `state`, whose loss or gradient was not finite.

    Its keys are `step`, `learning_rate`, `loss`, `gradient_norm`, `first` (the first module with a non-finite output,
    or parameter with a non-finite gradient), and `batch`: the examples' indices in the training split.
    """
    config, source = experiment.config, experiment.sources["train"]
    index = int(state.step) + int(state.skipped_batches) - 1
    where = (config.train.batch_size, index, 1, 1, len(source), config.augment.repeats)
    (batch,) = pipeline.train_indices(seed, *where)
    labels = jax.tree.map(lambda kind: kind[batch], source.targets())
    augment_key, dropout_key = order.keys(seed, index)
    targets = experiment.objective.make_targets(labels, experiment.module)
    images = jnp.asarray(source.read(batch))
    inputs, targets = experiment.objective.make_views(experiment.augment, augment_key, images, targets)
    state = jax.device_get(state)
    gradients, metrics = jax.jit(lambda *arrays: step.accumulate(experiment, *arrays))(
        state, inputs, targets, dropout_key
    )
    names = integrity.not_finite(gradients)
    first = first_module(experiment, state, inputs, targets, dropout_key)
    first = first or (f"gradient of {names[0]}" if names else "nothing")
    norm = np.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(gradients)))
    return {
        "step": int(state.step),
        "learning_rate": optim.learning_rate(experiment.schedule, int(state.updates)),
        "loss": str(float(metrics["loss"])),
        "gradient_norm": str(float(norm)),
        "first": first,
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
