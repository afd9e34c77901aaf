"""Products of rounded operands."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from vit_jax.models.dense import Dense, rounded_matmul
from vit_jax.models.vit import VisionTransformer


def rounded(array):
    return np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_the_rounded_matmul_and_its_gradients_are_those_of_rounded_operands(draw):
    """In float64 by NumPy; the incoming gradient is rounded as well."""
    rows, kernel, direction = draw(37, 24), draw(24, 19, seed=1), draw(37, 19, seed=2)
    value, pull = jax.vjp(lambda rows, kernel: rounded_matmul(rows, kernel, jnp.bfloat16), rows, kernel)
    of_rows, of_kernel = pull(direction)
    assert value.dtype == of_rows.dtype == of_kernel.dtype == jnp.float32
    np.testing.assert_allclose(value, rounded(rows) @ rounded(kernel), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_rows, rounded(direction) @ rounded(kernel).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_kernel, rounded(rows).T @ rounded(direction), rtol=1e-5, atol=1e-5)


def test_a_dense_layer_keeps_everything_else_in_float32(draw):
    inputs = draw(3, 5, 16)
    layer = Dense(8, matmul_dtype=jnp.bfloat16, bias_init=jax.nn.initializers.normal(1.0))
    variables = layer.init(jax.random.key(0), inputs)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    expected = rounded(inputs) @ rounded(kernel) + np.float64(bias)
    np.testing.assert_allclose(layer.apply(variables, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gradients_of_a_whole_model_are_within_a_hundredth(draw):
    """The relative norm of the difference from the float32 gradient of a classification loss.

    Without a class token, which starts at zero: the LayerNorm after it divides by almost nothing, so its gradient
    amplifies every rounding error.
    """
    fields = {"patch_size": 4, "width": 48, "depth": 3, "heads": 3, "mlp_width": 96, "classes": 10}
    fields |= {"class_token": False, "pooling": "mean"}
    images, targets = draw(64, 16, 16, 3), jax.nn.one_hot(np.arange(64) % 10, 10)
    exact = VisionTransformer(**fields)
    parameters = exact.init(jax.random.key(0), images)["params"]
    head = {"kernel": 0.1 * draw(48, 10, seed=2), "bias": jnp.zeros(10)}
    parameters = {**parameters, "head": {"logits": head}}  # not zeros: all gradients would be zero

    def gradient(model):
        def loss(parameters):
            return optax.softmax_cross_entropy(model.apply({"params": parameters}, images), targets).mean()

        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(parameters))])

    mine = gradient(VisionTransformer(**fields, matmul_dtype=jnp.bfloat16, attention_kernel="heads_first"))
    theirs = gradient(exact)
    difference = float(jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(theirs))
    assert 1e-4 < difference < 0.01  # rounded indeed, and not by much
