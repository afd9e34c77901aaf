"""Tokens of blocks: against recorded outputs of transformers, and against blocks that are applied one by one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.evaluation import tokens
from vit_jax.models.encoder import EncoderBlock
from vit_jax.models.pooling import AttentionPooling

REFERENCES = Path(__file__).resolve().parents[1] / "weights" / "references"


def run(model, parameters, images, **options):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda *rest: tokens.apply(model, *rest, **options))(parameters, images)


@pytest.mark.parametrize("name", ["hf_dinov2", "hf_dinov2_registers", pytest.param("hf_mae", marks=pytest.mark.slow)])
def test_the_last_layer_is_that_of_transformers(name):
    model, parameters, _ = weights.load(REFERENCES / name)
    recorded = np.load(REFERENCES / name / "numbers.npz")
    found = run(model, parameters, recorded["inputs"])
    expected = recorded["outputs"]  # last_hidden_state: class token, registers, 9 patches
    assert expected.shape == (2, 10 + model.registers, 12)
    np.testing.assert_allclose(found["patches"].reshape(2, 9, 12), expected[:, -9:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["class"], expected[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["pooled"], found["class"])


def by_hand(model, parameters, images):
    """Normalized tokens and pooled features of each block: modules are applied one after the other."""
    _, sown = model.apply({"params": parameters}, images, mutable=["intermediates"])
    stream, layers = sown["intermediates"]["embedded"][0], []
    encoder = parameters["encoder"]

    def normalize(array, norm):
        mean, variance = array.mean(-1, keepdims=True), array.var(-1, keepdims=True)
        return (array - mean) / jnp.sqrt(variance + model.layer_norm_epsilon) * norm["scale"] + norm["bias"]

    for index in range(model.depth):
        block = jax.tree.map(lambda leaf: leaf[index], encoder["blocks"]) if model.scan else encoder[f"block_{index}"]  # noqa: B023
        stream = EncoderBlock(model.block_config()).apply({"params": block}, stream)
        out = stream
        if not model.norm_after_pooling:
            out = normalize(out, encoder["norm"])
        extra = int(model.class_token) + model.registers
        if model.pooling == "map":
            pooling = AttentionPooling(extra, model.block_config())
            pooled = pooling.apply({"params": parameters["pooling"]}, out)
        else:
            pooled = out[:, 0] if model.pooling == "token" else out[:, extra:].mean(1)
        layers.append((out, normalize(pooled, parameters["norm"]) if model.norm_after_pooling else pooled))
    return layers


CASES = ["timm_fc_norm", "timm_map", "timm_gap", "timm_hybrid", "timm_wide"]
GRIDS = {"timm_hybrid": (2, 2), "timm_wide": (3, 5)}


@pytest.mark.parametrize(
    ("name", "scan"), [("timm_registers", True)] + [pytest.param(n, False, marks=pytest.mark.slow) for n in CASES]
)
@pytest.mark.slow
def test_layers_are_those_of_blocks_applied_one_by_one(name, scan):
    model, parameters, _ = weights.load(REFERENCES / name, scan=scan)
    images = jnp.asarray(np.load(REFERENCES / name / "numbers.npz")["inputs"])
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(by_hand, static_argnums=0)(model, parameters, images)
    found, grid = run(model, parameters, images, layers=(-1, 0)), GRIDS.get(name, (3, 3))
    for row, (out, pooled) in enumerate((expected[1], expected[0])):
        patches = out[:, -grid[0] * grid[1] :].reshape(2, *grid, 12)
        np.testing.assert_allclose(found["patches"][row], patches, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found["pooled"][row], pooled, rtol=0, atol=1e-4)
        assert ("class" in found) == model.class_token
        if model.class_token:
            np.testing.assert_allclose(found["class"][row], out[:, 0], rtol=0, atol=1e-4)
    shapes = jax.eval_shape(lambda *rest: tokens.apply(model, *rest, dense=False), parameters, images)
    assert set(shapes) == set(found) - {"patches"}


@pytest.mark.slow
def test_a_model_without_pooling_has_patches_alone():
    model, parameters, _ = weights.load(REFERENCES / "timm_unpooled", pooling="none", classes=None)
    recorded = np.load(REFERENCES / "timm_unpooled" / "numbers.npz")
    found = run(model, parameters, recorded["inputs"])
    assert set(found) == {"patches"}
    expected = model.apply({"params": parameters}, jnp.asarray(recorded["inputs"]))
    np.testing.assert_allclose(found["patches"].reshape(2, 9, 12), expected, rtol=0, atol=1e-5)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_layers_cost_no_second_pass_and_later_blocks_are_not_computed():
    model, parameters, _ = weights.load(REFERENCES / "timm_vit", classes=None)
    images = np.load(REFERENCES / "timm_vit" / "numbers.npz")["inputs"]
    whole = flops(lambda p, x: model.apply({"params": p}, x), parameters, images)
    both = flops(lambda p, x: tokens.apply(model, p, x, (0, 1)), parameters, images)
    first = flops(lambda p, x: tokens.apply(model, p, x, (0,)), parameters, images)
    assert whole <= both < 1.05 * whole and first < 0.6 * whole


@pytest.mark.parametrize("layers", [3, (), (2,), (-3,), (0.5,), "0"])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(UserError, match=r"layers.*\n  allowed: "):
        tokens.check_layers(layers, 2)
    assert tokens.check_layers(np.array([-1, 0]), 2) == (1, 0)
