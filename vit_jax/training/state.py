"""All that training carries from one step to the next, and all that a checkpoint holds."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax.optim import trainable


class TrainState(flax.struct.PyTreeNode):
    """The state after `step` updates.

    Attributes:
        step: int32, steps made so far.
        shift: int32, batches passed over behind bad numbers. Order, augmentation and dropout follow from the seed and
            `step + shift`, the place in the run's endless sequence of batches.
        streak: int32, steps in a row, up to now, whose update was left out for its bad numbers.
        parameters: of the model, float32.
        optimizer: optax's state.
        averaged: exponential average of the parameters, or None.
        metrics: by name, float32 sums over the steps since the last record, and their `count`; steps with bad numbers
            are not among them, but are counted as `skipped`; here, and not with the
            host, so that a resumed run writes the very records that the undisturbed one does.
    """

    # Any: transformations of JAX rebuild the state with shapes, shardings and placeholders in place of arrays.
    step: Any
    shift: Any
    streak: Any
    parameters: Any
    optimizer: Any
    averaged: Any
    metrics: Any

    def for_evaluation(self) -> Any:
        """The parameters to judge and to use: the averaged ones where there are any."""
        return self.parameters if self.averaged is None else self.averaged


def initialize(model: nn.Module, image_shape: tuple[int, int, int], seed: int) -> Any:
    """The model's parameters at random, for images of (height, width, channels)."""
    return model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)))["params"]


def create(
    parameters: Any,
    optimizer: optax.GradientTransformation,
    average: bool,
    metrics: Sequence[str],
    mask: Any | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
        parameters: to start from.
        optimizer: the chain.
        average: whether averaged parameters are kept.
        metrics: the names of what steps record.
        mask: True where a parameter is trained, None for all of them; the optimiser keeps nothing for the others.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        shift=jnp.zeros((), jnp.int32),
        streak=jnp.zeros((), jnp.int32),
        parameters=parameters,
        optimizer=optimizer.init(trainable.select(parameters, mask)),
        # A copy: two leaves of the state must not share a buffer that is then donated twice.
        averaged=jax.tree.map(jnp.copy, parameters) if average else None,
        metrics=empty_metrics(metrics),
    )


def empty_metrics(names: Sequence[str]) -> dict[str, jax.Array]:
    """Sums over no steps."""
    return {name: jnp.zeros((), jnp.float32) for name in (*names, "count", "skipped")}
