"""The published implementation's own numbers: its parameters in our tree give its logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.vit import VisionTransformer

FIELDS = {"classes": 10, "width": 96, "depth": 2, "heads": 3, "mlp_width": 192}


def block(arrays, prefix, names):
    """One encoder block; `names` are its attention, MLP and second norm in the file."""
    attention, mlp, norm = names
    parts = [arrays[f"{prefix}{attention}/{part}/kernel"].reshape(96, 96) for part in ("query", "key", "value")]
    biases = [arrays[f"{prefix}{attention}/{part}/bias"].reshape(96) for part in ("query", "key", "value")]

    def pick(name):
        return {part: arrays[f"{prefix}{name}/{part}"] for part in ("scale", "bias")}

    def dense(name):
        return {part: arrays[f"{prefix}{name}/{part}"] for part in ("kernel", "bias")}

    out = dense(f"{attention}/out")
    return {
        "norm_attention": pick("LayerNorm_0"),
        "attention": {
            "qkv": {"kernel": np.concatenate(parts, 1), "bias": np.concatenate(biases)},
            "out": {"kernel": out["kernel"].reshape(96, 96), "bias": out["bias"]},
        },
        "norm_mlp": pick(norm),
        "mlp": {"up": dense(f"{mlp}/Dense_0"), "down": dense(f"{mlp}/Dense_1")},
    }


def ours(arrays, names):
    """The tree of `VisionTransformer` from the published names."""
    kernel = arrays["embedding/kernel"]
    blocks = {f"block_{i}": block(arrays, f"Transformer/encoderblock_{i}/", names) for i in range(2)}
    norm = {part: arrays[f"Transformer/encoder_norm/{part}"] for part in ("scale", "bias")}
    tree = {
        "class_token": arrays["cls"],
        "embedding": {"projection": {"kernel": kernel.reshape(-1, kernel.shape[-1]), "bias": arrays["embedding/bias"]}},
        "positions": {"table": arrays["Transformer/posembed_input/pos_embedding"]},
        "encoder": {**blocks, "norm": norm},
        "head": {"logits": {"kernel": arrays["head/kernel"], "bias": arrays["head/bias"]}},
    }
    return jax.tree.map(jnp.asarray, tree)


def compare(model, parameters, goldens, kind):
    inputs = jnp.asarray(np.load(goldens / f"inputs_{kind}.npy"))
    with jax.default_matmul_precision("highest"):
        logits, captured = jax.jit(
            partial(model.apply, capture_intermediates=lambda module, _: module.name == "encoder")
        )({"params": parameters}, inputs)
    encoded = captured["intermediates"]["encoder"]["__call__"][0]
    np.testing.assert_allclose(
        encoded[0], np.load(goldens / f"encoded_{kind}.npy").reshape(encoded[0].shape), atol=2e-5
    )
    np.testing.assert_allclose(logits, np.load(goldens / f"logits_{kind}.npy"), rtol=0, atol=1e-5)


def test_a_plain_model_gives_the_published_logits(goldens):
    arrays = dict(np.load(goldens / "params_token.npz"))
    parameters = ours(arrays, ("MultiHeadDotProductAttention_0", "MlpBlock_0", "LayerNorm_1"))
    compare(VisionTransformer(patch_size=4, **FIELDS), parameters, goldens, "token")


def stem(arrays):
    """The ResNet of the hybrid; published scales and biases are [1, 1, 1, C]."""

    def norm(name):
        return {part: arrays[f"{name}/{part}"].reshape(-1) for part in ("scale", "bias")}

    tree = {"convolution_root": {"kernel": arrays["conv_root/kernel"]}, "norm_root": norm("gn_root")}
    for stage in (0, 1):
        prefix = f"block{stage + 1}/unit1"
        unit = {f"convolution_{i}": {"kernel": arrays[f"{prefix}/conv{i}/kernel"]} for i in (1, 2, 3)}
        unit |= {f"norm_{i}": norm(f"{prefix}/gn{i}") for i in (1, 2, 3)}
        unit |= {"convolution_projection": {"kernel": arrays[f"{prefix}/conv_proj/kernel"]}}
        tree[f"stage_{stage}_unit_0"] = {**unit, "norm_projection": norm(f"{prefix}/gn_proj")}
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.slow
def test_a_hybrid_gives_the_published_logits(goldens):
    arrays = dict(np.load(goldens / "params_hybrid.prelinen.npz"))
    parameters = ours(arrays, ("MultiHeadDotProductAttention_1", "MlpBlock_3", "LayerNorm_2"))
    model = VisionTransformer(patch_size=1, stem=(1, 1), stem_width=32, **FIELDS)
    compare(model, {**parameters, "stem": stem(arrays)}, goldens, "hybrid")
