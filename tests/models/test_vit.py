from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.intermediates import apply_with_intermediates
from vit_jax.models.patches import patchify


def test_images_and_their_patches_are_the_same_input(small, draw, randomise):
    images = draw(2, 4, 4, 3)
    model = small()
    variables = randomise(model, images)
    np.testing.assert_array_equal(model.apply(variables, patchify(images, 2)), model.apply(variables, images))


@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (1, 8, 2, 3), (3, 2, 6, 5)])
def test_any_size_ratio_and_number_of_channels(small, draw, randomise, shape):
    images = draw(*shape)
    model = small(width=8, depth=1)
    variables = randomise(model, images)
    assert variables["params"]["embedding"]["projection"]["kernel"].shape == (4 * shape[-1], 8)
    assert jax.eval_shape(model.apply, variables, images).shape == (shape[0], 5)


@pytest.mark.parametrize(("position", "moved"), [("none", False), ("learned", True)])
def test_only_positions_know_where_a_patch_is(small, draw, randomise, position, moved):
    patches = draw(2, 4, 12)
    model = small(class_token=False, pooling="mean", position=position)
    variables = randomise(model, patches)
    shuffled = patches[:, np.array([2, 0, 3, 1])]
    apply = jax.jit(model.apply)
    with jax.default_matmul_precision("highest"):
        change = np.abs(apply(variables, shuffled) - apply(variables, patches)).max()
    assert (change > 0.01) if moved else (change < 1e-5)


@pytest.mark.slow
def test_dropout_is_off_unless_training_and_follows_its_key(small, draw, randomise):
    images = draw(2, 4, 4, 3)
    rates = {"dropout": 0.2, "attention_dropout": 0.2, "stochastic_depth": 0.2}
    plain, dropping = small(), small(**rates)
    variables = randomise(plain, images)
    np.testing.assert_array_equal(dropping.apply(variables, images), plain.apply(variables, images))
    apply = jax.jit(partial(dropping.apply, train=True))
    one, again, other = (apply(variables, images, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(plain.apply(variables, images, train=True), plain.apply(variables, images))


@pytest.mark.slow
def test_bfloat16_arithmetic_leaves_parameters_float32_and_logits_near(draw, small, randomise):
    images = draw(4, 8, 8, 3)
    model = small(width=48, depth=4, mlp_width=96, pre_logits=32)
    variables = randomise(model, images, scale=0.15)
    half = model.clone(dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0), images)):
        assert leaf.dtype == jnp.float32
    exact, near = jax.jit(model.apply)(variables, images), jax.jit(half.apply)(variables, images)
    assert near.dtype == jnp.float32
    assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.02


@pytest.mark.slow
def test_the_last_norm_after_the_mean_is_of_the_mean(small, draw, randomise):
    images = draw(2, 4, 4, 3)
    model = small(pooling="mean", norm_after_pooling=True, registers=1, classes=None)
    variables = randomise(model, images)
    features, inside = apply_with_intermediates(model, variables, images)
    assert "norm" not in variables["params"]["encoder"]
    mean = np.float64(inside.blocks[-1])[:, 2:].mean(axis=1)
    norm = jax.tree.map(np.float64, variables["params"]["norm"])
    centred = mean - mean.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_hidden_patches_change_nothing(small, draw, randomise):
    images = draw(2, 4, 4, 3)
    model = small()
    variables = randomise(model, images)
    mask = jnp.ones((1, 1, 5, 5), bool).at[..., 2].set(False)
    changed = images.at[:, :2, 2:].add(1.0)  # the second patch: token 2, after the class token
    np.testing.assert_array_equal(model.apply(variables, changed, mask), model.apply(variables, images, mask))
    assert np.abs(model.apply(variables, changed) - model.apply(variables, images)).max() > 0.01


def test_parameters_are_named_as_checkpoints_have_them(small, draw, randomise):
    variables = randomise(small(depth=1, pre_logits=4), draw(1, 4, 4, 3))
    dense = {"kernel": 0, "bias": 0}
    norm = {"scale": 0, "bias": 0}
    chex.assert_trees_all_equal_structs(
        variables["params"],
        {
            "class_token": 0,
            "embedding": {"projection": dense},
            "positions": {"table": 0},
            "encoder": {
                "block_0": {
                    "norm_attention": norm,
                    "attention": {"qkv": dense, "out": dense},
                    "norm_mlp": norm,
                    "mlp": {"up": dense, "down": dense},
                },
                "norm": norm,
            },
            "head": {"pre_logits": dense, "logits": dense},
        },
    )


