import chex
import jax
import numpy as np
import pytest

from vit_jax.models.block_config import BlockConfig
from vit_jax.models.pooling import POOLINGS, Head, Heads

OPTIONS = BlockConfig(heads=2, mlp_width=12)


def test_the_class_token_the_mean_of_patches_and_all_tokens(draw):
    tokens = draw(2, 7, 8)
    for name, expected in (("token", tokens[:, 0]), ("mean", np.mean(tokens[:, 3:], axis=1)), ("none", tokens)):
        np.testing.assert_allclose(POOLINGS[name](3, OPTIONS).apply({}, tokens), expected, atol=1e-6)


def test_attention_pooling_equals_the_plain_reference(draw, randomise):
    tokens = draw(2, 5, 8)
    module = POOLINGS["map"](0, OPTIONS)
    parameters = randomise(module, tokens)["params"]
    with jax.default_matmul_precision("highest"):
        pooled = module.apply({"params": parameters}, tokens)
    p, x = jax.tree.map(np.float64, parameters), np.float64(tokens)

    def dense(inputs, layer):
        return inputs @ layer["kernel"] + layer["bias"]

    queries, fused = dense(p["probe"][0, 0], p["query"]), dense(x, p["key_value"])
    mixed = np.zeros((2, 8))
    for example in range(2):
        for head in range(2):
            at = slice(4 * head, 4 * head + 4)
            scores = fused[example, :, :8][:, at] @ queries[at] / 2
            mixed[example, at] = np.exp(scores) / np.exp(scores).sum() @ fused[example, :, 8:][:, at]
    pooled_slowly = dense(mixed, p["out"])
    centred = pooled_slowly - pooled_slowly.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
    hidden = dense(normed, p["mlp"]["up"])
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    np.testing.assert_allclose(pooled, pooled_slowly + dense(hidden, p["mlp"]["down"]), atol=1e-5)


def test_attention_pooling_has_big_visions_number_of_parameters(draw):
    module = POOLINGS["map"](0, BlockConfig(heads=3, mlp_width=768))
    shapes = jax.eval_shape(module.init, jax.random.key(0), draw(1, 4, 192))
    # Probe, four projections, LayerNorm, MLP.
    expected = 192 + 4 * (192 * 192 + 192) + 2 * 192 + 192 * 768 + 768 + 768 * 192 + 192
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_the_head_is_dense_behind_dense_and_tanh(draw, randomise):
    features = draw(3, 6)
    module = Head(4, pre_logits=5)
    parameters = randomise(module, features)["params"]
    logits = module.apply({"params": parameters}, features)
    p = jax.tree.map(np.float64, parameters)
    hidden = np.tanh(np.float64(features) @ p["pre_logits"]["kernel"] + p["pre_logits"]["bias"])
    np.testing.assert_allclose(logits, hidden @ p["logits"]["kernel"] + p["logits"]["bias"], atol=1e-5)


def test_a_fresh_head_says_zero(draw):
    features = draw(3, 6)
    module = Head(4, pre_logits=5)
    np.testing.assert_array_equal(module.apply(module.init(jax.random.key(0), features), features), np.zeros((3, 4)))


@pytest.mark.parametrize("pre_logits", [None, 5])
def test_several_heads_are_each_a_head_of_their_own(draw, randomise, pre_logits):
    features = draw(3, 6)
    module = Heads({"animals": 4, "colours": 2}, pre_logits)
    parameters = randomise(module, features)["params"]
    logits = module.apply({"params": parameters}, features)
    assert list(logits) == ["animals", "colours"]
    for name, count in (("animals", 4), ("colours", 2)):
        alone = Head(count, pre_logits).apply({"params": parameters[name]}, features)
        np.testing.assert_array_equal(logits[name], alone)


def test_a_model_of_several_heads_shares_one_backbone(small, draw, randomise):
    images = draw(2, 4, 4, 3)
    model = small(classes={"animals": 4, "colours": 2})
    variables = randomise(model, images)
    logits = model.apply(variables, images)
    features = model.clone(classes=None).apply(variables, images)
    assert features.shape == (2, 16)
    for name in ("animals", "colours"):
        head = variables["params"]["head"][name]["logits"]
        np.testing.assert_allclose(logits[name], features @ head["kernel"] + head["bias"], atol=1e-5)
    # As an argument of a compiled function a model must be hashable, and equal to its copy.
    assert hash(model) == hash(small(classes={"animals": 4, "colours": 2}))
    one = jax.jit(lambda m, v, x: m.apply(v, x), static_argnums=0)(model, variables, images)
    chex.assert_trees_all_close(one, logits, atol=1e-5)


@pytest.mark.parametrize("classes", [None, 5])
def test_all_tokens_come_out_on_request(small, draw, randomise, classes):
    images = draw(2, 4, 4, 3)
    model = small(classes=classes, pooling="none", registers=2)
    outputs = jax.eval_shape(model.apply, randomise(model, images), images)
    assert outputs.shape == (2, 1 + 2 + 4, classes or 16)
