"""The training step: loss, gradient, update; and many steps in one jitted call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from vit_jax import optim, sharding
from vit_jax.data import order, pipeline
from vit_jax.optim import ema, trainable
from vit_jax.runtime import hardware
from vit_jax.training.setup import Experiment
from vit_jax.training.state import TrainState

# After this many non-finite steps in a row the jitted call ends early and the host returns to a checkpoint.
BURST = 5
named_input = jax.named_scope("input")  # separates the input from the update in profiles


def make_update(experiment: Experiment) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted function (state, feed, count, seed) -> (state after `count` steps, `readout` of that state).

    The number of steps and the seed are arguments, not constants: one compiled program serves every chunk and every
    seed, and where a run is cut into chunks changes no bit of it. The state is donated; batches are sharded over the
    mesh.

    A step whose loss or gradient is not finite changes nothing but the counters. After a burst of such steps the call
    ends early, and further calls do nothing.
    """
    mesh = experiment.mesh

    def update(
        state: TrainState, feed: pipeline.Feed, count: Int[Array, ""], seed: int | Int[Array, ""]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        first = state.step

        def body(state: TrainState) -> TrainState:
            batch = named_input(pipeline.get_batch)(feed, state.step - first, sharding.data_sharding(mesh))
            return train_step(experiment, state, *batch, seed)

        def has_next(state: TrainState) -> jax.Array:
            return (state.step - first < count) & (state.nonfinite_streak < BURST)

        state = jax.lax.while_loop(has_next, body, state)
        return state, readout(state)

    shardings = (experiment.state_sharding(), sharding.replicated(mesh))
    return hardware.jit_on(mesh, update, out_shardings=shardings, donate_argnums=0)


def train_step(
    experiment: Experiment, state: TrainState, inputs: jax.Array, labels: Any, seed: int | Int[Array, ""]
) -> TrainState:
    """Returns the state after one step on uint8 images (or stored features) and their labels."""
    objective, config = experiment.objective, experiment.config
    augment_key, dropout_key = order.keys(seed, state.step + state.skipped_batches)
    targets = objective.make_targets(labels, experiment.module)
    batch = named_input(objective.make_views)(experiment.augment, augment_key, inputs, targets)
    gradients, metrics = accumulate(experiment, state, *batch, dropout_key)
    metrics["gradient_norm"] = optim.global_norm(gradients)
    trained = trainable.select(state.parameters, experiment.mask)
    updates, optimizer_state = experiment.optimizer.update(gradients, state.optimizer, trained)
    trained = optax.apply_updates(trained, updates)
    parameters = trainable.merge(trained, state.parameters)
    averaged = ema.update(state.averaged, trained, state.step, config.optimizer.average_decay)
    extra = objective.after_update(state.objective, parameters, metrics, state.step)

    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    # Sums start again after each log step; which steps those are depends on the step alone.
    restart = state.step % config.log.every == 0
    sums = jax.tree.map(lambda old: jnp.where(restart, 0.0, old), state.metrics)
    values = {name: jnp.where(finite, metrics[name], 0.0) for name in objective.metrics}
    values |= {"count": jnp.where(finite, 1.0, 0.0), "skipped": jnp.where(finite, 0.0, 1.0)}
    return state.replace(
        step=state.step + 1,
        nonfinite_streak=jnp.where(finite, 0, state.nonfinite_streak + 1),
        updates=state.updates + jnp.where(finite, 1, 0),
        parameters=keep(parameters, state.parameters),
        optimizer=keep(optimizer_state, state.optimizer),
        averaged=keep(averaged, state.averaged),
        objective=keep(extra, state.objective),
        metrics={name: sums[name] + values[name] for name in sums},
    )


def readout(state: TrainState) -> dict[str, jax.Array]:
    """Returns the part of a state that the host reads: sums of metrics since the last log step, and counters."""
    counters = {"step": state.step, "nonfinite_streak": state.nonfinite_streak, "updates": state.updates}
    return {**state.metrics, **counters}


def accumulate(
    experiment: Experiment, state: TrainState, inputs: Any, targets: Any, key: PRNGKeyArray
) -> tuple[Any, dict[str, jax.Array]]:
    """Returns the batch's mean gradient and metrics, summed over the microbatches, each with its own dropout key.

    The gradient is that of the trained parameters, with None for the frozen ones, for which nothing is computed.

    Args:
        experiment: says the objective, the number of microbatches and the trainable parameters.
        state: its parameters and the objective's extra state.
        inputs: float [batch, ...], or a tuple of such arrays, one per view.
        targets: of `Objective.make_targets`, augmented.
        key: for dropout and for what the objective draws.
    """
    objective, microbatches = experiment.objective, experiment.config.train.accumulation
    # Dropout in a frozen backbone would only add noise to the features that the head learns from.
    train = not trainable.only_head(experiment.mask)

    def loss(trained: Any, inputs: Any, targets: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        parameters = trainable.merge(trained, state.parameters)
        total, metrics = objective.loss_and_metrics(
            experiment.module, parameters, inputs, targets, key, train, state.objective
        )
        return total / microbatches, jax.tree.map(lambda metric: metric / microbatches, metrics)

    gradient, trained = jax.grad(loss, has_aux=True), trainable.select(state.parameters, experiment.mask)
    if microbatches == 1:
        return gradient(trained, inputs, targets, jax.random.fold_in(key, 0))

    def microbatch(index: jax.Array, array: jax.Array) -> jax.Array:
        # Every n-th example, so that each device already holds its share of a microbatch.
        split = array.reshape(array.shape[0] // microbatches, microbatches, *array.shape[1:])
        return jax.lax.dynamic_index_in_dim(split, index, 1, keepdims=False)

    def gradient_of(index: jax.Array) -> tuple[Any, dict]:
        part = jax.tree.map(lambda array: microbatch(index, array), (inputs, targets))
        return gradient(trained, *part, jax.random.fold_in(key, index))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient_of, 0))
    return jax.lax.fori_loop(
        0, microbatches, lambda index, sums: jax.tree.map(jnp.add, sums, gradient_of(index)), zeros
    )
