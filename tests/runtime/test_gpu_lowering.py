"""The training steps of all shipped configs, lowered for an NVIDIA GPU on a machine without one.

Errors that a backend raises while a program is traced or lowered are seen here, such as that of cuDNN's wrapper for odd
token counts in the backward pass; errors that XLA, cuDNN or Triton raise later are not (see benchmarks/compiled.py).
"""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import sharding
from vit_jax.data.sources import Source
from vit_jax.models import variants
from vit_jax.models.attention import Attention
from vit_jax.models.attention_backends import Device, Shape, candidates, obstacle
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.positions import Terms
from vit_jax.runtime import attention_choice
from vit_jax.runtime.attention_choice import Choice
from vit_jax.training import setup
from vit_jax.training.step import make_update

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
H200 = Device("gpu", (9, 0))
SHIPPED = {
    "cifar10.py": ["", "lite", "S"],
    "cifar100.py": [""],
    "digits.py": [""],
    "finetune.py": ["cifar10", "cifar10,adamw", "oxford_flowers102,probe"],
    "photos.py": [""],
    "pretrain.py": ["imagenet", "cifar100", "mae", "masked-patches"],
}
QUICK = {("cifar10.py", "")}
RECIPES = [
    pytest.param(file, argument, marks=() if (file, argument) in QUICK else pytest.mark.slow)
    for file, arguments in SHIPPED.items()
    for argument in arguments
]


def get_config(file, argument):
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py"), CONFIGS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def test_every_shipped_config_is_listed():
    assert set(SHIPPED) == {path.name for path in CONFIGS.glob("*.py")}


def lowered_step(config, backend, monkeypatch, lower_for_gpu):
    """The StableHLO of a config's training step for a GPU, with one block, eight images and synthetic data."""
    size = config.data.image_size or (8 if config.data.name == "digits" else 32)
    channels = 1 if config.data.name == "digits" else 3
    pixels, labels = np.zeros((16, size, size, channels), np.uint8), np.zeros(16, np.int32)
    source = Source("toy", "train", pixels, labels, tuple("abcde"), (0.5,) * channels, (0.25,) * channels)
    requested = []

    def resolve(wanted, shapes, device, **_):
        requested.extend(shapes)
        return Choice(backend, "timed")

    monkeypatch.setattr(attention_choice, "resolve", resolve)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    if config.model.variant == "init_from":
        config.model.variant, config.data.normalization = "B/16", "half"
    config.model.depth, config.train.batch_size, config.train.accumulation = 1, 8, 1
    run = setup.assemble(config, sharding.make_mesh(1), {"train": source})
    update = make_update(run)
    feed = run.pipelines["train"].abstract_feed(2, 8)
    return lower_for_gpu(update, run.abstract_state(), feed, np.int32(0), np.int32(0)), requested


@pytest.mark.parametrize("file, argument", RECIPES)
def test_the_step_of_a_shipped_config_lowers_with_fused_attention(file, argument, monkeypatch, lower_for_gpu):
    _, shapes = lowered_step(get_config(file, argument), "plain", monkeypatch, lower_for_gpu)
    assert shapes and all(shape.dtype == "bfloat16" for shape in shapes)
    assert {"cudnn", "pallas"} < set(candidates(H200, shapes))
    for name in ("cudnn", "pallas"):
        text, _ = lowered_step(get_config(file, argument), name, monkeypatch, lower_for_gpu)
        assert ("cudnn$fmha" in text) == (name == "cudnn")
        assert ("fmhaSoftmaxBackward" in text) == (name == "cudnn" and "probe" not in argument)  # head only
        assert ("__gpu$xla.gpu.triton" in text) == name.startswith("pallas")


def lowered_layer(backend, tokens, dtype, lower_for_gpu, **options):
    """The StableHLO of an attention layer's forward and backward pass for a GPU."""
    heads, size = 2, 64
    config = BlockConfig(heads=heads, mlp_width=1, qk_norm=options.get("qk_norm", False))
    layer = Attention(dataclasses.replace(config, dtype=jnp.dtype(dtype), attention_kernel=backend))
    lengths = jnp.full(2, tokens - 1) if options.get("lengths") else None
    bias = jnp.zeros((1, heads, tokens, tokens)) if options.get("bias") else None
    angles = jnp.zeros((tokens, size // 2)) if options.get("rotation") else None
    terms = Terms(bias=bias, rotation=None if angles is None else (jnp.cos(angles), jnp.sin(angles)))
    inputs = jax.ShapeDtypeStruct((2, tokens, heads * size), jnp.dtype(dtype))
    variables = jax.eval_shape(Attention(config).init, jax.random.key(0), inputs)

    def loss(variables, inputs):
        return layer.apply(variables, inputs, lengths, positions=terms).astype(jnp.float32).sum()

    return lower_for_gpu(jax.grad(loss, argnums=(0, 1)), variables, inputs)


@pytest.mark.parametrize("tokens", [16, 17, 64, 65, 66, 196, 197, 200, 257])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_shape_without_an_obstacle_lowers_forward_and_backward(tokens, dtype, lower_for_gpu):
    shape = Shape(2, tokens, 2, 64, dtype)
    for name in ("cudnn", "pallas"):  # the others are plain XLA
        if obstacle(name, H200, shape) is None:
            assert lowered_layer(name, tokens, dtype, lower_for_gpu)
        else:
            assert name not in candidates(H200, [shape])


@pytest.mark.parametrize("option", ["bias", "rotation", "qk_norm", "lengths"])
def test_fused_kernels_support_the_modern_options(option, lower_for_gpu):
    shape = Shape(
        2, 65, 2, 64, "bfloat16", **{option: True} if option in ("bias", "lengths") else {"transformed": True}
    )
    found = {"cudnn": "cudnn$fmha", "pallas": "__gpu$xla.gpu.triton"}
    for name, call in found.items():
        if obstacle(name, H200, shape) is None:
            assert call in lowered_layer(name, 65, "bfloat16", lower_for_gpu, **{option: True})
    assert set(candidates(H200, [shape])) & set(found)


VARIANT_TOKENS = {"Ti/16": 197, "S/32": 50, "B/8": 785, "H/14": 257, "R50+B/16": 197, "R+Ti/16": 50}


@pytest.mark.parametrize("variant, tokens", VARIANT_TOKENS.items())
def test_every_size_has_a_fused_kernel_at_its_own_token_count(variant, tokens, lower_for_gpu):
    fields = variants.fields(variant)
    shape = Shape(2, tokens, fields["heads"], fields["width"] // fields["heads"], "bfloat16")
    assert set(candidates(H200, [shape])) & {"cudnn", "pallas"}
    assert obstacle("cudnn", H200, shape) is None
