"""Optimizers, learning-rate schedules, weight decay, layer-wise decay, and which parameters are trained."""

from vit_jax.optim.registry import (
    clip_by_global_norm,
    global_norm,
    learning_rate,
    make,
    matrices,
    schedule,
    update_count,
)

__all__ = ["clip_by_global_norm", "global_norm", "learning_rate", "make", "matrices", "schedule", "update_count"]
