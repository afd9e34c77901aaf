"""Overrides on the command line mean what they say, whatever the config file sets: sizes, lengths, warm-up."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from helpers import mostly_slow, tiny_config
from test_config import ARGUMENTS

from vit_jax import commands, main, optim
from vit_jax import config as options
from vit_jax.config.overrides import RESETS
from vit_jax.data import splits
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import build_model

SPECS = [f"configs/{name}.py" + (f":{argument}" if argument else "") for name in ARGUMENTS for argument in ARGUMENTS[name]]
PATCHES = (1, 2, 4, 8, 14, 16, 32)
# arXiv 2010.11929, table 1, and arXiv 2106.10270, table 1: width, layers, heads, MLP.
PAPER = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


def image_side(config) -> int:
    """The side of the images of a shipped config, in pixels."""
    return config.data.image_size or {"digits": 8, "cifar10": 32, "cifar100": 32, "folder": 224}[config.data.name]


def made(spec: str, *overrides: str):
    """What a command makes of a shipped config and overrides, as if there were a file of weights to fine-tune."""
    weights = ["checkpoint.init_from=weights.npz", "data.normalization=half"] if "finetune" in spec else []
    return commands.make_config(spec, [*weights, *overrides])


def dense(inputs: int, outputs: int, bias: bool = True) -> int:
    """The number of parameters of a dense layer."""
    return inputs * outputs + bias * outputs


def closed_form(name: str, patch: int, side: int, channels: int, classes: int, section) -> int:
    """The number of parameters of a plain ViT with the other options of a config's model section."""
    width, depth, _, mlp = PAPER[name]
    has_token = section.pooling == "token"
    tokens = (side // patch) ** 2 + has_token
    block = 3 * dense(width, width, section.qkv_bias) + dense(width, width)
    block += dense(width, mlp) + dense(mlp, width) + 2 * 2 * width
    head = bool(section.pre_logits) * dense(width, width) + dense(width, classes)
    positions = tokens * width if section.position == "learned" else 0
    return dense(patch**2 * channels, width) + has_token * width + positions + depth * block + 2 * width + head


@functools.cache
def count(model: VisionTransformer, side: int, channels: int) -> int:
    """The number of parameters of a model, one block of which is traced."""
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    shapes = jax.eval_shape(model.clone(scan=True).init, jax.random.key(0), images)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def check_variant(spec: str, variant: str) -> None:
    """A shipped config with an override of the variant: the model is that variant, with the recipe's other options."""
    file, config = options.load(spec), made(spec, f"model.variant={variant}")
    assert config.model.variant == variant
    model = build_model.build(config.model, classes=7, dtype="float32")
    sizes = ("variant", "width", "depth", "heads", "mlp_width", "class_token", "pre_logits", "dtype", "attention_kernel")
    others = {key: value for key, value in file.model.to_dict().items() if key not in sizes and value is not None}
    sized = variants.fields(variant)
    expected = VisionTransformer(
        classes=7,
        class_token=file.model.pooling == "token",
        pre_logits=sized["width"] if file.model.pre_logits else None,
        dtype="float32",
        **sized,
        **others,
    )
    assert model == expected
    size, _, patch = variant.partition("/")
    if size in PAPER:
        side, channels = image_side(file), 1 if file.data.name == "digits" else 3
        assert count(model, side, channels) == closed_form(size, int(patch), side, channels, 7, file.model)


def fitting(spec: str) -> list[str]:
    """The variants that a shipped config can have: patch sizes that divide its images; hybrids where there is room."""
    config = options.load(spec)
    side = image_side(config)
    plain = [f"{size}/{patch}" for size, patch in itertools.product(PAPER, PATCHES) if side % patch == 0]
    masked = config.train.objective != "classify"  # needs patches that do not overlap
    return plain + [name for name in variants.HYBRIDS if side % 32 == 0 and not masked]


@pytest.mark.parametrize("spec", SPECS[::8])
def test_a_variant_on_the_command_line_is_that_variant(spec):
    known = fitting(spec)
    check_variant(spec, known[SPECS.index(spec) * 3 % len(known)])


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_every_variant_on_the_command_line_is_that_variant(spec):
    for variant in fitting(spec):
        check_variant(spec, variant)


def test_sizes_of_the_command_line_stay_in_any_order():
    flags = ["model.variant=B/4", "model.depth=2", "model.heads=6"]
    for order in itertools.permutations(flags):
        section = made("configs/cifar10.py:cpu", *order).model
        sizes = (section.width, section.depth, section.heads, section.mlp_width)
        assert sizes == (None, 2, 6, None)
    section = made("configs/cifar10.py:cpu", "model.depth=2").model
    assert (section.width, section.depth, section.heads, section.mlp_width) == (128, 2, 2, 256)
