"""The dense layer that all models use, and its compute dtypes."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class Dense(nn.Module):
    """A linear layer over the last axis, computed as one two-dimensional matmul.

    All leading axes are flattened before the matmul and restored after it: on CPU a three-dimensional operand is 20 to
    25 % slower, and elsewhere it makes no difference.

    Attributes:
        features: size of the last axis of the result.
        use_bias: whether a bias is added.
        dtype: compute dtype; parameters are always float32.
        matmul_dtype: dtype to which only the operands of the matmul are rounded, for CPUs with bfloat16 instructions:
            sums, result and everything else are in `dtype` (see `rounded_matmul`). None: `dtype` throughout.
        kernel_init: initializer of the kernel [inputs, features].
        bias_init: initializer of the bias [features].
        parts: if more than 1, the result is a tuple of this many arrays of equal width, each the matmul with a slice
            of the kernel: splitting one result would copy it.
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
                outputs = rounded_matmul(rows, kernel, self.matmul_dtype).astype(self.dtype)
            if bias is not None:
                outputs = outputs + bias.astype(self.dtype)
            return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1])

        if self.parts == 1:
            return project(rows, kernel, bias)
        kernels = jnp.split(kernel, self.parts, axis=1)
        biases = [None] * self.parts if bias is None else jnp.split(bias, self.parts)
        return tuple(map(project, _repeat(rows, self.parts), kernels, biases))

    @nn.nowrap
    def matmul_flops(self, shape: tuple[int, ...]) -> int:
        """FLOPs of the matmul for inputs of this shape."""
        return 2 * math.prod(shape) * self.features


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeat(rows: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """The same array `count` times, for as many matmuls.

    Without the barrier XLA merges small matmuls into one and copies its parts. Gradients are added in the order in
    which XLA can accumulate each sum in the next matmul.
    """
    return jax.lax.optimization_barrier((rows,) * count)


def _repeat_forward(rows: jax.Array, count: int) -> tuple[tuple[jax.Array, ...], None]:
    return _repeat(rows, count), None


def _repeat_backward(count: int, kept: None, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    return (functools.reduce(lambda total, term: term + total, gradients),)


_repeat.defvjp(_repeat_forward, _repeat_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded_matmul(
    rows: Float[Array, "rows inputs"], kernel: Float[Array, "inputs features"], dtype: Dtype
) -> Float[Array, "rows features"]:
    """A matmul whose operands are rounded to `dtype` and whose sums are float32; so are the two of its backward pass.

    XLA has fast bfloat16 matmuls for CPUs but uses them only for a few forms, with row-major operands, and silently
    computes all others in float32. All three matmuls here have such a form: layouts are constrained, and the kernel's
    gradient is a matmul with transposed rows.
    """
    return _rounded_matmul(rows, kernel, dtype)[0]


def _rounded_matmul(rows: jax.Array, kernel: jax.Array, dtype: Dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rows, kernel = _row_major(rows.astype(dtype)), _row_major(kernel.astype(dtype))
    return _row_major(jnp.dot(rows, kernel, preferred_element_type=jnp.float32)), (rows, kernel)


def _rounded_matmul_backward(dtype: Dtype, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    rows, kernel = kept
    gradient = _row_major(gradient.astype(dtype))
    columns = _row_major(rows.T)
    of_rows = jax.lax.dot_general(gradient, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    of_kernel = jnp.dot(columns, gradient, preferred_element_type=jnp.float32)
    return _row_major(of_rows), _row_major(of_kernel)


rounded_matmul.defvjp(_rounded_matmul, _rounded_matmul_backward)


def _row_major(matrix: jax.Array) -> jax.Array:
    return with_layout_constraint(matrix, Layout(major_to_minor=(0, 1)))


def stacked(initializer: Initializer, parts: int) -> Initializer:
    """An initializer for `parts` concatenated kernels, each drawn with its own fan-in and fan-out."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        one = (*shape[:-1], shape[-1] // parts)
        return jnp.concatenate([initializer(k, one, dtype) for k in jax.random.split(key, parts)], axis=-1)

    return initialize
