import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.attention import Attention
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.encoder import Encoder, EncoderBlock, depth_rates
from vit_jax.models.mlp import MlpBlock, SwigluBlock
from vit_jax.models.norm import LayerNorm, LayerScale, RMSNorm


def attention_layer(heads, **options):
    return Attention(BlockConfig(heads=heads, mlp_width=1, **options))


def test_mlp_is_dense_gelu_dense_in_the_tanh_form(draw, randomise):
    tokens = draw(2, 3, 6)
    module = MlpBlock(BlockConfig(heads=1, mlp_width=10))
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
    tokens = draw(2, 5, 16)
    order = np.array([3, 0, 1, 4, 2])
    module = Encoder(depth=2, config=BlockConfig(heads=2, mlp_width=24))
    variables = randomise(module, tokens)
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(module.apply)
        outputs, permuted = (apply(variables, x) for x in (tokens, tokens[:, order]))
    np.testing.assert_allclose(permuted, outputs[:, order], atol=1e-5)
    assert np.abs(outputs[:, order] - outputs).max() > 0.1


@pytest.mark.slow
def test_stochastic_depth_grows_linearly_from_zero(randomise):
    examples, depth, last = 4096, 4, 0.6
    module = Encoder(depth=depth, config=BlockConfig(heads=1, mlp_width=1), stochastic_depth=last)
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


def dense(inputs, parameters):
    return inputs @ np.float64(parameters["kernel"]) + np.float64(parameters["bias"])


def test_exact_gelu_is_by_the_error_function(draw, randomise):
    tokens = draw(2, 3, 6)
    module = MlpBlock(BlockConfig(heads=1, mlp_width=10, gelu="exact"))
    parameters = randomise(module, tokens, scale=1.0)["params"]
    with jax.default_matmul_precision("highest"):
        outputs = module.apply({"params": parameters}, tokens)
    hidden = dense(np.float64(tokens), parameters["up"])
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    np.testing.assert_allclose(outputs, dense(hidden, parameters["down"]), atol=1e-5)


def test_swiglu_gates_by_the_first_half(draw, randomise):
    tokens = draw(2, 3, 6)
    module = SwigluBlock(BlockConfig(heads=1, mlp_width=10))
    parameters = randomise(module, tokens)["params"]
    with jax.default_matmul_precision("highest"):
        outputs = module.apply({"params": parameters}, tokens)
    gate, up = np.split(dense(np.float64(tokens), parameters["gate_up"]), 2, axis=-1)
    np.testing.assert_allclose(outputs, dense(gate / (1 + np.exp(-gate)) * up, parameters["down"]), atol=1e-5)


def normed(x, parameters, epsilon=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * np.float64(parameters["scale"]) + np.float64(parameters["bias"])


def test_queries_and_keys_are_normalised_head_by_head(draw, randomise):
    tokens = draw(1, 4, 8)
    module = attention_layer(2, qk_norm=True, qkv_bias=False)
    parameters = randomise(module, tokens)["params"]
    assert list(parameters["qkv"]) == ["kernel"]
    with jax.default_matmul_precision("highest"):
        outputs = module.apply({"params": parameters}, tokens)
    fused = (np.float64(tokens[0]) @ np.float64(parameters["qkv"]["kernel"])).reshape(4, 3, 2, 4)
    queries, keys = normed(fused[:, 0], parameters["norm_queries"]), normed(fused[:, 1], parameters["norm_keys"])
    scores = np.einsum("qhd,khd->hqk", queries, keys) / 2
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, fused[:, 2]).reshape(1, 4, 8)
    np.testing.assert_allclose(outputs, dense(mixed, parameters["out"]), atol=1e-5)


@pytest.mark.parametrize("layer_scale", [None, 0.1])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_block_is_put_together_as_its_formula_says(draw, randomise, parallel, layer_scale):
    tokens = draw(2, 5, 16)
    options = BlockConfig(heads=2, mlp_width=24, parallel=parallel, layer_scale=layer_scale)
    module = EncoderBlock(options)
    p = randomise(module, tokens)["params"]

    def attention(x):
        return attention_layer(2).apply({"params": p["attention"]}, x)

    def mlp(x):
        return MlpBlock(BlockConfig(heads=1, mlp_width=24)).apply({"params": p["mlp"]}, x)

    def norm(name, x):
        return LayerNorm().apply({"params": p[name]}, x)

    def scale(name):
        return p[name]["scale"] if layer_scale else 1

    if parallel:
        y = norm("norm", tokens)
        expected = tokens + scale("scale") * (attention(y) + mlp(y))
    else:
        middle = tokens + scale("scale_attention") * attention(norm("norm_attention", tokens))
        expected = middle + scale("scale_mlp") * mlp(norm("norm_mlp", middle))
    np.testing.assert_allclose(module.apply({"params": p}, tokens), expected, atol=1e-6)


def test_layer_scale_starts_at_its_value(draw):
    parameters = LayerScale(1e-4).init(jax.random.key(0), draw(1, 2, 4))["params"]
    np.testing.assert_array_equal(parameters["scale"], np.full(4, np.float32(1e-4)))


def test_epsilon_reaches_every_layer_norm(small, draw, randomise):
    model = small(depth=1, pooling="map", qk_norm=True, layer_norm_epsilon=0.5)
    images = draw(2, 4, 4, 3)

    def has_epsilon(module, _name):
        return isinstance(module, LayerNorm) and module.epsilon == 0.5

    run = partial(model.apply, capture_intermediates=has_epsilon)
    _, captured = jax.eval_shape(run, randomise(model, images), images)
    named = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(captured["intermediates"])]
    calls = [name for name in named if "__call__" in name]
    # Two in the block, queries and keys, the encoder's last, attention pooling's.
    assert len(calls) == 6, calls


def test_the_rates_of_the_blocks_follow_the_schedule():
    assert depth_rates(4, 0.3, "constant") == [0.3] * 4
    np.testing.assert_allclose(depth_rates(4, 0.3, "linear"), [0, 0.1, 0.2, 0.3])
    assert depth_rates(1, 0.3, "linear") == [0]


def test_rms_norm_divides_by_the_root_mean_square(draw, randomise):
    tokens, module = draw(2, 5, 8), RMSNorm(epsilon=0.5)
    variables = randomise(module, tokens)
    x, scale = np.float64(tokens), np.float64(variables["params"]["scale"])
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(module.apply(variables, tokens), expected, rtol=1e-5, atol=1e-6)
