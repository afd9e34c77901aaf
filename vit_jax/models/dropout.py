"""Dropout and stochastic depth with a cheap counter-based random number generator."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def keep_mask(key: PRNGKeyArray, rate: float | Float[Array, ""], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """True with probability 1 - rate, independently for each element.

    An element's bits are MurmurHash3's finaliser (Appleby 2011) of its index, mixed with two words of the key: a third
    of the operations of Threefry, and good enough for masks. They depend only on the key and the index, and so not on
    how the array is sharded over devices.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    indices = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        indices += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    bits = (indices + words[0]) * jnp.uint32(0x9E3779B9)  # moves neighbours far apart before they are mixed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = (bits ^ (bits >> 16) ^ words[1]) * jnp.uint32(0x9E3779B1)
    if isinstance(rate, jax.Array):
        limit = (rate.astype(jnp.float32) * 2.0**32).astype(jnp.uint32)
    else:
        limit = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return (bits ^ (bits >> 15)) >= limit


class Dropout(nn.Module):
    """In training, sets a fraction of the values to zero and scales the others; uses the random stream 'dropout'.

    Attributes:
        rate: the fraction. An array if layers with different rates share one compiled block (`Encoder.scan`).
        shared_axes: axes along which values are dropped together. With all axes but the first this is stochastic depth:
            a residual branch is dropped for whole examples (arXiv 1603.09382).
    """

    rate: float | Float[Array, ""]
    shared_axes: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, values: Float[Array, "*shape"], train: bool = False) -> Float[Array, "*shape"]:
        if not train or (not isinstance(self.rate, jax.Array) and self.rate == 0):
            return values
        shape = tuple(1 if axis in self.shared_axes else size for axis, size in enumerate(values.shape))
        keep = keep_mask(self.make_rng("dropout"), self.rate, shape)
        return jnp.where(keep, values * jnp.asarray(1 / (1 - self.rate), values.dtype), jnp.zeros((), values.dtype))
