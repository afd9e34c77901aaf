"""Against timm and transformers themselves, as make_references.py has recorded them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.weights import files
from vit_jax.weights.save import flattened

# What a recording is of, where it is not what comes out by itself: all tokens, or the features of two heads.
OVERRIDES = {
    "hf_vit": {"pooling": "none"},
    "hf_dinov2": {"pooling": "none"},
    "hf_dinov2_registers": {"pooling": "none"},
    "hf_dinov2_registers_swiglu": {"pooling": "none"},
    "hf_dinov2_registers_swiglu_state_dict": {"pooling": "none", "heads": 3},
    "hf_vit_classifier_state_dict": {"heads": 3},
    "hf_dinov2_classifier": {"pooling": "none", "classes": None},
    "hf_deit_teacher": {"pooling": "token", "classes": None},
    "hf_mae": {"pooling": "none"},
    "hf_mae_pretraining": {"pooling": "none"},
    "timm_distilled": {"heads": 3},
    "timm_dinov3": {"pooling": "none"},
    "timm_dinov3_qkvb": {"pooling": "none"},
    "timm_dinov3_swiglu": {"pooling": "none"},
}
NAMES = [
    *("timm_vit", "timm_headless", "timm_grey", "timm_registers", "timm_registers_with_rows", "timm_map"),
    *("timm_fc_norm", "timm_gap", "timm_unpooled", "timm_qk_norm", "timm_swiglu", "timm_wide", "timm_distilled"),
    *("timm_hybrid", "timm_hybrid_root", "timm_dinov3", "timm_dinov3_qkvb", "timm_dinov3_swiglu", "timm_eva"),
    *("timm_eva02", "timm_eva02_small", "timm_rope", "timm_rope_ape", "timm_rope_registers", "timm_pe"),
    *("timm_pe_spatial", "timm_beit", "timm_beit_shared", "timm_beit3", "timm_clip", "timm_clip_quickgelu"),
    *("timm_aimv2", "timm_radio"),
    *("hf_vit", "hf_vit_classifier", "hf_vit_classifier_state_dict", "hf_vit_tanh", "hf_deit", "hf_deit_teacher"),
    *("hf_dinov2", "hf_dinov2_classifier", "hf_dinov2_registers", "hf_dinov2_registers_swiglu"),
    *("hf_dinov2_registers_swiglu_state_dict", "hf_mae", "hf_mae_pretraining"),
]


def test_every_recording_is_tried(references):
    names = {folder.name for folder in references.iterdir()}
    assert {name for name in names if name.startswith(("timm_", "hf_"))} == set(NAMES)  # others: test_namings.py


@pytest.mark.parametrize("name", mostly_slow(NAMES, 9))
def test_the_libraries_numbers(references, helpers, name):
    model, parameters, report = weights.load(references / name, **OVERRIDES.get(name, {}))
    recorded = np.load(references / name / "numbers.npz")
    found = helpers.outputs(model, parameters, recorded["inputs"])
    np.testing.assert_allclose(found, recorded["outputs"], rtol=0, atol=1e-5)
    helpers.covers(report, files.open_file(references / name).shapes, flattened(parameters))


SIZES = [
    *("timm_dinov3", "hf_dinov2_registers", "timm_vit", "timm_registers", "timm_map", "timm_clip", "timm_eva02"),
    *("hf_vit_classifier", "hf_deit", "hf_dinov2_classifier", "clip_classifier", "siglip", "timm_dinov3_qkvb"),
    "timm_dinov3_swiglu",
]


def test_every_recording_of_other_sizes_is_tried(references):
    assert sorted(SIZES) == sorted(path.parent.name for path in references.glob("*/sizes.npz"))


@pytest.mark.parametrize("name", mostly_slow(SIZES, 14))
def test_other_sizes_and_images_that_are_not_square(references, helpers, name):
    """Learned positions are resampled as by the library itself, as make_size_references.py has recorded it."""
    recorded = np.load(references / name / "sizes.npz")
    overrides = {"pooling": "none", "classes": None} if name == "clip_classifier" else OVERRIDES.get(name, {})
    overrides = {} if name == "hf_dinov2_classifier" else overrides  # its logits
    sizes = [size.removeprefix("inputs_") for size in recorded if size.startswith("inputs_")]
    for size in sizes:
        height, width = map(int, size.split("x"))
        model, parameters, _ = weights.load(references / name, image_size=(height, width), **overrides)
        found = helpers.outputs(model, parameters, recorded[f"inputs_{size}"])
        np.testing.assert_allclose(found, recorded[f"outputs_{size}"], rtol=0, atol=1e-5)
    assert len(sizes) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm_map", "timm_registers"])
def test_without_compilation_too(references, name):
    model, parameters, _ = weights.load(references / name)
    recorded = np.load(references / name / "numbers.npz")
    found = model.apply({"params": parameters}, jax.numpy.asarray(recorded["inputs"]))
    np.testing.assert_allclose(found, recorded["outputs"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_wrong_gelu_or_position_of_the_norm_gives_other_outputs(references, helpers):
    """The recorded outputs differ by more than the tolerance from those of the nearest mistake."""
    for name, wrong in {"hf_vit_tanh": "exact", "timm_vit": "tanh", "timm_map": "exact"}.items():
        model, parameters, _ = weights.load(references / name, gelu=wrong)
        recorded = np.load(references / name / "numbers.npz")
        assert np.abs(helpers.outputs(model, parameters, recorded["inputs"]) - recorded["outputs"]).max() > 4e-5, name
    model, parameters, _ = weights.load(references / "timm_fc_norm")
    moved = {**parameters, "encoder": {**parameters["encoder"], "norm": parameters["norm"]}}
    del moved["norm"]
    recorded = np.load(references / "timm_fc_norm" / "numbers.npz")
    found = helpers.outputs(model.clone(norm_after_pooling=False), moved, recorded["inputs"])
    assert np.abs(found - recorded["outputs"]).max() > 1e-2


def test_a_wrong_position_embedding_is_refused_by_the_name_of_the_right_one(references):
    """None of these turns a file into another function: before, DINOv3 loaded as a model of 'rotary' positions."""
    for name, right in {"timm_dinov3": "dinov3", "timm_eva02": "learned_eva02", "timm_rope": "rotary"}.items():
        for wrong in ("none", "rotary" if right != "rotary" else "dinov3", "learned"):
            with pytest.raises(UserError, match=f"position is '{wrong}', but the file has '{right}'\n  omit position"):
                weights.load(references / name, position=wrong)


def test_arrays_of_two_families_alike_are_told_apart_by_the_config(references, tmp_path):
    """DeiT III and a ViT with table and rotation have arrays of the same names and shapes."""
    shutil.copytree(references / "timm_rope_ape", tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    model, _, report = weights.load(tmp_path / "copy", heads=3)
    assert model.position == "learned"
    assert ("position", "learned", "convention of timm's models") in [dataclasses.astuple(d) for d in report.decisions]
    assert weights.load(tmp_path / "copy", heads=3, position="learned_rotary")[0].position == "learned_rotary"


def as_meta(stored):
    """Arrays of timm's DINOv3 by the names of the published code, as its files have them."""
    arrays = {}
    for name, array in stored.arrays.items():
        for timms, theirs in (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
            name = name.replace(timms, theirs)
        for timms, theirs in (("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2")):
            name = name.replace(timms, theirs)
        gated = "blocks.0.mlp.fc1_g.weight" in stored.shapes
        arrays[name.replace("mlp.fc2", "mlp.w3") if gated else name] = array
    for block in range(2):
        start = f"blocks.{block}.attn."
        ones, zeros = np.ones(12, "f"), np.zeros(12, "f")
        if f"{start}q_bias" in arrays:
            query, value = arrays.pop(f"{start}q_bias"), arrays.pop(f"{start}v_bias")
            # The bias of the keys is masked, whatever it is.
            arrays[f"{start}qkv.bias"] = np.concatenate([query, ones, value])
            arrays[f"{start}qkv.bias_mask"] = np.concatenate([ones, zeros, ones])
    return arrays | {"rope_embed.periods": np.ones(1, "f"), "mask_token": np.ones((1, 12), "f")}


@pytest.mark.parametrize("name", ["timm_dinov3", "timm_dinov3_qkvb", "timm_dinov3_swiglu"])
def test_dinov3_in_the_names_of_its_code(references, helpers, tmp_path, name):
    stored = files.open_file(references / name)
    files.write_safetensors(tmp_path / "model.safetensors", as_meta(stored))
    model, parameters, report = weights.load(tmp_path, heads=3)
    timms, expected, _ = weights.load(references / name, pooling="token")
    assert model == timms
    helpers.same(parameters, expected)
    assert "which the model computes" in str(report)


ROUND = [
    *("timm_vit", "timm_registers", "timm_map", "timm_fc_norm", "timm_gap", "timm_qk_norm", "timm_swiglu"),
    *("timm_wide", "timm_clip", "timm_clip_quickgelu", "timm_beit3", "timm_dinov3", "timm_dinov3_qkvb"),
]


@pytest.mark.parametrize("name", mostly_slow(ROUND, 4))
def test_timms_files_come_back_bit_for_bit(references, tmp_path, name):
    model, parameters, report = weights.load(references / name)
    weights.save(tmp_path / "model.safetensors", model, parameters, report.image_size or (12, 12), report.channels)
    before, after = files.open_file(references / name), files.open_file(tmp_path)
    assert dict(before.shapes) == dict(after.shapes)
    for array in before.arrays:
        np.testing.assert_array_equal(after.arrays[array], before.arrays[array], err_msg=array, strict=True)
    # And its config.json holds everything that the arrays do not.
    again, _, second = weights.load(tmp_path)
    assert again.clone(layer_scale=None) == model.clone(layer_scale=None)
    assert {one.source for one in second.decisions} == {"config.json"} or model.position == "none"


@pytest.mark.parametrize("name", ["hf_deit_teacher", "hf_dinov2_classifier"])
def test_the_logits_of_heads_on_two_features(references, helpers, name):
    model, parameters, _ = weights.load(references / name)
    inputs, wanted = (np.load(references / name / f"{one}.npz") for one in ("numbers", "logits"))
    found = helpers.outputs(model, parameters, inputs["inputs"])
    np.testing.assert_allclose(found, wanted["logits"], rtol=0, atol=1e-5)


def test_an_unsupported_head_is_not_loaded_in_part(references, tmp_path):
    arrays = dict(files.open_file(references / "hf_deit_teacher").arrays)
    del arrays["distillation_classifier.bias"]
    files.write_safetensors(tmp_path / "model.safetensors", arrays)
    with pytest.raises(UserError, match=r"(?s)head.*\n.*pass classes=N for a new head, or classes=None") as caught:
        weights.load(tmp_path, heads=3)
    assert str(caught.value).count("\n") <= 2
    # As many classes as the file's own head has: still a new one.
    model, parameters, report = weights.load(tmp_path, heads=3, classes=5)
    assert model.classes == 5 and not parameters["head"]["logits"]["kernel"].any()
    assert all("head" in row.detail for row in report.rows if row.action == "ignored" and "mask" not in row.names[0])


def test_unsupported_configs_are_refused(references, tmp_path):
    cases = [
        (("timm_vit", "architecture", "vit_base_patch16_rpn_224"), "LayerNorms after attention and MLP"),
        (("timm_vit", "num_features", 768), "config.json is of another model: it has num_features 768"),
        (
            ("timm_registers", "model_args", {"reg_tokens": 3, "num_heads": 3}),
            "it has reg_tokens 3, but the file has 4",
        ),
        (("timm_vit", "model_args", {"depth": 3, "num_heads": 3}), "it has depth 3, but the file has 2"),
        (("hf_vit", "num_hidden_layers", 3), "it has num_hidden_layers 3, but the file has 2"),
        (("timm_vit", "global_pool", "max"), "global_pool 'max'"),
        (("timm_vit", "model_args", [3]), r"config.json has model_args \[3\]: it must be of type dict"),
        (("timm_vit", "global_pool", 7), "config.json has global_pool 7: it must be of type str"),
        (("hf_vit", "layer_norm_eps", "small"), "config.json has layer_norm_eps 'small': it must be of type float"),
        (("hf_vit", "hidden_act", "relu"), "hidden_act 'relu'"),
        (("hf_vit", "model_type", "audio-spectrogram-transformer"), "model_type 'audio-spectrogram-transformer'"),
        (("hf_vit", "hidden_size", 768), "config.json is of another model"),
        (("hf_vit", "num_attention_heads", 5), "heads is 5, which does not divide"),
    ]
    for number, ((name, key, value), message) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(references / name, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=message):
            weights.load(folder)


def test_the_number_of_heads_is_inferred_only_for_usual_widths(references, tmp_path, helpers):
    folder = tmp_path / "copy"
    shutil.copytree(references / "timm_vit", folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"how many attention heads share its width of 12\n.*pass heads=N"):
        weights.load(folder)
    model, parameters = helpers.small(width=128, heads=2, gelu="exact")
    weights.save(tmp_path / "wide.safetensors", model, parameters, (32, 32))
    stored = files.open_file(tmp_path / "wide.safetensors")
    (tmp_path / "bare").mkdir()
    files.write_safetensors(tmp_path / "bare" / "wide.safetensors", dict(stored.arrays))
    found, _, report = weights.load(tmp_path / "bare")
    assert found == model
    assert "heads 2: convention of timm's models" in str(report)


FOREIGN = {
    "norm_pre.weight": "missing: norm_pre.bias",
    "blocks.0.attn.rel_pos.weight": "blocks.0.attn.rel_pos.weight: .* relative positions that a network computes",
    "rope.freqs": "rope.freqs: the model has rotary positions with learned frequencies",
    "patch_embed.backbone.conv1.0.weight": "patch_embed.backbone....: only ResNet v2 is supported as a stem",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_unsupported_parts_are_named(references, tmp_path, name):
    stored = files.open_file(references / "timm_vit")
    files.write_safetensors(tmp_path / "model.safetensors", {**stored.arrays, name: np.ones(12, "f")})
    with pytest.raises(UserError, match=FOREIGN[name]):
        weights.load(tmp_path, heads=3)


def test_blocks_with_huge_numbers_are_refused(references, tmp_path):
    for kind, name in (("timm_vit", "blocks.{}.norm1.weight"), ("hf_vit", "encoder.layer.{}.layernorm_before.bias")):
        stored = files.open_file(references / kind)
        far = {name.format(10**12): np.ones(12, "f")}
        files.write_safetensors(tmp_path / "model.safetensors", {**stored.arrays, **far})
        with pytest.raises(UserError, match=f"{name.format(10**12)} has too large a number: the file has only"):
            weights.load(tmp_path, heads=3)


def test_half_precision_is_converted_and_reported(references, tmp_path):
    stored = files.open_file(references / "timm_vit")
    halves = {name: np.asarray(array, np.float16) for name, array in stored.arrays.items()}
    files.write_safetensors(tmp_path / "model.safetensors", halves)
    _, parameters, report = weights.load(tmp_path, heads=3)
    assert all("float16 -> float32" in row.detail for row in report.rows)
    np.testing.assert_array_equal(parameters["class_token"], halves["cls_token"].astype(np.float32), strict=True)
    whole = {name: np.zeros(array.shape, np.int8) for name, array in halves.items()}
    files.write_safetensors(tmp_path / "model.safetensors", whole)
    with pytest.raises(UserError, match="int8: parameters must be floating-point numbers"):
        weights.load(tmp_path, heads=3)


# Changes of config.json, and what they give: a value of the model, or a refusal. timm's models differ accordingly.
ARGUMENTS = [
    ("timm_eva02", {"ref_feat_shape": [8, 8]}, ("position_grid", 8)),
    ("timm_pe", {"attn_pool_num_heads": 4}, ("pool_heads", 4)),
    ("timm_eva02", {"use_post_norm": True}, "use_post_norm True"),
    ("timm_eva02_small", {"use_rot_pos_emb": False}, "use_rot_pos_emb False"),
    ("timm_dinov3", {"rope_rotate_half": False}, "rope_rotate_half False"),
    ("timm_rope", {"ref_feat_shape": [14, 14]}, "ref_feat_shape"),
    ("timm_vit", {"norm_layer": "simplenorm"}, "norm_layer 'simplenorm'"),
    ("timm_vit", {"use_rot_pos_emb": True}, "use_rot_pos_emb True"),
]


@pytest.mark.parametrize("case", ARGUMENTS, ids=str)
def test_arguments_in_the_config_are_read_or_refused(references, tmp_path, case):
    name, change, expected = case
    shutil.copytree(references / name, tmp_path / name)
    config = json.loads((references / name / "config.json").read_text())
    (tmp_path / name / "config.json").write_text(json.dumps({**config, "model_args": config["model_args"] | change}))
    if isinstance(expected, tuple):
        assert getattr(weights.load(tmp_path / name)[0], expected[0]) == expected[1]
        return
    with pytest.raises(UserError, match=expected):
        weights.load(tmp_path / name)


def test_an_override_of_an_open_position_orders_the_channels(references, helpers, tmp_path):
    shutil.copy(references / "timm_rope_ape" / "model.safetensors", tmp_path)
    model, parameters, _ = weights.load(tmp_path, heads=3, position="learned_rotary")
    recorded = np.load(references / "timm_rope_ape" / "numbers.npz")
    found = helpers.outputs(model, parameters, recorded["inputs"])
    np.testing.assert_allclose(found, recorded["outputs"], rtol=0, atol=1e-5)


def test_attention_pooling_beside_tokens_that_timm_leaves_out_is_refused(references, tmp_path):
    stored = files.open_file(references / "timm_map")
    arrays = {**stored.arrays, "cls_token": np.zeros((1, 1, 12), "f")}
    files.write_safetensors(tmp_path / "model.safetensors", arrays)
    shutil.copy(references / "timm_map" / "config.json", tmp_path)
    with pytest.raises(UserError, match="attn_pool and tokens before the patches"):
        weights.load(tmp_path)
