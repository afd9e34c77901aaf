import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.encoder import Encoder, EncoderBlock, LayerNorm, MlpBlock


def test_mlp_is_dense_gelu_dense_in_the_tanh_form(draw, randomise):
    tokens = draw(2, 3, 6)
    module = MlpBlock(10)
    parameters = randomise(module, tokens, scale=1.0)["params"]
    with jax.default_matmul_precision("highest"):
        outputs = module.apply({"params": parameters}, tokens)
    up, down = (jax.tree.map(np.float64, parameters[name]) for name in ("up", "down"))
    x = np.float64(tokens) @ up["kernel"] + up["bias"]
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(outputs, x @ down["kernel"] + down["bias"], atol=1e-5)


def test_layer_norm_adds_one_millionth_to_the_variance():
    tokens = 1e-3 * np.array([[1.0, -1.0, 2.0, 4.0]])
    variables = {"params": {"scale": jnp.array([1.0, 2.0, 3.0, 4.0]), "bias": jnp.array([0.0, 1.0, 0.0, -1.0])}}
    outputs = LayerNorm().apply(variables, jnp.asarray(tokens, jnp.float32))
    centred = tokens - tokens.mean()
    expected = centred / np.sqrt((centred**2).mean() + 1e-6) * [1, 2, 3, 4] + [0, 1, 0, -1]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_statistics_are_float32_in_bfloat16_arithmetic():
    # In bfloat16, 256 + 1 is 256: statistics in it would see a constant.
    tokens = jnp.array([[256.0, 258.0, 256.0, 258.0]], jnp.bfloat16)
    module = LayerNorm(dtype=jnp.bfloat16)
    outputs = module.apply(module.init(jax.random.key(0), tokens), tokens)
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(outputs), [[-1, 1, -1, 1]])


def test_the_encoder_does_not_know_the_order_of_its_tokens(draw, randomise):
    tokens = draw(2, 6, 8)
    order = np.array([3, 0, 5, 1, 4, 2])
    module = Encoder(depth=2, heads=2, mlp_width=12)
    variables = randomise(module, tokens)
    with jax.default_matmul_precision("highest"):
        outputs, permuted = (module.apply(variables, x) for x in (tokens, tokens[:, order]))
    np.testing.assert_allclose(permuted, outputs[:, order], atol=1e-5)
    assert np.abs(outputs[:, order] - outputs).max() > 0.1


def test_stochastic_depth_grows_linearly_from_zero(randomise):
    examples, depth, last = 4096, 4, 0.6
    module = Encoder(depth=depth, heads=1, mlp_width=1, stochastic_depth=last)
    tokens = jnp.zeros((examples, 1, depth))
    variables = randomise(module, tokens[:1], scale=0)
    # Block i adds one to channel i, and nothing else does anything.
    for block in range(depth):
        variables["params"][f"block_{block}"]["mlp"]["down"]["bias"] = jnp.eye(depth)[block]
    _, captured = module.apply(
        variables,
        tokens,
        train=True,
        rngs={"dropout": jax.random.key(1)},
        capture_intermediates=lambda module, name: isinstance(module, EncoderBlock),
    )
    outputs = np.asarray(captured["intermediates"][f"block_{depth - 1}"]["__call__"][0])[:, 0]
    for block in range(depth):
        rate = last * block / (depth - 1)
        error = np.sqrt(rate * (1 - rate) / examples)
        assert abs((outputs[:, block] == 0).mean() - rate) <= 4 * error
        kept = outputs[outputs[:, block] != 0, block]
        np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-5)
    # Blocks fall independently of each other.
    both = ((outputs[:, 2] == 0) & (outputs[:, 3] == 0)).mean()
    assert abs(both - 0.4 * 0.6) < 4 * np.sqrt(0.24 * 0.76 / examples)
