"""LayerNorm and GELU, whose backward passes recompute: gradients in float64, and what is kept for them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.activations import FORMS, gelu
from vit_jax.models.norm import LayerNorm, layer_norm

EPSILON = 1e-6
erf = np.vectorize(math.erf)


def draws(*shapes):
    generator = np.random.default_rng(0)
    return [generator.normal(1.0, 2.0, shape).astype(np.float32) for shape in shapes]


def both(function, direction, *arguments):
    """A function's value, and the gradients of its product with a direction."""

    def run(direction, *arguments):
        value, pull = jax.vjp(function, *arguments)
        return value, *pull(direction)

    return jax.jit(run)(direction, *arguments)


def norm_in_float64(x, scale, bias, direction):
    """The outputs, and the gradients of their product with the direction by the inputs, scale and bias."""
    x, scale, bias, direction = (np.float64(array) for array in (x, scale, bias, direction))
    std = np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    normed = (x - x.mean(-1, keepdims=True)) / std
    scaled = direction * scale
    of_x = scaled - scaled.mean(-1, keepdims=True) - normed * (scaled * normed).mean(-1, keepdims=True)
    rows = (0, 1)
    return normed * scale + bias, of_x / std, (direction * normed).sum(rows), direction.sum(rows)


def error(one, other):
    return np.linalg.norm(np.float64(one) - other) / np.linalg.norm(other)


def test_layer_norm_and_its_gradients_are_those_of_float64():
    x, scale, bias, direction = draws((3, 5, 48), (48,), (48,), (3, 5, 48))
    flax = nn.LayerNorm(epsilon=EPSILON)
    functions = {
        "ours": lambda x, scale, bias: layer_norm(x, scale, bias, EPSILON, jnp.float32),
        "flax": lambda x, scale, bias: flax.apply({"params": {"scale": scale, "bias": bias}}, x),
    }
    found, flaxs = (both(function, direction, x, scale, bias) for function in functions.values())
    wanted = norm_in_float64(x, scale, bias, direction)
    for one, theirs, other in zip(found, flaxs, wanted, strict=True):
        assert error(one, other) < 3e-7
        assert error(one, other) < 1.5 * error(theirs, other) + 1e-8  # no worse than what JAX derives by itself


def test_layer_norm_in_bfloat16_rounds_the_float32_result_once():
    x, scale, bias, direction = draws((3, 5, 48), (48,), (48,), (3, 5, 48))
    half = [jnp.asarray(array, jnp.bfloat16) for array in (x, direction)]
    found = both(lambda x: layer_norm(x, scale, bias, EPSILON, jnp.bfloat16), half[1], half[0])
    wanted = norm_in_float64(half[0], scale, bias, half[1])
    for one, other in zip(found, wanted, strict=False):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(one), other, rtol=2**-8, atol=1e-3)


def gelu_in_float64(x, form):
    """Values and derivatives."""
    x = np.float64(x)
    if form == "exact":
        share = 0.5 * (1 + erf(x / math.sqrt(2)))
        return x * share, share + x * np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    if form == "quick":
        share = 1 / (1 + np.exp(-1.702 * x))
        return x * share, share + 1.702 * x * share * (1 - share)
    factor = math.sqrt(2 / math.pi)
    tanh = np.tanh(factor * (x + 0.044715 * x**3))
    inner = factor * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * inner


@pytest.mark.parametrize("form", FORMS)
def test_gelu_and_its_derivative_are_those_of_float64(form):
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    found = both(lambda x: gelu(x, form), np.ones_like(x), x)
    for one, other in zip(found, gelu_in_float64(x, form), strict=True):
        np.testing.assert_allclose(one, other, atol=4e-6, rtol=1e-6)  # 1 + tanh cancels far below 0


@pytest.mark.parametrize("form", FORMS)
def test_gelu_in_bfloat16(form):
    x = jnp.linspace(-6, 6, 1001).astype(jnp.bfloat16)
    found = both(lambda x: gelu(x, form), jnp.ones_like(x), x)
    for one, other in zip(found, gelu_in_float64(x, form), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(one), other, atol=0.01, rtol=2**-7)


def kept(function, *arguments):
    """The shapes of what a function keeps for its backward pass."""
    _, pull = jax.vjp(function, *arguments)
    return sorted(leaf.shape for leaf in jax.tree.leaves(pull))


def test_the_inputs_are_all_that_is_kept():
    x, scale, bias = map(jnp.asarray, draws((4, 6, 32), (32,), (32,)))
    assert kept(gelu, x) == [(4, 6, 32)]
    norm = kept(lambda *parts: layer_norm(*parts, EPSILON, jnp.float32), x, scale, bias)
    assert norm == [(4, 6, 1), (4, 6, 1), (4, 6, 32), (32,)]
    assert len(kept(jax.nn.gelu, x)) > 1  # what JAX would keep by itself


def test_gradients_are_the_same_under_vmap_and_remat():
    x, scale, bias = map(jnp.asarray, draws((4, 6, 32), (32,), (32,)))
    module = LayerNorm()
    variables = {"params": {"scale": scale, "bias": bias}}

    def loss(variables, x):
        return jnp.square(gelu(module.apply(variables, x))).sum()

    plain = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, x)
    again = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))(variables, x)
    mapped = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(variables, x)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), plain, again)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other.sum(0), rtol=1e-4, atol=1e-4), plain[0], mapped
    )
