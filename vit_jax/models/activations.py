"""GELU in three forms, whose backward pass keeps only the inputs."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FORMS = ("tanh", "exact", "quick")
QUICK = 1.702  # arXiv 1606.08415, section 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(inputs: Float[Array, "*shape"], form: str = "tanh") -> Float[Array, "*shape"]:
    """The inputs times the standard normal distribution function of the inputs (arXiv 1606.08415).

    The backward pass keeps only the inputs and recomputes the rest in float32. On NVIDIA GPUs XLA recognises the
    forward pass, with form 'tanh' and in the inputs' dtype, as an epilogue of the preceding matmul.

    Args:
        inputs: array of any shape.
        form: 'tanh', the approximation in the published code; 'exact', with the error function; or 'quick', with
            sigmoid(1.702 x) as the distribution function, as in CLIP (arXiv 2103.00020's code).

    Raises:
        ValueError: `form` is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: one of {', '.join(FORMS)}")
    if form == "quick":
        return inputs * jax.nn.sigmoid(QUICK * inputs)
    return jax.nn.gelu(inputs, approximate=form == "tanh")


def _gelu(inputs: jax.Array, form: str) -> tuple[jax.Array, jax.Array]:
    return gelu(inputs, form), inputs


def _gelu_backward(form: str, inputs: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # Without the barrier XLA merges this with the forward pass and keeps float32 copies for both.
    inputs = jax.lax.optimization_barrier(inputs)
    values = inputs.astype(jnp.float32)
    if form == "tanh":
        factor = math.sqrt(2 / math.pi)
        tanh = jnp.tanh(factor * (values + 0.044715 * values**3))
        slope = 0.5 * (1 + tanh) + 0.5 * values * (1 - tanh**2) * factor * (1 + 3 * 0.044715 * values**2)
    elif form == "quick":
        sigmoid = jax.nn.sigmoid(QUICK * values)
        slope = sigmoid * (1 + QUICK * values * (1 - sigmoid))
    else:
        density = jnp.exp(-0.5 * values**2) / math.sqrt(2 * math.pi)
        slope = 0.5 * jax.scipy.special.erfc(-values / math.sqrt(2)) + values * density
    return ((gradient.astype(jnp.float32) * slope).astype(inputs.dtype),)


gelu.defvjp(_gelu, _gelu_backward)
