import jax
import jax.numpy as jnp
import pytest
from helpers import mostly_slow

from vit_jax import summary as command
from vit_jax.models import variants
from vit_jax.models.masked_autoencoder import MaskedAutoencoder
from vit_jax.models.masked_patches import MaskedPatchPrediction
from vit_jax.models.summary import (
    forward_flops,
    layers,
    training_bytes,
)
from vit_jax.models.vit import VisionTransformer


@pytest.mark.parametrize(
    ("name", "size", "classes", "gigaflops"),
    [
        ("S/16", 224, 1000, 27.6),
        ("B/16", 224, 1000, 105.4),
        ("L/16", 224, 1000, 369),
        ("Ti/4", 32, 10, 2.19),
        ("S/4", 32, 10, 8.52),
        ("B/4", 32, 10, 33.6),
    ],
)
def test_three_forward_passes_cost_what_is_known(name, size, classes, gigaflops):
    model = VisionTransformer(classes=classes, **variants.fields(name))
    assert 3 * forward_flops(model, (size, size), 3) / 1e9 == pytest.approx(gigaflops, rel=0.002)


def products(jaxpr):
    """Operations of every product and convolution of a traced program, those of scans as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            size = equation.outvars[0].aval.size
            for axis in contracted:
                size *= shape[axis]
            total += 2 * size
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += 2 * equation.outvars[0].aval.size * kernel[0] * kernel[1] * kernel[2]
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                total += products(inner) * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize(
    ("name", "size", "rest"),
    # XLA counts what the formula leaves out: in float32 on a CPU each addition, exponential and division of norms,
    # softmax, GELU, biases and residuals as one. It grows with tokens and heads, and falls with the width.
    [("Ti/4", 32, 0.07), ("S/4", 32, 0.05), ("S/16", 224, 0.05), ("B/16", 224, 0.03)],
)
def test_the_count_is_the_compilers_but_for_what_is_elementwise(name, size, rest):
    model = VisionTransformer(classes=10, **{**variants.fields(name), "depth": 1})
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    compiled = jax.jit(model.apply).lower(variables, images).compile()
    flops = compiled.cost_analysis()["flops"]
    assert 1 <= flops / forward_flops(model, (size, size), 3) < 1 + rest


def test_a_training_step_has_two_more_products_for_each_but_the_first():
    model = VisionTransformer(classes=10, **{**variants.fields("S/4"), "depth": 2})
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(variables):
        return model.apply(variables, images, train=True).sum()

    traced = products(jax.make_jaxpr(jax.grad(loss))(variables).jaxpr)
    # Nobody needs the derivative by the images.
    embedding = 2 * 64 * 48 * 384
    assert traced == 2 * (3 * forward_flops(model, (32, 32), 3) - embedding)


FIELDS = [
    {},
    {"class_token": False, "pooling": "mean", "pre_logits": 12},
    {"registers": 3, "pooling": "map", "position": "rotary"},
    {"registers": 1, "pooling": "mean", "norm_after_pooling": True},
    {"pooling": "none", "classes": {"one": 3, "other": 4}, "pre_logits": 8},
    {"classes": None, "mlp": "swiglu", "qk_norm": True, "position": "relative"},
    {"position": "sincos_2d", "position_width": 4, "parallel": True, "scan": True},
    {"stem": (), "stem_width": 32, "patch_size": 2},
    {"stem": (1, 2), "stem_width": 32, "patch_size": 1, "remat": True},
    {"stem": (2, 1, 1), "stem_width": 32, "patch_size": 1},
]


@pytest.mark.parametrize("fields", mostly_slow(FIELDS, 2), ids=str)
def test_flops_are_those_of_the_traced_program(small, fields):
    model = small(**fields)
    size = (48, 31) if fields.get("stem") else (16, 24)
    images = jax.ShapeDtypeStruct((1, *size, 5), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    traced = products(jax.make_jaxpr(model.apply)(shapes, images).jaxpr)
    assert forward_flops(model, size, 5) == traced
    table = layers(model, size, 5)
    parts = [layer for layer in table if layer.name.count("/") < 2]
    assert sum(layer.flops for layer in parts) == traced
    assert sum(layer.parameters for layer in parts) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_flops_are_what_the_compiler_counts_less_the_elementwise_ones(small):
    model = small(width=128, heads=2, mlp_width=512)
    images = jax.ShapeDtypeStruct((2, 8, 12, 5), jnp.float32)
    parameters = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = jax.jit(model.apply).lower(parameters, images).compile().cost_analysis()["flops"] / 2
    assert 0.93 * counted < forward_flops(model, (8, 12), 5) < counted


def test_the_parts_of_a_block_add_up_to_it(small):
    table = {layer.name: layer for layer in layers(small(layer_scale=0.1, qk_norm=True), (8, 8), 3)}
    parts = [layer for name, layer in table.items() if name.startswith("encoder/block_1/")]
    assert [layer.name.split("/")[2] for layer in parts] == [
        "norm_attention", "attention", "scale_attention", "norm_mlp", "mlp", "scale_mlp"
    ]  # fmt: skip
    for number in ("parameters", "flops"):
        assert sum(getattr(layer, number) for layer in parts) == getattr(table["encoder/block_1"], number)


@pytest.mark.parametrize(
    "fields", [{}, pytest.param({"mlp": "swiglu"}, marks=pytest.mark.slow), {"scan": True, "remat": True}], ids=str
)
@pytest.mark.slow
def test_the_memory_of_training_is_near_what_the_compiler_plans(small, fields):
    model = small(width=64, depth=6, mlp_width=256, patch_size=4, **fields)
    images = jnp.zeros((32, 32, 32, 3))
    parameters = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(parameters, images):
        return jnp.square(model.apply(parameters, images)).sum()

    planned = jax.jit(jax.grad(loss)).lower(parameters, images).compile().memory_analysis().temp_size_in_bytes
    estimated = training_bytes(model, (32, 32), 3, 32)
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert (estimated["parameters"], estimated["gradients"], estimated["optimizer"]) == (size, size, 2 * size)
    assert 0.7 * planned < estimated["activations"] < 1.3 * planned


def run(capsys, *arguments):
    try:
        status = command.main(list(arguments))
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_the_command_prints_the_layers_and_the_totals(capsys):
    status, out, err = run(capsys, "B/16")
    assert status == 0 and err == ""
    lines = [line.split() for line in out.splitlines()]
    assert ["embedding", "196", "x", "768", "590,592", "231.2"] in lines
    assert ["encoder/block_11", "197", "x", "768", "7,087,872", "2,907.9"] in lines
    assert ["parameters", "86,567,656"] in lines
    assert ["of", "modules", "86,415,592"] in lines
    assert ["forward,", "per", "image", "35.13", "GFLOP"] in lines


def test_the_command_takes_any_field_and_size(capsys):
    status, out, _ = run(
        capsys, "R+Ti/16", "--image_size=64x96", "--classes=0", "--set", "pooling=map", "--set", "class_token=False"
    )
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["stem", "16", "x", "24", "x", "64", "9,536", "28.9"] in lines
    assert not any(line[:1] == ["head"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Q/16"], "error: 'Q/16' is not a variant: a size (Ti, S, B, L, H)"),
        (["B/16", "--image_size=225"], "error: a patch of 16 does not divide an image of 225x225"),
        (["B/16", "--image_size=big"], "error: --image_size=big\n  allowed: pixels"),
        (["B/16", "--batch_size=0"], "error: --batch_size=0\n  allowed: an integer of at least 1"),
        (
            ["B/16", "--set", "colour=1"],
            "error: --set colour=1: the model has no such field\n  known: heads, mlp_width",
        ),
        (["B/16", "--set", "dropout=a"], "error: --set dropout=a: not of type float\n  default: 0.0"),
        (["B/16", "--set", "class_token=False"], "error: pooling is 'token' but class_token is False"),
        (["B/16", "--set", "pre_logits=wide"], "error: "),
        ([], "error: "),
    ],
)
def test_a_mistake_ends_the_command_with_what_is_allowed(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message) and "Traceback" not in err


@pytest.mark.parametrize("fields", [{}, {"class_token": False, "registers": 3}], ids=str)
def test_flops_of_pre_training_are_those_of_the_traced_program(small, fields):
    backbone = small(classes=None, pooling="none", **fields)
    decoder = {"decoder_width": 8, "decoder_depth": 3, "decoder_heads": 2, "decoder_mlp_width": 20}
    autoencoder = MaskedAutoencoder(backbone, masked=0.7, **decoder)
    prediction = MaskedPatchPrediction(backbone, (0.5,) * 3, (0.5,) * 3)
    images = jax.ShapeDtypeStruct((1, 16, 24, 3), jnp.float32)
    for module in (autoencoder, prediction):
        shapes = jax.eval_shape(module.init, jax.random.key(0), images)
        assert forward_flops(module, (16, 24), 3) == products(jax.make_jaxpr(module.apply)(shapes, images).jaxpr)
