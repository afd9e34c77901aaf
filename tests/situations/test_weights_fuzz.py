"""Weights files wrapped, extended and damaged at random: the parameters of the reference, or a true error."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import THOROUGH

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.models.parameters import nested, parameter_shapes
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import files
from vit_jax.weights.save import flattened

REFERENCES = Path(__file__).resolve().parents[1] / "weights" / "references"
OPTIONS = {"heads": 3, "classes": None}  # not all references have a head that is loaded
WRAPPERS = [
    "module", "_orig_mod", "model", "backbone", "encoder", "net", "network", "teacher", "student", "momentum_encoder",
    "base_encoder", "ema", "model_ema", "state_dict", "params", "online_network", "target_network", "vit", "state",
    "visual.trunk", "_fsdp_wrapped_module", "0", "model_state_dict", "ema_model.module",
]  # fmt: skip
ONE = np.ones((2, 3), np.float32)
OTHERS = [
    {"step": np.array(5)},
    {"epoch": np.array([3.0], np.float32)},
    {"optimizer.state.0.exp_avg": ONE, "optimizer.state.0.step": np.array(7.0, np.float32)},
    {"decoder_blocks.0.attn.qkv.weight": ONE, "decoder_embed.bias": ONE[0], "mask_token": ONE},
    {"decoder.decoder_layers.0.attention.attention.query.weight": ONE},
    {"dino_head.mlp.0.weight": ONE, "dino_head.last_layer.weight_g": ONE},
    {"predictor.0.weight": ONE, "projector.1.running_mean": ONE[0], "projector.1.num_batches_tracked": np.array(2)},
    {"text.transformer.resblocks.0.attn.in_proj_weight": ONE, "logit_scale": np.array(3, np.float32)},
    {"text_model.encoder.layer.0.attention.self.query.weight": ONE},
    {"dino_loss.center": ONE, "queue": ONE, "queue_ptr": np.array([0])},
]
DTYPES = [np.float32] * 5 + [np.float16, np.float64, ml_dtypes.bfloat16]


def parameters_of(folder, arrays, config=None):
    """The parameters of a file as it is; None if it is refused."""
    folder.mkdir()
    files.write_safetensors(folder / files.SAFETENSORS, arrays)
    if config is not None:
        (folder / files.CONFIG).write_text(json.dumps(config))
    try:
        return flattened(weights.load(folder, **OPTIONS)[1])
    except UserError:
        return None


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Arrays, config, and parameters with it and without it, of every reference and of two of Google's namings."""
    folder, found = tmp_path_factory.mktemp("originals"), {}
    for path in sorted(REFERENCES.iterdir()):
        stored = files.open_file(path)
        arrays = dict(stored.arrays)
        with_config = parameters_of(folder / path.name, arrays, stored.config)
        found[path.name] = arrays, stored.config, with_config, parameters_of(folder / f"{path.name}-bare", arrays)
        assert with_config is not None
    model = VisionTransformer(classes=5, patch_size=4, width=24, depth=2, heads=3, mlp_width=40)
    generator = np.random.default_rng(0)
    shapes = parameter_shapes(model, (3, 3), 3)
    parameters = {path: generator.normal(size=shape).astype("f") for path, shape in shapes.items()}
    weights.save(folder / "a.npz", model, nested(parameters))
    arrays = dict(files.open_file(folder / "a.npz").arrays)
    parameters = {path: array for path, array in parameters.items() if not path.startswith("head/")}
    linen = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "LayerNorm_2": "LayerNorm_1"}
    linen["MlpBlock_3"] = "MlpBlock_0"
    renamed = {re.sub("|".join(linen), lambda match: linen[match[0]], name): array for name, array in arrays.items()}
    return found | {name: (one, None, None, parameters) for name, one in (("google", arrays), ("linen", renamed))}


def wrapped(name, prefix, separator):
    return separator.join([*prefix.split("."), name]) if prefix else name


