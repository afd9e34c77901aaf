"""The device mesh, how arrays are laid out on it, and the processes that share it."""

from vit_jax.sharding.mesh import check_batch, data_sharding, make_mesh, replicated
from vit_jax.sharding.rules import RULES, Rules, state_sharding

__all__ = ["RULES", "Rules", "check_batch", "data_sharding", "make_mesh", "replicated", "state_sharding"]
