"""The dense layer of all models, with its compute dtypes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class Dense(nn.Module):
    """A linear layer over the last axis, computed as one two-dimensional matmul.

    All leading axes are joined before the matmul and restored after it: on CPU a three-dimensional operand costs a
    fifth to a quarter of the speed, and elsewhere it is the same matmul.

    Attributes:
        features: size of the last axis of the result.
        use_bias: whether a bias is added.
        dtype: compute dtype of the matmul; parameters are float32 whatever it is.
        matmul_dtype: bfloat16 for a matmul whose operands alone are rounded to it, on a CPU that has instructions for
            that: sums, result and all else are in `dtype` (see `rounded_product`). None: all is in `dtype`.
        kernel_init: initializer of the kernel [inputs, features].
        bias_init: initializer of the bias [features].
        parts: the features come out as a tuple of so many arrays of equal width, each from its own matmul with a slice
            of the kernel: splitting one result would copy it. 1 for one array.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer = nn.initializers.zeros
    matmul_dtype: Dtype | None = None
    parts: int = 1

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*leading inputs"]
    ) -> Float[Array, "*leading features"] | tuple[Float[Array, "*leading part"], ...]:
        size = inputs.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (size, self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32) if self.use_bias else None
        rows = inputs.reshape(-1, size).astype(self.dtype)

        def project(rows: jax.Array, kernel: ArrayLike, bias: ArrayLike | None) -> jax.Array:
            if self.matmul_dtype is None:
                outputs = jnp.dot(rows, kernel.astype(self.dtype))
            else:
                outputs = rounded_product(rows, kernel, self.matmul_dtype).astype(self.dtype)
            if bias is not None:
                outputs = outputs + bias.astype(self.dtype)
            return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1])

        if self.parts == 1:
            return project(rows, kernel, bias)
        kernels = jnp.split(kernel, self.parts, axis=1)
        biases = [None] * self.parts if bias is None else jnp.split(bias, self.parts)
        return tuple(map(project, _repeat(rows, self.parts), kernels, biases))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeat(rows: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """The same array so many times, for as many matmuls.

    Without the barrier XLA computes small ones as one and copies its parts. Gradients are added in the order in which
    it accumulates each sum in the next matmul.
    """
    return jax.lax.optimization_barrier((rows,) * count)


_repeat.defvjp(
    lambda rows, count: (_repeat(rows, count), None),
    lambda count, kept, gradients: (functools.reduce(lambda total, term: term + total, gradients),),
)


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
    rows, kernel = _row_major(rows.astype(dtype)), _row_major(kernel.astype(dtype))
    return _row_major(jnp.dot(rows, kernel, preferred_element_type=jnp.float32)), (rows, kernel)


def _rounded_product_backward(dtype: Dtype, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    rows, kernel = kept
    gradient = _row_major(gradient.astype(dtype))
    columns = _row_major(rows.T)
    of_rows = jax.lax.dot_general(gradient, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    of_kernel = jnp.dot(columns, gradient, preferred_element_type=jnp.float32)
    return _row_major(of_rows), _row_major(of_kernel)


rounded_product.defvjp(_rounded_product, _rounded_product_backward)


def _row_major(matrix: jax.Array) -> jax.Array:
    return with_layout_constraint(matrix, Layout(major_to_minor=(0, 1)))


def stacked(initializer: Initializer, parts: int) -> Initializer:
    """An initializer for `parts` kernels side by side, each drawn as if it stood alone (its own fan-in and fan-out)."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        one = (*shape[:-1], shape[-1] // parts)
        return jnp.concatenate([initializer(k, one, dtype) for k in jax.random.split(key, parts)], axis=-1)

    return initialize
