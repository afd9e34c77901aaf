"""Parameter shapes from a model of one block, compared with those of the whole model."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from helpers import mostly_slow

from vit_jax.models.parameters import flatten, nested, parameter_shapes
from vit_jax.models.positions import POSITIONS
from vit_jax.models.vit import VisionTransformer, token_grid

FIELDS = [
    {},
    {"classes": None},
    {"classes": {"one": 2, "other": 3}, "pre_logits": 6},
    {"pre_logits": 6, "class_token": False, "pooling": "mean"},
    {"registers": 2, "pooling": "map"},
    {"pooling": "mean", "norm_after_pooling": True},
    {"pooling": "none", "class_token": False},
    {"mlp": "swiglu", "layer_scale": 0.1, "qk_norm": True},
    {"parallel": True, "layer_scale": 0.1, "qkv_bias": False},
    *(
        {"position": name, "position_at": at, "class_token": token or kind.needs_class_token, "pooling": "mean"}
        for (name, kind), token in itertools.product(POSITIONS.items(), (False, True))
        for at in kind.at
    ),
    {"position": "sincos_2d", "position_width": 8},
    {"stem": (), "stem_width": 32, "patch_size": 2},
    {"stem": (1, 2), "stem_width": 32, "patch_size": 1},
    {"stem": (2, 1, 1), "stem_width": 32, "patch_size": 1},
]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("fields", mostly_slow(FIELDS, 8), ids=str)
def test_shapes_are_those_of_the_whole_model(fields, scan):
    small = {"classes": 5, "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_width": 40}
    model = VisionTransformer(**{**small, **fields})
    size = (32, 64)
    images = jax.ShapeDtypeStruct((1, *size, 2), jnp.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    expected = {path: leaf.shape for path, leaf in flatten(expected).items()}
    assert parameter_shapes(model.clone(scan=scan), token_grid(model, size), 2) == expected


def test_nested_is_the_inverse_of_flatten():
    tree = {"head": {"logits": {"kernel": 1, "bias": 2}}, "class_token": 3}
    assert flatten(tree) == {"head/logits/kernel": 1, "head/logits/bias": 2, "class_token": 3}
    assert nested(flatten(tree)) == tree
