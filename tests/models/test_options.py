"""Every option of a model says what it affects, and affects what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax.models.block_config import BlockConfig, options_that_affect, parameter_options
from vit_jax.models.masked_autoencoder import MaskedAutoencoder
from vit_jax.models.parameters import flatten
from vit_jax.models.vit import VisionTransformer

KINDS = ("parameters", "head", "function", "training", "execution")

# Another value of every option, and what it takes besides.
CHANGES = {
    "heads": ({"heads": 4}, {"qk_norm": True}),
    "mlp_width": ({"mlp_width": 12}, {}),
    "dropout": ({"dropout": 0.5}, {}),
    "attention_dropout": ({"attention_dropout": 0.5}, {}),
    "mlp": ({"mlp": "swiglu"}, {}),
    "gelu": ({"gelu": "exact"}, {}),
    "qkv_bias": ({"qkv_bias": False}, {}),
    "qk_norm": ({"qk_norm": True}, {}),
    "layer_scale": ({"layer_scale": 0.1}, {}),
    "parallel": ({"parallel": True}, {}),
    "norm": ({"norm": "rms"}, {}),
    "attention_norm": ({"attention_norm": True}, {}),
    "mlp_norm": ({"mlp_norm": True}, {}),
    "layer_norm_epsilon": ({"layer_norm_epsilon": 0.5}, {}),
    "dtype": ({"dtype": jnp.bfloat16}, {}),
    "attention_kernel": ({"attention_kernel": "heads_first"}, {}),
    "matmul_dtype": ({"matmul_dtype": jnp.bfloat16}, {}),
    "classes": ({"classes": 7}, {}),
    "patch_size": ({"patch_size": 4}, {}),
    "width": ({"width": 32}, {}),
    "depth": ({"depth": 1}, {}),
    "class_token": ({"class_token": True}, {"pooling": "mean", "class_token": False}),
    "pooling": ({"pooling": "mean"}, {}),
    "position": ({"position": "sincos_2d"}, {}),
    "pre_logits": ({"pre_logits": 6}, {}),
    "head_bias": ({"head_bias": -2.0}, {}),
    "norm_after_pooling": ({"norm_after_pooling": True}, {"pooling": "mean"}),
    "stochastic_depth": ({"stochastic_depth": 0.5}, {}),
    "stochastic_depth_schedule": ({"stochastic_depth_schedule": "constant"}, {"stochastic_depth": 0.5}),
    "registers": ({"registers": 2}, {}),
    "position_at": ({"position_at": "shared"}, {"position": "relative"}),
    "position_width": ({"position_width": 4}, {"position": "sincos_2d"}),
    "position_grid": ({"position_grid": 9}, {"position": "sincos_2d"}),
    "input_norm": ({"input_norm": "tokens"}, {}),
    "final_norm": ({"final_norm": False}, {}),
    "pool_heads": ({"pool_heads": 1}, {"pooling": "map"}),
    "stem": ({"stem": ()}, {}),
    "stem_width": ({"stem_width": 32}, {"stem": ()}),
    "remat": ({"remat": True}, {}),
    "scan": ({"scan": True}, {}),
}
OPTIONS = [field.name for field in dataclasses.fields(VisionTransformer) if field.name not in ("parent", "name")]


def test_every_option_says_what_it_affects():
    assert set(options_that_affect(VisionTransformer, *KINDS)) == set(OPTIONS) == set(CHANGES)
    defaults = {field.name: field.default for field in dataclasses.fields(BlockConfig)}
    assert {field.name: field.default for field in dataclasses.fields(VisionTransformer) if field.name in defaults} == (
        defaults
    )


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", mostly_slow(OPTIONS, 8))
def test_every_option_affects_what_it_says(small, draw, randomise, name):
    change, others = CHANGES[name]
    images = draw(2, 16, 16, 3)
    before, after = small(**others), small(**others, **change) if name not in others else small(**{**others, **change})
    shapes = [
        {path: leaf.shape for path, leaf in flatten(jax.eval_shape(one.init, jax.random.key(0), images)).items()}
        for one in (before, after)
    ]
    kind = next(kind for kind in KINDS if name in options_that_affect(VisionTransformer, kind))
    if kind in ("parameters", "head"):
        assert shapes[0] != shapes[1]
        assert (parameter_options(before) != parameter_options(after)) == (kind == "parameters")
        return
    assert parameter_options(before) == parameter_options(after)
    if name == "scan":  # another layout of the same parameters: test_stacking compares the results
        return
    assert shapes[0] == shapes[1]
    variables = randomise(before, images, scale=0.1)
    one, other = (jax.jit(model.apply)(variables, images) for model in (before, after))
    assert np.array_equal(one, other) == (kind == "training") or kind == "execution"
    assert np.allclose(one, other, rtol=0.1, atol=0.02) or kind == "function"


def test_attention_pooling_is_the_part_of_pooling_that_parameters_depend_on(small):
    assert parameter_options(small()) == parameter_options(small(pooling="mean"))
    assert parameter_options(small()) != parameter_options(small(pooling="map"))


def test_a_decoder_has_the_execution_options_of_its_backbone(small):
    options = {"dtype": jnp.bfloat16, "attention_kernel": "heads_first", "matmul_dtype": jnp.bfloat16}
    module = MaskedAutoencoder(small(classes=None, pooling="none", **options))
    config = module._decoder_config()
    assert {name: getattr(config, name) for name in options} == options
