"""The loss, one update, and many updates in one dispatch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from vit_jax import objectives, sharding
from vit_jax.data import order, pipeline
from vit_jax.data.augment import AsTheyAre, Augment
from vit_jax.objectives import losses
from vit_jax.objectives.base import Objective
from vit_jax.objectives.classification import CLASSIFY
from vit_jax.optim import trainable
from vit_jax.optim.registry import global_norm, update_count
from vit_jax.runtime import hardware
from vit_jax.training.state import TrainState, empty_metrics

Gradients = Any
# So many bad steps in a row are a burst: the program makes no further one, and the host goes back to a checkpoint.
BURST = 5
named_input = jax.named_scope("input")  # how profiles tell it from the update


def make_update(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    augment: Augment | AsTheyAre,
    config: ConfigDict,
    mesh: Mesh,
    mask: Any | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled function (state, feed, count, seed) -> (state after `count` steps, metrics since the last record).

    The number of steps is an argument, not a constant: one program serves every dispatch, so where a run is cut into
    dispatches changes no bit of it. So is the seed, by default the config's: one program serves every seed.
    The state is donated; batches are spread over the mesh, all else is replicated.
    `mask` is True where a parameter is trained (see `freezing`); None for all of them.

    A step whose loss or gradient is not finite changes nothing but the counts. Behind a burst of such steps the
    program ends, and does nothing when it is called again.
    """
    objective = objectives.make(config)

    def step(state: TrainState, inputs: jax.Array, labels: Any, seed: int | Int[Array, ""]) -> TrainState:
        augment_key, dropout_key = order.keys(seed, state.step + state.shift)
        batch = named_input(augment)(augment_key, inputs, objective.targets(labels, model))
        chosen = trainable.select(state.parameters, mask)
        gradients, metrics = accumulate(
            model, state.parameters, *batch, dropout_key, config.train.accumulation, objective, mask
        )
        metrics["gradient_norm"] = global_norm(gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, chosen)
        chosen = optax.apply_updates(chosen, updates)
        # Sums begin anew behind each record, at steps that depend on the step alone.
        begins, zeros = state.step % config.log.every == 0, empty_metrics(objective.metrics)
        sums = jax.tree.map(lambda old, new: jnp.where(begins, new, old), state.metrics, zeros)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        metrics = {name: jnp.where(good, metric, 0.0) for name, metric in metrics.items()}
        metrics |= {"count": jnp.where(good, 1.0, 0.0), "skipped": jnp.where(good, 0.0, 1.0)}
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)  # noqa: E731
        return state.replace(
            step=state.step + 1,
            streak=jnp.where(good, 0, state.streak + 1),
            parameters=keep(trainable.merge(chosen, state.parameters), state.parameters),
            optimizer=keep(optimizer_state, state.optimizer),
            averaged=keep(average(state.averaged, chosen, state.step, config.optimizer.average_decay), state.averaged),
            metrics={name: sums[name] + metrics[name] for name in sums},
        )

    def update(
        state: TrainState, feed: pipeline.Feed, count: Int[Array, ""], seed: int | Int[Array, ""] = config.train.seed
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        first = state.step

        def body(state: TrainState) -> TrainState:
            return step(
                state, *named_input(pipeline.get_batch)(feed, state.step - first, sharding.data_sharding(mesh)), seed
            )

        def goes_on(state: TrainState) -> jax.Array:
            return (state.step - first < count) & (state.streak < BURST)

        state = jax.lax.while_loop(goes_on, body, state)
        return state, record(state)

    everywhere, options = sharding.replicated(mesh), hardware.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(update, donate_argnums=0, out_shardings=(everywhere, everywhere), compiler_options=options)


def record(state: TrainState) -> dict[str, jax.Array]:
    """What the host reads of a state: the metrics' sums, and the counts."""
    counts = {"step": state.step, "streak": state.streak, "updates": update_count(state.optimizer)}
    return {**state.metrics, **counts}


def accumulate(
    model: nn.Module,
    parameters: Any,
    inputs: Float[Array, "batch *example"],
    targets: losses.Logits,
    key: PRNGKeyArray,
    parts: int,
    objective: Objective | None = None,
    mask: Any | None = None,
) -> tuple[Gradients, dict[str, jax.Array]]:
    """The batch's mean gradient and metrics, summed over `parts` microbatches, each with its own dropout key.

    The gradient is that of the trained parameters (`mask`), with None for the others; nothing is computed for those.
    """
    objective = objective or CLASSIFY
    # What is never updated has no use for noise: heads learn from the features that they will see.
    train = not trainable.only_head(mask)

    def loss(chosen: Any, inputs: jax.Array, targets: losses.Logits, key: jax.Array) -> tuple[jax.Array, dict]:
        whole = trainable.merge(chosen, parameters)
        total, metrics = objective.loss_and_metrics(model, whole, inputs, targets, key, train)
        return total / parts, jax.tree.map(lambda metric: metric / parts, metrics)

    differentiate, chosen = jax.grad(loss, has_aux=True), trainable.select(parameters, mask)
    if parts == 1:
        return differentiate(chosen, inputs, targets, jax.random.fold_in(key, 0))

    def pick(part: jax.Array) -> Callable[[jax.Array], jax.Array]:
        # Every parts-th example, so that each device's share of a microbatch is already its own.
        split = lambda array: array.reshape(array.shape[0] // parts, parts, *array.shape[1:])  # noqa: E731
        return lambda array: jax.lax.dynamic_index_in_dim(split(array), part, 1, keepdims=False)

    def one(part: jax.Array) -> tuple[Gradients, dict]:
        here = jax.tree.map(pick(part), (inputs, targets))
        return differentiate(chosen, *here, jax.random.fold_in(key, part))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, 0))
    return jax.lax.fori_loop(0, parts, lambda part, sums: jax.tree.map(jnp.add, sums, one(part)), zeros)


def average(averaged: Any, chosen: Any, step: Int[Array, ""], decay: float) -> Any:
    """Polyak averaging (arXiv 2010.11929, appendix B.1.1): the decay grows from 0.1 to `decay`, as step allows.

    `chosen` are the parameters, with None for those that are frozen: their average is what they are.
    """
    if averaged is None:
        return None
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    one = lambda new, old: None if new is None else optax.incremental_update(new, old, 1 - decay)  # noqa: E731
    return trainable.merge(jax.tree.map(one, chosen, averaged, is_leaf=lambda leaf: leaf is None), averaged)
