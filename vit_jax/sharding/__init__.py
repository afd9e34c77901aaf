"""The device mesh, how arrays are laid out on it, and the processes that share it."""

from vit_jax.sharding.mesh import check_batch, data_sharding, make_mesh, replicated

__all__ = ["check_batch", "data_sharding", "make_mesh", "replicated"]
