"""What a run learns: classification, or reconstruction of masked patches."""

from vit_jax.objectives.registry import OBJECTIVES, check, check_shape, make

__all__ = ["OBJECTIVES", "check", "check_shape", "make"]