WRONG = [
    ({"width": 0}, "width is 0: it must be at least 1"),
    ({"registers": -1}, "registers is -1: it must be at least 0"),
    ({"dropout": 1.0}, "dropout is 1.0: a rate must be at least 0 and below 1"),
    ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0: it must be greater than 0"),
    ({"layer_scale": 0.0}, "it must be greater than 0, or None for no layer scale"),
    ({"pre_logits": 0}, "it must be at least 1, or None for no such layer"),
    ({"classes": 0}, "classes is 0: it must be at least 1"),
    ({"classes": {}}, "name at least one head, or use None"),
    ({"classes": {"a/b": 2}}, "a head named 'a/b': a name consists of letters, digits and underscores"),
    ({"classes": {"a": 2, "b": 0}}, "classes of 'b' is 0: it must be at least 1"),
    ({"heads": 3}, r"does not divide the width 16: \[1, 2, 4\] do"),
    ({"pooling": "max"}, "pooling is 'max': one of token, mean, token_mean, token_register, map, none"),
    ({"class_token": False}, "set class_token, or pool by 'mean'"),
    (
        {"norm_after_pooling": True},
        "pooling is 'token': it only makes a difference with 'mean'; .* set pooling to 'mean'",
    ),
    ({"position": "absolute"}, "position is 'absolute': one of .*learned"),
    ({"mlp": "relu"}, "mlp is 'relu': one of gelu, swiglu"),
    ({"gelu": "erf"}, "gelu is 'erf': one of tanh, exact"),
    ({"mlp": "swiglu", "gelu": "exact"}, "leave gelu out, or set mlp to 'gelu'"),
    ({"stochastic_depth_schedule": "cosine"}, "one of linear, constant"),
    (
        {"position": "sincos_2d", "position_at": "layers"},
        "position_at is 'layers' but .*can be applied at: input, shared",
    ),
    ({"position": "relative", "position_at": "input"}, "can be applied at: layers, shared"),
    ({"position": "rotary", "position_at": "input"}, "can be applied at: layers, shared"),
    ({"position_at": "everywhere"}, "position_at is 'everywhere' but .*can be applied at: input, layers, shared"),
    ({"position": "relative", "position_width": 8}, "sinusoidal, sincos_2d at the input can be concatenated; 0 adds"),
    ({"position": "learned", "position_width": 8}, "sinusoidal, sincos_2d at the input can be concatenated"),
    ({"position": "sincos_2d", "position_width": 8, "position_at": "shared"}, "at the input can be concatenated"),
    ({"position": "sincos_2d", "position_width": 16}, "position_width is 16: it must be below the width, 16"),
    ({"position": "sincos_2d", "position_width": 6}, "needs a width that is a multiple of 4, not 6"),
    ({"position": "learned", "position_grid": 8}, "position_grid is 8 and position is 'learned'"),
    ({"position": "sincos_2d", "position_grid": 0}, "position_grid is 0 .* at least 1"),
    ({"position": "learned_2d", "width": 15, "heads": 3}, "needs a width that is a multiple of 2, not 15"),
    ({"position": "rotary", "width": 18, "heads": 6}, "6 heads of a width of 18 have 3: no number of heads works"),
    ({"position": "rotary", "width": 24, "heads": 4}, r"have 6: \[1, 2, 3, 6\] heads would work"),
    ({"pooling": "token_register"}, "registers is 0: it must be at least 1, or pool by 'token'"),
    ({"pool_heads": 2}, "leave pool_heads out, or pool by 'map'"),
    ({"pooling": "map", "pool_heads": 3}, "it must be a divisor of the width 16"),
    ({"norm": "batch"}, "norm is 'batch': one of layer, rms"),
    ({"input_norm": "all"}, "one of None, patches, tokens"),
    ({"position": "relative_class", "class_token": False, "pooling": "mean"}, "set class_token, or use another"),
    ({"stem": (2, 0)}, r"every stage needs at least 1 unit; \(\) is a stem without stages"),
    ({"stem": (1,), "stem_width": 48}, "stem_width is 48: it must be a multiple of 32"),
    ({"stem_width": 32}, "stem_width is 32 but there is no stem"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_fields_are_refused_at_construction(small, fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)
