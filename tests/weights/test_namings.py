"""Against transformers, open_clip and torchvision, as make_tower_references.py has recorded them."""

import functools
import importlib.util
import json
import re
import shutil

import jax
import numpy as np
import pytest
from helpers import ROOT, mostly_slow

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.weights import files, registry
from vit_jax.weights.save import flattened

# What a recording without a config.json is of.
OVERRIDES = {
    name: {"heads": 3}
    for name in ("torchvision", "torchvision_pre_logits", "openai", "dinov3_swiglu_state_dict", "beit_state_dict")
}
NAMES = [
    *("clip", "clip_vision", "clip_classifier", "siglip", "siglip_classifier", "siglip2_naflex"),
    *("dinov3", "dinov3_swiglu", "dinov3_swiglu_state_dict"),
    *("beit", "beit_state_dict", "beit_shared", "data2vec", "aimv2", "internvl"),
    *("openai", "openclip", "openclip_quickgelu", "torchvision", "torchvision_pre_logits"),
]


def test_every_recording_is_that_of_one_family(references):
    recorded = [name for family in registry.FAMILIES for name in family.recordings]
    assert sorted(recorded) == sorted(folder.name for folder in references.iterdir())
    assert {name for name in recorded if not name.startswith(("timm_", "hf_"))} == set(NAMES)
    for family in registry.FAMILIES:
        assert all((family.models, family.naming, family.examples, family.recordings, family.licence)), family
        assert family.checked_against in ("timm", "transformers", "open_clip", "torchvision")
        assert family.tolerance <= 1e-5


def test_the_table_of_the_page_is_the_generated_one():
    spec = importlib.util.spec_from_file_location("families_page", ROOT / "docs" / "families.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text()
    assert len(registry.FAMILIES) > 10 and script.table() in page
    assert page == script.markdown(page), "run python docs/families.py"


@pytest.mark.parametrize("name", mostly_slow(NAMES, 10))
def test_the_libraries_numbers(references, helpers, name):
    overrides, recorded = OVERRIDES.get(name, {}), np.load(references / name / "numbers.npz")
    model, parameters, report = weights.load(references / name, **overrides)
    helpers.covers(report, files.open_file(references / name).shapes, flattened(parameters))
    features = model.clone(classes=None, pre_logits=None)
    models = {"outputs": model, "pooled": features}
    if any(key.startswith(("tokens", "patches")) for key in recorded):
        models |= dict.fromkeys(("tokens", "patches"), features.clone(pooling="none"))

    @functools.partial(jax.jit, static_argnums=2)
    def outputs(parameters, images, kinds):
        return {kind: models[kind].apply({"params": parameters}, images) for kind in kinds}

    def compare(inputs, suffix):
        kinds = tuple(kind for kind in models if kind + suffix in recorded)
        for kind, found in outputs(parameters, recorded[inputs], kinds).items():
            wanted = recorded[kind + suffix]
            found = found[:, -wanted.shape[1] :] if kind == "patches" else found
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=kind + suffix)

    with jax.default_matmul_precision("highest"):
        compare("inputs", "")
        for key in recorded:
            if key.startswith("inputs_"):
                compare(key, key.removeprefix("inputs"))


def renamed(folder, source, pattern, replacement):
    """A copy of a recording whose names are changed, without its config.json."""
    stored = files.open_file(source)
    arrays = {re.sub(pattern, replacement, name): array for name, array in stored.arrays.items()}
    files.write_safetensors(folder / "model.safetensors", arrays)
    return folder


