"""Optimizers, learning-rate schedules, gradient clipping, layer-wise decay, trainable masks and parameter averaging."""

from vit_jax.optim.clipping import clip_by_global_norm, global_norm
from vit_jax.optim.registry import OPTIMIZERS, decay_mask, legacy_update_count, make
from vit_jax.optim.schedules import SCHEDULES, learning_rate, schedule, warmup_warning

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "clip_by_global_norm",
    "decay_mask",
    "global_norm",
    "learning_rate",
    "legacy_update_count",
    "make",
    "schedule",
    "warmup_warning",
]
