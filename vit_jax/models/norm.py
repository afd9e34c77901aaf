"""LayerNorm, RMSNorm and LayerScale."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float

EPSILON = 1e-6  # as in the published code; some checkpoints of other projects were trained with 1e-12


class LayerNorm(nn.Module):
    """Layer normalization over the last axis, with statistics in float32.

    Attributes:
        dtype: dtype of the result.
        epsilon: added to the variance.
    """

    dtype: Dtype = jnp.float32
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, tokens: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        width = tokens.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        return layer_norm(tokens, scale, bias, self.epsilon, self.dtype)


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, and a scale (arXiv 1910.07467), in float32.

    Attributes:
        dtype: dtype of the result.
        epsilon: added to the mean square.
    """

    dtype: Dtype = jnp.float32
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, tokens: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        scale = self.param("scale", nn.initializers.ones, (tokens.shape[-1],), jnp.float32)
        values = tokens.astype(jnp.float32)
        square = jnp.square(values).mean(axis=-1, keepdims=True)
        return (values * jax.lax.rsqrt(square + self.epsilon) * scale).astype(self.dtype)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    inputs: Float[Array, "*leading width"],
    scale: Float[Array | np.ndarray, " width"],
    bias: Float[Array | np.ndarray, " width"],
    epsilon: float,
    dtype: Dtype,
) -> Float[Array, "*leading width"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, computed in float32, cast to `dtype`.

    The backward pass keeps the inputs in their own dtype and two float32 numbers per row, and recomputes the rest.
    JAX's automatic derivative would write float32 arrays of the inputs' shape to memory.
    """
    return _layer_norm(inputs, scale, bias, epsilon, dtype)[0]


def _layer_norm(
    inputs: jax.Array, scale: ArrayLike, bias: ArrayLike, epsilon: float, dtype: Dtype
) -> tuple[jax.Array, tuple]:
    values = inputs.astype(jnp.float32)
    mean = values.mean(axis=-1, keepdims=True)
    # One pass over the inputs for both moments; rounding may make the difference slightly negative.
    variance = jnp.maximum(jnp.square(values).mean(axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    outputs = (values - mean) * (inverse * scale) + bias
    return outputs.astype(dtype), (inputs, mean, inverse, scale)


def _layer_norm_backward(
    epsilon: float, dtype: Dtype, kept: tuple, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs, mean, inverse, scale = kept
    gradient = gradient.astype(jnp.float32)
    normed = (inputs.astype(jnp.float32) - mean) * inverse
    scaled = gradient * scale
    of_scale, of_bias = _sum_rows(gradient * normed), _sum_rows(gradient)
    along = (scaled * normed).mean(axis=-1, keepdims=True)
    of_inputs = (scaled - scaled.mean(axis=-1, keepdims=True) - normed * along) * inverse
    return of_inputs.astype(inputs.dtype), of_scale, of_bias


def _sum_rows(values: jax.Array) -> jax.Array:
    return values.reshape(-1, values.shape[-1]).sum(0)


layer_norm.defvjp(_layer_norm, _layer_norm_backward)


class LayerScale(nn.Module):
    """A learned factor per channel of a residual branch (arXiv 2103.17239, section 3).

    Attributes:
        initial: initial value of all factors; usually small.
    """

    initial: float

    @nn.compact
    def __call__(self, branch: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        scale = self.param("scale", nn.initializers.constant(self.initial), (branch.shape[-1],), jnp.float32)
        return branch * scale.astype(branch.dtype)
