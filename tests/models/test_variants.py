import jax
import jax.numpy as jnp
import pytest
from helpers import mostly_slow

from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer

# Published counts, 224 pixels and 1000 classes (arXiv 2010.11929, table 1; 2106.10270, table 1; and their files).
PARAMETERS = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "S/32": 22_878_952,
    "B/8": 86_576_872,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "L/32": 306_535_400,
    "H/14": 632_045_800,
    "R+Ti/16": 6_337_704,
    "R26+S/32": 36_431_912,
    "R26+B/32": 101_383_976,
    "R50+B/16": 98_659_112,
    "R50+L/32": 328_994_856,
}


def shapes(name, **fields):
    # A scanned model has the same parameters, and one block to trace instead of up to 32.
    model = VisionTransformer(**{"classes": 1000, "scan": True, **variants.fields(name), **fields})
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", mostly_slow(list(PARAMETERS), 3))
def test_the_published_sizes_have_the_published_number_of_parameters(name):
    assert count(shapes(name)) == PARAMETERS[name]


def test_the_bare_tables_of_b16_are_the_class_token_and_the_positions():
    parameters = shapes("B/16")
    bare = count(parameters["class_token"]) + count(parameters["positions"])
    assert bare == 768 + 197 * 768
    assert count(parameters) - bare == 86_415_592


def test_mean_pooling_saves_the_class_token_and_its_position():
    assert count(shapes("B/16", class_token=False, pooling="mean")) == 86_566_120


def test_every_hybrid_is_counted():
    assert set(variants.HYBRIDS) <= set(PARAMETERS)


@pytest.mark.parametrize("name", ["b/16", "B16", "B/0", "B/", "X/16", "B/16/2", "R50+B/32", ""])
def test_what_is_no_variant_is_refused_with_what_would_be(name):
    with pytest.raises(ValueError, match=r"is not a variant.*Ti, S, B, L, H"):
        variants.fields(name)


OTHERS = [
    {},
    {"width": 96, "heads": 8, "depth": 3},
    {"pooling": "mean", "class_token": False, "position": "sincos_2d", "norm_after_pooling": True},
    {"pooling": "mean"},
    {"pooling": "map", "class_token": False, "registers": 4, "layer_scale": 0.1, "qkv_bias": False},
    {"mlp": "swiglu", "layer_norm_epsilon": 1e-5, "position": "relative", "position_at": "shared"},
    {"gelu": "exact", "qk_norm": True, "parallel": True},
]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("fields", OTHERS, ids=str)
def test_options_say_what_a_model_is(name, fields):
    model = VisionTransformer(classes=3, **{**variants.fields(name), **fields})
    options = variants.options_of(model)
    assert VisionTransformer(classes=3, **variants.fields_of_options(options)) == model
    if not fields:  # the plain variant is its name
        assert options["variant"] == name
        assert {options[key] for key in ("width", "depth", "heads", "mlp_width", "class_token")} == {None}


def test_a_stem_that_no_variant_has_is_refused():
    model = VisionTransformer(classes=3, **{**variants.fields("R50+L/32"), "stem": (1, 1)})
    with pytest.raises(ValueError, match=r"no variant has a stem with \(1, 1\) units"):
        variants.options_of(model)