SPELLINGS = {
    "transformers 5": ("dinov3", "^layer", "model.layer"),
    "layers": ("dinov3", r"^layer\.", "layers."),
    "encoder.layer": ("dinov3", "^layer", "encoder.layer"),
    "a wrapper of the same name": ("dinov3", "^", "model."),
    "no prefix": ("clip_classifier", "^vision_model.", ""),
    "MLP of old files": ("torchvision", r"mlp\.([03])", lambda match: f"mlp.linear_{1 + int(match[1]) // 3}"),
    "the image tower alone": ("openclip_quickgelu", "^visual.", ""),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_of_the_names(references, tmp_path, helpers, name):
    source, *change = SPELLINGS[name]
    if name == "the image tower alone":  # without the text tower, whose names would be the same
        stored = files.open_file(references / source)
        arrays = {key: array for key, array in stored.arrays.items() if key.startswith("visual.")}
        files.write_safetensors(tmp_path / "towers" / "model.safetensors", arrays)
        references, source = tmp_path, "towers"
    _, wanted, _ = weights.load(references / source, heads=3)
    _, found, _ = weights.load(renamed(tmp_path / "renamed", references / source, *change), heads=3)
    helpers.same(found, wanted)


def test_the_names_of_internvits_own_code(references, tmp_path, helpers):
    """As of InternVL in transformers, with fused queries, keys and values."""
    names = {
        "encoder.layer.": "encoder.layers.",
        "lambda_": "ls",
        "layernorm_before": "norm1",
        "cls_token": "class_embedding",
    }
    names |= {
        "layernorm_after": "norm2",
        "patch_embeddings.projection": "patch_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
    }
    names |= {"attention.projection_layer": "attn.proj"}
    arrays = dict(files.open_file(references / "internvl").arrays)
    for name in [name for name in arrays if "q_proj" in name]:
        parts = [arrays.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        arrays[name.replace("attention.q_proj", "attn.qkv")] = np.concatenate(parts)
    for old, new in names.items():
        arrays = {f"{name.replace(old, new)}": array for name, array in arrays.items()}
    arrays = {f"vision_model.{name}": array for name, array in arrays.items()}
    files.write_safetensors(tmp_path / "model.safetensors", arrays)
    model, found, _ = weights.load(tmp_path, heads=3)
    same, wanted, _ = weights.load(references / "internvl")
    assert model == same
    helpers.same(found, wanted)


def test_conventions_where_there_is_no_json_file(references, tmp_path):
    def options(name):
        model, _, report = weights.load(renamed(tmp_path / name, references / name, "^$", ""), heads=3)
        return model.gelu, model.layer_norm_epsilon, model.pooling, report.normalization

    assert options("clip") == ("quick", 1e-5, "token", "clip")
    assert options("siglip") == ("tanh", 1e-6, "map", "half")
    assert options("openai") == ("quick", 1e-5, "token", "clip")
    assert options("openclip_quickgelu") == ("exact", 1e-5, "token", "clip")
    assert options("torchvision") == ("exact", 1e-6, "token", "imagenet")
    assert options("dinov3") == ("exact", 1e-5, "token", "imagenet")
    assert weights.load(references / "openclip")[2].statistics == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert weights.load(references / "dinov3")[2].image_size == (32, 32)
    # The override is for what no file says.
    assert weights.load(tmp_path / "openclip_quickgelu", heads=3, gelu="quick")[0].gelu == "quick"


# What is changed in a JSON file, overrides, and what the message says.
REFUSED = [
    ("dinov3", {}, {"position": "rotary"}, r"position is 'rotary', but the file has 'dinov3'\n  omit position"),
    ("dinov3", {"rope_theta": 10.0}, {}, r"config.json has rope_theta 10.0\n  allowed: 100.0"),
    ("dinov3", {"num_register_tokens": 3}, {}, "it has num_register_tokens 3, but the file has 2"),
    ("dinov3_swiglu", {"hidden_act": "gelu"}, {}, r"an MLP with a gate and 'exact'\n  allowed: a gate with 'silu'"),
    ("clip", {}, {"gelu": "exact"}, "gelu is 'exact', but it is 'quick' by transformers' default"),
    ("clip", {}, {"pooling": "mean"}, r"pooling is 'mean', but the file's head reads 'token'\n  omit pooling"),
    ("clip_vision", {}, {"gelu": "quick"}, "gelu is 'quick', but it is 'exact' by config.json"),
    ("clip_vision", {"model_type": "siglip"}, {}, r"config.json has model_type 'siglip'\n  allowed: clip, "),
    ("clip_vision", {"hidden_act": "relu"}, {}, r"config.json has hidden_act 'relu'\n  allowed: gelu"),
    ("siglip", {}, {"pooling": "mean"}, r"pooling is 'mean', but the file has 'map'\n  omit pooling"),
    ("openclip", {"model_cfg": {"vision_cfg": {"pool_type": "avg"}}}, {}, r"has pool_type 'avg'\n  allowed: 'tok'"),
    ("openclip", {}, {"gelu": "quick"}, "gelu is 'quick', but it is 'exact' by open_clip_config.json"),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_is_refused(references, tmp_path, case):
    name, change, overrides, message = case
    shutil.copytree(references / name, tmp_path / name)
    path = next((tmp_path / name).glob("*config.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as caught:
        weights.load(tmp_path / name, **overrides)
    assert str(caught.value).count("\n") <= 2


@pytest.mark.parametrize("name", mostly_slow(["clip", "siglip", "openai", "dinov3", "torchvision"], 5))
def test_an_array_that_is_missing_is_named(references, tmp_path, name):
    stored = files.open_file(references / name)
    is_tower = re.compile(r"(?!logit|context|input|vocab|text_|transformer|ln_final|token_|positional)").match
    required = [one for one in stored.arrays if is_tower(one) and "position_ids" not in one]
    for number, gone in enumerate(required[:: len(required) // 8]):
        if re.search("projection|mask_token|visual.proj$|register", gone):
            continue
        folder = tmp_path / str(number)
        arrays = {one: array for one, array in stored.arrays.items() if one != gone}
        files.write_safetensors(folder / "model.safetensors", arrays)
        with pytest.raises(UserError, match=re.escape(gone.split(".", 1)[-1])):
            weights.load(folder, heads=3)


def test_a_tower_of_timm_in_a_file_of_open_clip(references, tmp_path, helpers):
    trunk = {f"visual.trunk.{key}": array for key, array in files.open_file(references / "timm_vit").arrays.items()}
    trunk = {key: array for key, array in trunk.items() if "head" not in key}
    projection = np.random.default_rng(0).normal(size=(6, 12)).astype("f")
    text = {
        "text.transformer.resblocks.0.attn.in_proj_weight": np.ones((24, 8), "f"),
        "logit_scale": np.array(3, np.float32),
    }
    files.write_safetensors(tmp_path / "model.safetensors", {**trunk, **text, "visual.head.proj.weight": projection})
    vision = {"timm_model_name": "vit_base_patch16_siglip_gelu_tanh", "timm_pool": "avg"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    model, parameters, _ = weights.load(tmp_path, heads=3)
    _, wanted, _ = weights.load(references / "timm_vit", classes=None)
    assert model.classes == 6 and model.pooling == "mean"
    np.testing.assert_array_equal(parameters["head"]["logits"]["kernel"], projection.T)
    head = parameters.pop("head")
    assert not head["logits"]["bias"].any()
    helpers.same(parameters, wanted)
    # A projection of several layers is not read, and not left out in silence.
    layers = {f"visual.head.mlp.{name}.weight": projection for name in ("fc1", "fc2")}
    files.write_safetensors(tmp_path / "model.safetensors", {**trunk, **text, **layers})
    with pytest.raises(UserError, match=r"visual.head.mlp.fc1.weight, .*several layers.*\n  pass classes=N"):
        weights.load(tmp_path, heads=3)


def test_no_registers_are_an_empty_array(references, tmp_path, helpers):
    """As transformers saves DINOv3 and DINOv2 without registers."""
    arrays = dict(files.open_file(references / "dinov3").arrays)
    name = next(name for name in arrays if name.endswith("register_tokens"))
    arrays[name] = arrays[name][:, :0]
    config = json.loads((references / "dinov3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_register_tokens": 0}))
    files.write_safetensors(tmp_path / "model.safetensors", arrays)
    model, _, report = weights.load(tmp_path)
    assert model.registers == 0 and model.position == "dinov3" and "empty: the model has no registers" in str(report)
