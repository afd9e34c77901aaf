"""What shapes.py reckons against what the model itself makes."""

import itertools

import jax
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.models.positions import POSITIONS
from vit_jax.models.summary import parameter_shapes as made
from vit_jax.models.vit import VisionTransformer, token_grid
from vit_jax.weights.shapes import parameter_shapes

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
        {"position": name, "position_at": at, "class_token": token, "pooling": "mean"}
        for (name, kind), token in itertools.product(POSITIONS.items(), (False, True))
        for at in kind.at
    ),
    {"position": "sincos_2d", "position_width": 8},
    {"stem": (), "stem_width": 32, "patch_size": 2},
    {"stem": (1, 2), "stem_width": 32, "patch_size": 1},
    {"stem": (2, 1, 1), "stem_width": 32, "patch_size": 1},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_reckoned_shapes_are_those_of_the_model(fields):
    small = {"classes": 5, "patch_size": 8, "width": 24, "depth": 2, "heads": 3, "mlp_width": 40}
    model = VisionTransformer(**{**small, **fields})
    size = (32, 64)
    expected = flatten_dict(jax.tree.map(lambda leaf: leaf.shape, made(model, size, 2)), sep="/")
    assert parameter_shapes(model, token_grid(model, size), 2) == expected
