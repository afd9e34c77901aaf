import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.attention import Attention
from vit_jax.models.attention_backends import attention_weights
from vit_jax.models.block_config import BlockConfig


def attention_layer(heads, **options):
    return Attention(BlockConfig(heads=heads, mlp_width=1, **options))


def softmax(scores):
    """In float64, the plain way."""
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def reference(tokens, parameters, heads, mask=None):
    """Attention example by example, head by head, in float64."""
    tokens = np.asarray(tokens, np.float64)
    batch, _, width = tokens.shape
    size = width // heads
    fused = tokens @ np.float64(parameters["qkv"]["kernel"]) + np.float64(parameters["qkv"]["bias"])
    mixed = np.zeros_like(tokens)
    for example in range(batch):
        for head in range(heads):
            at = slice(head * size, (head + 1) * size)
            queries, keys, values = (fused[example, :, part * width : (part + 1) * width][:, at] for part in range(3))
            scores = queries @ keys.T / np.sqrt(size)
            if mask is not None:
                scores = np.where(mask[example, 0], scores, -np.inf)
            mixed[example, :, at] = softmax(scores) @ values
    return mixed @ np.float64(parameters["out"]["kernel"]) + np.float64(parameters["out"]["bias"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_equals_the_plain_reference(draw, randomise, heads, masked):
    tokens = draw(2, 7, 12)
    mask = np.random.default_rng(3).random((2, 1, 7, 7)) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True
    module = attention_layer(heads)
    parameters = randomise(module, tokens)["params"]
    with jax.default_matmul_precision("highest"):
        outputs = module.apply({"params": parameters}, tokens, None if mask is None else jnp.asarray(mask))
    np.testing.assert_allclose(outputs, reference(tokens, parameters, heads, mask), atol=2e-6)


def test_scores_are_divided_by_the_square_root_of_the_head_size():
    queries = jnp.ones((1, 1, 1, 16))
    keys = jnp.stack([jnp.ones((1, 1, 16)), jnp.zeros((1, 1, 16))], axis=1)
    weights = attention_weights(queries, keys)
    np.testing.assert_allclose(weights[0, 0, 0], [1 / (1 + np.exp(-4.0)), 1 / (1 + np.exp(4.0))], rtol=1e-6)


def test_hidden_keys_weigh_exactly_nothing(draw):
    queries, keys = 30 * draw(2, 5, 3, 4), 30 * draw(2, 6, 3, 4, seed=1)
    mask = np.random.default_rng(2).random((2, 1, 5, 6)) < 0.5
    mask[0, 0, 2] = False
    mask[..., 1, 0] = True
    weights = np.asarray(attention_weights(queries, keys, jnp.asarray(mask)))
    hidden = np.broadcast_to(~mask, weights.shape)
    assert np.all(weights[hidden] == 0.0)
    some = np.broadcast_to(mask.any(-1), weights.shape[:3])
    np.testing.assert_allclose(weights.sum(-1), some.astype(np.float32), atol=1e-6)


def test_a_query_that_sees_nothing_mixes_nothing(draw, randomise):
    tokens = draw(1, 4, 8)
    module = attention_layer(2)
    parameters = randomise(module, tokens)["params"]
    mask = jnp.ones((1, 1, 4, 4), bool).at[0, 0, 2].set(False)
    outputs = module.apply({"params": parameters}, tokens, mask)
    # What is left of the output projection for a mixture of zero is its bias.
    np.testing.assert_array_equal(outputs[0, 2], parameters["out"]["bias"])
    assert np.abs(outputs[0, 1] - parameters["out"]["bias"]).max() > 0.01


def test_weights_are_float32_in_bfloat16_arithmetic(draw):
    queries, keys = draw(1, 3, 2, 8).astype(jnp.bfloat16), draw(1, 3, 2, 8, seed=1).astype(jnp.bfloat16)
    weights = attention_weights(queries, keys)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)


def test_heads_that_do_not_divide_the_width_are_refused(draw):
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        attention_layer(3).init(jax.random.key(0), draw(1, 2, 8))


@pytest.mark.slow
def test_queries_keys_and_values_start_as_if_they_stood_alone(draw):
    kernel = attention_layer(4).init(jax.random.key(0), draw(1, 2, 256))["params"]["qkv"]["kernel"]
    bound = np.sqrt(6 / (256 + 256))
    for part in np.split(np.asarray(kernel), 3, axis=1):
        assert np.abs(part).max() <= bound
        np.testing.assert_allclose(part.std(), bound / np.sqrt(3), rtol=0.02)
