import json
import subprocess
import zipfile

import numpy as np
import pytest
from helpers import run_command

from vit_jax import convert, weights
from vit_jax.weights import files


def run(capsys, *arguments):
    """Exit status, what was printed, what was complained of."""
    status = convert.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_there_and_back_through_both_formats(goldens, tmp_path, capsys, helpers):
    source = goldens / "params_token.prelinen.npz"
    there, back = tmp_path / "there" / "model.safetensors", tmp_path / "back.npz"
    there.parent.mkdir()
    assert run(capsys, source, there)[0] == 0
    status, printed, _ = run(capsys, there, back, "--verbose")
    assert status == 0
    assert "blocks.0.attn.qkv.weight -> encoder/block_0/attention/qkv/kernel" in printed
    before, after = dict(np.load(source)), dict(np.load(back))
    assert sorted(before) == sorted(after)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name, strict=True)
    # What timm's names cannot say of the GELU, the config.json says: still tanh.
    assert weights.load(there)[0] == weights.load(source)[0]


def test_flags_become_overrides(goldens, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    flags = ["--image_size=24x40", "--patch_size=8", "--classes=3", "--channels=1", "--to=timm"]
    status, printed, _ = run(capsys, goldens / "params_token.npz", target, *flags)
    assert status == 0
    assert "grid 8x8 -> 3x5" in printed and "patch 4 -> 8" in printed and "channels 3 -> 1, summed" in printed
    shapes = files.open_file(target).shapes
    assert shapes["patch_embed.proj.weight"] == (96, 1, 8, 8)
    assert (shapes["pos_embed"], shapes["head.weight"]) == ((1, 16, 96), (3, 96))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["img_size"] == [24, 40] and config["num_classes"] == 3
    status, _, _ = run(capsys, target, tmp_path / "features.npz", "--classes=none")
    assert status == 0 and "head/kernel" not in np.load(tmp_path / "features.npz").files
    assert weights.load(tmp_path / "features.npz", image_size=(24, 40))[2].image_size == (24, 40)


WRONG = [
    (["missing.npz", "out.npz"], "missing.npz: there is no such file"),
    (["{golden}", "out.bin"], "out.bin: unknown file name suffix '.bin'"),
    (["{golden}", "out.npz", "--to=timm"], "allowed: .safetensors for timm"),
    (["{golden}", "out.npz", "--classes=many"], "--classes=many"),
    (["{golden}", "out.npz", "--image_size=1x2x3"], "--image_size=1x2x3"),
    (["{golden}", "out.npz", "--step=last"], "--step is 'last'"),
    (["{hybrid}", "out.safetensors"], "timm's models do not support stem=(1, 1), stem_width=32"),
    (["{golden}", "/dev/null/out.npz"], "/dev/null"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_mistakes_are_reported_in_at_most_three_lines(goldens, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    names = {"golden": goldens / "params_token.npz", "hybrid": goldens / "params_hybrid.prelinen.npz"}
    status, printed, complaint = run(capsys, *(argument.format(**names) for argument in arguments))
    assert status == 2 and not printed
    assert complaint.startswith("error: ") and message in complaint and complaint.count("\n") <= 3
    assert not list(tmp_path.iterdir())


def test_another_models_config_is_left_alone(goldens, tmp_path, capsys):
    other = '{"model_type": "vit"}'
    (tmp_path / "config.json").write_text(other)
    status, printed, _ = run(capsys, goldens / "params_token.npz", tmp_path / "out.safetensors")
    assert status == 0 and "note: config.json of another model exists: the one for timm is out.config.json" in printed
    assert (tmp_path / "config.json").read_text() == other
    assert weights.load(tmp_path / "out.safetensors")[0] == weights.load(goldens / "params_token.npz")[0]


def test_as_a_command(goldens, tmp_path):
    source, target = goldens / "params_token.npz", tmp_path / "out.npz"
    output = run_command("vit_jax.convert", source, target, stderr=subprocess.PIPE)
    assert output.startswith(f"{source}: Google's naming, 40 arrays\n")
    assert zipfile.is_zipfile(target)


def their_logits(model, inputs):
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(np.moveaxis(inputs, -1, 1).copy())).numpy()


MODELS = [
    {},
    {"gelu": "exact"},
    {"class_token": False, "pooling": "mean"},
    {"class_token": False, "pooling": "map", "heads": 4},
    {"classes": None},
]
TIMMS_OWN = [
    *MODELS,
    {"registers": 2, "layer_scale": 0.1, "qk_norm": True},
    {"registers": 2, "class_token": False, "pooling": "mean", "norm_after_pooling": True},
    {"mlp": "swiglu", "layer_scale": 0.1, "mlp_width": 37},
    {"pooling": "none", "class_token": False, "qkv_bias": False, "mlp_width": 37},
    {"position": "none", "scan": True},
    {"input_norm": "tokens", "gelu": "quick", "layer_norm_epsilon": 1e-5},
    {"attention_norm": True, "mlp_norm": True, "final_norm": False, "classes": None},
    {"mlp": "swiglu", "mlp_norm": True, "mlp_width": 36},
    {"position": "dinov3", "registers": 4, "layer_scale": 0.1, "gelu": "exact", "heads": 3, "width": 36}
    | {"layer_norm_epsilon": 1e-5},
    {"position": "dinov3", "mlp": "swiglu", "pooling": "mean", "heads": 3, "width": 36, "layer_norm_epsilon": 1e-5},
]


@pytest.mark.parametrize("fields", TIMMS_OWN, ids=str)
def test_timm_loads_our_safetensors_strictly(timm, tmp_path, helpers, fields):
    from safetensors.torch import load_file

    scan = fields.get("scan", False)
    model, parameters = helpers.small((16, 24), **{**fields, "scan": False})
    weights.save(tmp_path / "model.safetensors", model, parameters, (16, 24))
    if scan:
        model, parameters, _ = weights.load(tmp_path, scan=True)
        weights.save(tmp_path / "model.safetensors", model, parameters, (16, 24))
    config = json.loads((tmp_path / "config.json").read_text())
    theirs = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype("f")
    ours = helpers.outputs(model, parameters, images)
    np.testing.assert_allclose(their_logits(theirs, images), ours, rtol=0, atol=1e-4)
    # And by itself, from the folder.
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    np.testing.assert_allclose(their_logits(again, images), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_timms_own_loader_reads_our_npz(timm, tmp_path, helpers, fields):
    model, parameters = helpers.small((16, 16), **fields)
    weights.save(tmp_path / "model.npz", model, parameters)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=model.heads,
        mlp_ratio=40 / 24 + 1e-6,
        num_classes=model.classes or 0,
        class_token=model.class_token,
        global_pool={"mean": "avg"}.get(model.pooling, model.pooling),
        fc_norm=False,
        act_layer="gelu_tanh" if model.gelu == "tanh" else "gelu",
    )
    theirs.load_pretrained(str(tmp_path / "model.npz"))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("f")
    ours = helpers.outputs(model, parameters, images)
    np.testing.assert_allclose(their_logits(theirs, images), ours, rtol=0, atol=1e-4)
