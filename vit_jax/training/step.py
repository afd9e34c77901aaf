"""The loss, one update, and many updates in one dispatch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from vit_jax.data import pipeline
from vit_jax.data.augment import Augment
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import parallel
from vit_jax.training.state import TrainState, empty_metrics

Gradients = Any


def cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Softmax cross-entropy of each example against class probabilities, in float32."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def make_update(
    model: VisionTransformer, optimizer: optax.GradientTransformation, augment: Augment, config: ConfigDict, mesh: Mesh
) -> Callable[[TrainState, pipeline.Feed, np.ndarray], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled function (state, feed, count) -> (state after `count` steps, metrics since the last record).

    The number of steps is an argument, not a constant: one program serves every dispatch, so where a run is cut into
    dispatches changes no bit of it. The state is donated; batches are spread over the mesh, all else is replicated.
    """
    run_key = jax.random.key(config.train.seed)

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(run_key, state.step))
        targets = jax.nn.one_hot(labels, model.classes)
        batch = augment(augment_key, images, optax.smooth_labels(targets, config.train.label_smoothing))
        parts = config.train.accumulation
        gradients, metrics = accumulate(model, state.parameters, *batch, dropout_key, parts)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        # Sums begin anew behind each record, at steps that depend on the step alone.
        begins = state.step % config.log.every == 0
        sums = jax.tree.map(lambda old, new: jnp.where(begins, new, old), state.metrics, empty_metrics())
        metrics["count"] = jnp.ones(())
        return TrainState(
            step=state.step + 1,
            parameters=parameters,
            optimizer=optimizer_state,
            averaged=average(state.averaged, parameters, state.step, config.optimizer.average_decay),
            metrics={name: sums[name] + metrics[name] for name in sums},
        )

    def update(
        state: TrainState, feed: pipeline.Feed, count: Int[Array, ""]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def body(position: jax.Array, state: TrainState) -> TrainState:
            return step(state, *pipeline.take(feed, position, parallel.spread(mesh)))

        state = jax.lax.fori_loop(0, count, body, state)
        return state, state.metrics

    everywhere = parallel.replicated(mesh)
    return jax.jit(update, donate_argnums=0, out_shardings=(everywhere, everywhere))


def accumulate(
    model: VisionTransformer,
    parameters: Any,
    inputs: Float[Array, "batch ..."],
    targets: Float[Array, "batch classes"],
    key: PRNGKeyArray,
    parts: int,
) -> tuple[Gradients, dict[str, jax.Array]]:
    """The batch's mean gradient, loss and accuracy, summed over `parts` microbatches, each with its own dropout key."""

    def loss(parameters: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
        logits = model.apply({"params": parameters}, inputs, train=True, rngs={"dropout": key})
        mean = cross_entropy(logits, targets).mean()
        return mean / parts, {"loss": mean / parts, "accuracy": accuracy(logits, targets) / parts}

    differentiate = jax.grad(loss, has_aux=True)
    if parts == 1:
        return differentiate(parameters, inputs, targets, jax.random.fold_in(key, 0))

    def split(array: jax.Array) -> jax.Array:
        # Every parts-th example, so that each device's share of a microbatch is already its own.
        return array.reshape(array.shape[0] // parts, parts, *array.shape[1:])

    def one(part: jax.Array) -> tuple[Gradients, dict]:
        here = [jax.lax.dynamic_index_in_dim(split(array), part, 1, keepdims=False) for array in (inputs, targets)]
        return differentiate(parameters, *here, jax.random.fold_in(key, part))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, 0))
    return jax.lax.fori_loop(0, parts, lambda part, sums: jax.tree.map(jnp.add, sums, one(part)), zeros)


def accuracy(logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]) -> Float[Array, ""]:
    """Share of examples whose largest logit stands where their largest target does."""
    return (logits.argmax(axis=-1) == targets.argmax(axis=-1)).astype(jnp.float32).mean()


def average(averaged: Any, parameters: Any, step: Int[Array, ""], decay: float) -> Any:
    """Polyak averaging (arXiv 2010.11929, appendix B.1.1): the decay grows from 0.1 to `decay`, as step allows."""
    if averaged is None:
        return None
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(parameters, averaged, 1 - decay)
