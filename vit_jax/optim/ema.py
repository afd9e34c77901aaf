"""Exponential moving average of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from vit_jax.optim import trainable


def update(averaged: Any, trained: Any, step: Int[Array, ""], decay: float) -> Any:
    """Returns the average after one more update (Polyak averaging; arXiv 2010.11929, appendix B.1.1).

    The decay is min(decay, (1 + step) / (10 + step)): it grows from 0.1, so that the initial parameters are soon
    forgotten.

    Args:
        averaged: the average so far; None if none is kept, and then None is returned.
        trained: the parameters, with None for frozen ones, whose average does not change.
        step: number of updates before this one.
        decay: `config.optimizer.average_decay`.
    """
    if averaged is None:
        return None
    decay = jnp.minimum(decay, (1 + step) / (10 + step))

    def one(new: Any, old: Any) -> Any:
        return None if new is None else optax.incremental_update(new, old, 1 - decay)

    return trainable.merge(jax.tree.map(one, trained, averaged, is_leaf=lambda leaf: leaf is None), averaged)
