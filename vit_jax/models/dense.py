"""The dense layer behind every matrix product of the model: one door to its arithmetic."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


class Dense(nn.Module):
    """A linear layer over the last axis, computed as one two-dimensional product.

    All leading axes are joined before the product and restored after it: on CPU a three-dimensional operand costs a
    fifth to a quarter of the speed, and elsewhere it is the same product.

    Attributes:
        features: size of the last axis of the result.
        use_bias: whether a bias is added.
        dtype: arithmetic of the product; parameters are float32 whatever it is.
        product_dtype: bfloat16 for a product whose operands alone are rounded to it, on a CPU that has instructions for
            that: sums, result and all else are in `dtype` (see `rounded_product`). None: all is in `dtype`.
        kernel_init: initialiser of the kernel [inputs, features].
        bias_init: initialiser of the bias [features].
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer = nn.initializers.zeros
    product_dtype: Dtype | None = None

    @nn.compact
    def __call__(self, inputs: Float[Array, "*leading inputs"]) -> Float[Array, "*leading features"]:
        size = inputs.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (size, self.features), jnp.float32)
        rows = inputs.reshape(-1, size).astype(self.dtype)
        if self.product_dtype is None:
            outputs = jnp.dot(rows, kernel.astype(self.dtype))
        else:
            outputs = rounded_product(rows, kernel, self.product_dtype).astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            outputs = outputs + bias.astype(self.dtype)
        return outputs.reshape(*inputs.shape[:-1], self.features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded_product(
    rows: Float[Array, "rows inputs"], kernel: Float[Array, "inputs features"], dtype: Dtype
) -> Float[Array, "rows features"]:
    """A product of operands that are rounded to `dtype`, summed in float32; so are the two of its backward pass.

    XLA has fast bfloat16 products for CPUs, but finds them in a few forms alone, operands row by row in memory, and
    computes any other in float32 without a word. Here all three have such a form: the layouts are held fast, and the
    kernel's gradient is the product of transposed rows.
    """
    return _rounded_product(rows, kernel, dtype)[0]


def _rounded_product(rows: jax.Array, kernel: jax.Array, dtype: Dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rows, kernel = _row_by_row(rows.astype(dtype)), _row_by_row(kernel.astype(dtype))
    return _row_by_row(jnp.dot(rows, kernel, preferred_element_type=jnp.float32)), (rows, kernel)


def _rounded_product_backward(dtype: Dtype, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    rows, kernel = kept
    gradient = _row_by_row(gradient.astype(dtype))
    columns = _row_by_row(rows.T)
    of_rows = jax.lax.dot_general(gradient, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    of_kernel = jnp.dot(columns, gradient, preferred_element_type=jnp.float32)
    return _row_by_row(of_rows), _row_by_row(of_kernel)


rounded_product.defvjp(_rounded_product, _rounded_product_backward)


def _row_by_row(matrix: jax.Array) -> jax.Array:
    return with_layout_constraint(matrix, Layout(major_to_minor=(0, 1)))


def stacked(initializer: Initializer, parts: int) -> Initializer:
    """An initialiser for `parts` kernels side by side, each drawn as if it stood alone (its own fan-in and fan-out)."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        one = (*shape[:-1], shape[-1] // parts)
        return jnp.concatenate([initializer(k, one, dtype) for k in jax.random.split(key, parts)], axis=-1)

    return initialize