def made(generator, arrays):
    """A file made of the arrays: its content, where the model is, whether there is another, and what was damaged."""
    separator = "/" if any("/" in name for name in arrays) else "."
    prefix = ".".join(generator.choice(WRAPPERS, generator.integers(0, 4)))
    dtype = DTYPES[generator.integers(len(DTYPES))]
    other, damage = None, None
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    names = sorted(arrays)
    kind = generator.integers(6)
    if kind == 0:  # one or several arrays are gone
        gone = set(generator.choice(names, generator.integers(1, 3)))
        arrays, damage = {name: array for name, array in arrays.items() if name not in gone}, (sorted(gone), [])
    elif kind == 1:  # an array has another name
        old = str(generator.choice(names))
        new = [f"{old}x", f"x{old}", old.replace("weight", "kernel"), old.replace("_", ""), old.upper(), f"text.{old}"]
        new = new[generator.integers(len(new))]
        if new != old:
            arrays = {new if name == old else name: array for name, array in arrays.items()}
            damage = [old], [new]
    content = {wrapped(name, prefix, separator): array for name, array in arrays.items()}
    if kind == 2:
        other = ".".join(generator.choice(WRAPPERS, generator.integers(1, 4)))
        if other == prefix or not {wrapped(name, other, separator) for name in arrays}.isdisjoint(content):
            other = None
        else:
            content |= {wrapped(name, other, separator): np.asarray(array + 1) for name, array in arrays.items()}
    for number in generator.choice(len(OTHERS), generator.integers(0, 4), replace=False):
        inside = prefix if generator.integers(2) else ".".join(prefix.split(".")[:-1])
        content |= {
            wrapped(name, inside, "."): array
            for name, array in OTHERS[number].items()
            if wrapped(name, inside, ".") not in content and wrapped(name, inside, separator) not in content
        }
    order = generator.permutation(sorted(content))
    return {str(name): content[str(name)] for name in order}, prefix, other, damage, dtype


def check(found, parameters, dtype, damage):
    """All loaded parameters are those of the reference, and only damaged arrays are missing."""
    # A register may be the sum of two arrays.
    tolerance = 4 * float(ml_dtypes.finfo(dtype).eps) if np.dtype(dtype).itemsize == 2 else 0
    for path, array in found.items():
        rounded = parameters[path].astype(dtype).astype(np.float32)
        np.testing.assert_allclose(array, rounded, rtol=0, atol=tolerance, err_msg=path)
    if damage is None:
        assert set(found) == set(parameters)


def true_hint(message, damage):
    """A hint that an array is renamed names the array that was, and its old name."""
    match = re.search(r"\n  (\S+) looks like (\S+) renamed", message)
    if match:
        assert damage is not None, message
        # In a message about a model below a prefix, names are without it.
        for found, names in zip((match[2], match[1]), damage, strict=True):
            assert not names or any(found.endswith(name) or name.endswith(found) for name in names), message


def one_file(generator, originals, folder):
    """Makes one file and loads it; returns what happened."""
    name = str(generator.choice(sorted(originals)))
    arrays, config, with_config, without = originals[name]
    content, prefix, other, damage, dtype = made(generator, arrays)
    files.write_safetensors(folder / files.SAFETENSORS, content)
    (folder / files.CONFIG).unlink(missing_ok=True)
    parameters = without
    if config is not None and generator.integers(3):
        (folder / files.CONFIG).write_text(json.dumps(config))
        parameters = with_config
    try:
        found = flattened(weights.load(folder, **OPTIONS)[1])
    except UserError as error:
        message = str(error)
        assert message.count("\n") <= 2 and "Traceback" not in message, message
        true_hint(message, damage)
        if parameters is None:
            return "refused without config.json, as the reference"
        if other is None:
            assert damage is not None, (name, prefix, sorted(content), message)
            return "refused"
        assert re.search(rf"models: .*(?:{re.escape(prefix)}|\"\")", message) and other in message, message
        found = flattened(weights.load(folder, prefix=prefix, **OPTIONS)[1])
        check(found, parameters, dtype, None)
        return "chosen"
    assert other is None, (name, prefix, other)
    check(found, parameters, dtype, damage)
    return "loaded" if damage is None else "loaded without an optional array"


@pytest.mark.slow
def test_random_files(originals, tmp_path):
    generator = np.random.default_rng(0)
    counts = {}
    for _ in range(500 if THOROUGH else 60):
        result = one_file(generator, originals, tmp_path)
        counts[result] = counts.get(result, 0) + 1
    print(counts)
    assert set(counts) >= {"loaded", "refused", "chosen"}
