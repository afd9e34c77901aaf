import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.patches import patchify


def test_a_fresh_model_says_zero(small, draw):
    images = draw(2, 4, 6, 3)
    model = small(depth=1, pre_logits=8)
    logits = model.apply(model.init(jax.random.key(0), images), images)
    np.testing.assert_array_equal(logits, np.zeros((2, 5)))


def test_images_and_their_patches_are_the_same_input(small, draw, randomise):
    images = draw(2, 6, 6, 3)
    model = small()
    variables = randomise(model, images)
    np.testing.assert_array_equal(model.apply(variables, patchify(images, 2)), model.apply(variables, images))


@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (1, 8, 2, 3), (3, 2, 6, 5)])
def test_any_size_ratio_and_number_of_channels(small, draw, randomise, shape):
    images = draw(*shape)
    model = small(width=8, depth=1)
    variables = randomise(model, images)
    assert variables["params"]["embedding"]["projection"]["kernel"].shape == (4 * shape[-1], 8)
    assert model.apply(variables, images).shape == (shape[0], 5)


@pytest.mark.parametrize(("position", "moved"), [("none", False), ("learned", True)])
def test_only_positions_know_where_a_patch_is(small, draw, randomise, position, moved):
    patches = draw(2, 9, 12)
    model = small(class_token=False, pooling="mean", position=position)
    variables = randomise(model, patches)
    shuffled = patches[:, np.random.default_rng(0).permutation(9)]
    with jax.default_matmul_precision("highest"):
        change = np.abs(model.apply(variables, shuffled) - model.apply(variables, patches)).max()
    assert (change > 0.01) if moved else (change < 1e-5)


def test_dropout_is_off_unless_training_and_follows_its_key(small, draw, randomise):
    images = draw(2, 4, 4, 3)
    rates = {"dropout": 0.2, "attention_dropout": 0.2, "stochastic_depth": 0.2}
    plain, dropping = small(), small(**rates)
    variables = randomise(plain, images)
    np.testing.assert_array_equal(dropping.apply(variables, images), plain.apply(variables, images))
    one, again, other = (
        dropping.apply(variables, images, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(plain.apply(variables, images, train=True), plain.apply(variables, images))


def test_bfloat16_arithmetic_leaves_parameters_float32_and_logits_near(draw, small, randomise):
    images = draw(4, 8, 8, 3)
    model = small(width=48, depth=4, mlp_width=96, pre_logits=32)
    variables = randomise(model, images, scale=0.15)
    half = model.clone(dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0), images)):
        assert leaf.dtype == jnp.float32
    exact, near = model.apply(variables, images), half.apply(variables, images)
    assert near.dtype == jnp.float32
    assert 0 < np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.02


def test_hidden_patches_change_nothing(small, draw, randomise):
    images = draw(1, 4, 4, 3)
    model = small()
    variables = randomise(model, images)
    mask = jnp.ones((1, 1, 5, 5), bool).at[..., 2].set(False)
    changed = images.at[:, :2, 2:].add(1.0)  # the second patch: token 2, behind the class token
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
    ({"dropout": 1.0}, "dropout is 1.0: a rate is at least 0 and below 1"),
    ({"heads": 3}, r"does not divide the width 16: \[1, 2, 4\] would"),
    ({"pooling": "max"}, "pooling is 'max': one of token, mean"),
    ({"class_token": False}, "set class_token, or pool by 'mean'"),
    ({"position": "absolute"}, "position is 'absolute': one of .*learned"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_fields_are_refused_at_construction(small, fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)
