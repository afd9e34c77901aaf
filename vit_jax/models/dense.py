"""The dense layer behind every matrix product of the model: one door to its arithmetic."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float


class Dense(nn.Module):
    """A linear layer over the last axis, computed as one two-dimensional product.

    All leading axes are joined before the product and restored after it: on CPU a three-dimensional operand costs a
    fifth to a quarter of the speed, and elsewhere it is the same product.

    Attributes:
        features: size of the last axis of the result.
        use_bias: whether a bias is added.
        dtype: arithmetic of the product; parameters are float32 whatever it is.
        kernel_init: initialiser of the kernel [inputs, features].
        bias_init: initialiser of the bias [features].
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, inputs: Float[Array, "*leading inputs"]) -> Float[Array, "*leading features"]:
        size = inputs.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (size, self.features), jnp.float32)
        outputs = jnp.dot(inputs.reshape(-1, size).astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            outputs = outputs + bias.astype(self.dtype)
        return outputs.reshape(*inputs.shape[:-1], self.features)


def stacked(initializer: Initializer, parts: int) -> Initializer:
    """An initialiser for `parts` kernels side by side, each drawn as if it stood alone (its own fan-in and fan-out)."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        one = (*shape[:-1], shape[-1] // parts)
        return jnp.concatenate([initializer(k, one, dtype) for k in jax.random.split(key, parts)], axis=-1)

    return initialize
