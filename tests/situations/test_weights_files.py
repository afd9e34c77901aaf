"""Weights files as users have them: below wrappers, with other arrays, in odd folders, of other formats."""

import json
import shlex
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import mostly_slow, run_command

from vit_jax import convert, inference, weights
from vit_jax.data import normalization
from vit_jax.errors import UserError
from vit_jax.evaluation import extraction
from vit_jax.weights import files
from vit_jax.weights.save import flattened

REFERENCES = Path(__file__).resolve().parents[1] / "weights" / "references"
TIMM, HF = "timm_vit", "hf_vit_classifier"
ONE = np.ones((2, 3), np.float32)


def arrays_of(name=TIMM):
    return dict(files.open_file(REFERENCES / name).arrays)


def below(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


def put(folder, arrays, config=TIMM, file=files.SAFETENSORS):
    """Writes arrays to a file in a folder, with the config.json of a reference."""
    folder.mkdir(parents=True, exist_ok=True)
    (files.write_npz if file.endswith(".npz") else files.write_safetensors)(folder / file, arrays)
    if config is not None and (REFERENCES / config / files.CONFIG).exists():
        shutil.copy(REFERENCES / config / files.CONFIG, folder)
    return folder


def head(prefix):
    """The head of DINO and iBOT."""
    names = [f"mlp.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")]
    return below(f"{prefix}head.", dict.fromkeys([*names, "last_layer.weight_v", "last_layer.weight_g"], ONE))


def decoder(depth=2):
    """The decoder of MAE, with as many blocks as the encoder."""
    names = [name for name in arrays_of() if name.startswith("blocks.0.")]
    blocks = [f"decoder_{name.replace('.0.', f'.{i}.', 1)}" for i in range(depth) for name in names]
    return dict.fromkeys([*blocks, "decoder_embed.weight", "decoder_pos_embed", "decoder_pred.bias", "mask_token"], ONE)


def bare(name=TIMM):
    """The arrays without the head."""
    return {key: array for key, array in arrays_of(name).items() if not key.startswith(("head.", "classifier."))}


def inserted(name):
    """The names of FSDP and torch.compile, which also wrap the blocks."""
    return name.replace("blocks.0.", "blocks.0._orig_mod.").replace("attn.", "attn._checkpoint_wrapped_module.")


def flax(name):
    return f"state.params.{name}".replace("/", ".")


# What is before the names, and what else is in the file. The model is that of the reference.
WRAPPED = {
    "Hugging Face in DataParallel": (HF, lambda a: below("module.", a)),
    "Hugging Face, torch.compile": (HF, lambda a: below("_orig_mod.", a)),
    "Hugging Face in Lightning": (HF, lambda a: below("state_dict.model.", a)),
    "Hugging Face in a module of its own name": (HF, lambda a: below("vit.", a)),
    "Hugging Face's state dict of version 5": ("hf_vit_classifier_state_dict", lambda a: below("net.module.", a)),
    "DINOv2 below teacher": ("hf_dinov2_registers", lambda a: below("teacher.", a)),
    "DeiT below wrappers": ("hf_deit", lambda a: below("online_network.encoder._orig_mod.", a)),
    "MAE of Hugging Face": ("hf_mae_pretraining", lambda a: below("module.", a)),
    "VisionEncoderDecoder": ("hf_vit", lambda a: below("encoder.", a) | {"decoder.bert.x.weight": ONE}),
    "two towers of Hugging Face": (
        "hf_vit",
        lambda a: below("vision_model.", a)
        | dict.fromkeys(["text_model.encoder.layer.0.attention.self.query.weight", "logit_scale"], ONE)
        | {"visual_projection.weight": ONE},
    ),
    "timm, torch.compile and DDP": (TIMM, lambda a: below("_orig_mod.module.", a)),
    "FSDP inside": (TIMM, lambda a: below("_fsdp_wrapped_module.", {inserted(name): x for name, x in a.items()})),
    "slashes": (TIMM, lambda a: {f"params/{name.replace('.', '/')}": x for name, x in a.items()}),
    "blocks in groups": (
        TIMM,
        lambda a: {name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): a[name] for name in a},
    ),
    "open_clip": (
        TIMM,
        lambda a: below("visual.trunk.", a) | dict.fromkeys(["text.ln_final.weight", "text_projection"], ONE),
    ),
    "optimizer": (TIMM, lambda a: a | below("optimizer.exp_avg.", a) | {"optimizer.state.0.step": np.array(3)}),
    "counters": (TIMM, lambda a: a | {"step": np.array(5), "epoch": np.array([2]), "bn.num_batches_tracked": ONE[0]}),
    "moving average of torch": (TIMM, lambda a: below("module.", a) | {"n_averaged": np.array(9)}),
    "moving average without names": (TIMM, lambda a: a | {"ema.shadow_params.0": ONE, "model_ema.blocks0attn": ONE}),
    "float16": (TIMM, lambda a: {name: x.astype("f2").astype("f4").astype("f2") for name, x in a.items()}),
    "bfloat16": (TIMM, lambda a: {name: x.astype(ml_dtypes.bfloat16) for name, x in a.items()}),
    "float64": (TIMM, lambda a: {name: x.astype(np.float64) for name, x in a.items()}),
}  # fmt: skip
HEADLESS = {
    "DINO's teacher": lambda a: below("teacher.backbone.", a) | head("teacher."),
    "iBOT": lambda a: (
        below("module.backbone.", a)
        | head("module.")
        | dict.fromkeys(["module.backbone.masked_embed", "module.head.last_layer2.weight_g", "ibot_loss.center2"], ONE)
    ),
    "DINOv2 in training": lambda a: below("teacher.backbone.", a) | below("teacher.dino_", head("")),
    "MAE with equal decoder": lambda a: a | decoder(),
    "MAE with longer decoder": lambda a: below("model.", a | decoder(5)),
    "SimMIM": lambda a: below("encoder.", a) | {"decoder.0.weight": ONE, "encoder.mask_token": ONE},
    "BYOL": lambda a: (
        below("online_encoder.net.", a)
        | dict.fromkeys(["online_projector.net.0.weight", "online_predictor.net.0.weight"], ONE)
    ),
    "MoCo's queue": lambda a: below("encoder_q.", a) | {"queue": ONE, "queue_ptr": np.array([0])},
}


def same(found, arrays, name, **options):
    """The parameters are those of the reference's own file, in float32."""
    plain = flattened(weights.load(REFERENCES / name, **options)[1])
    assert set(plain) == set(found)
    dtype = next(iter(arrays.values())).dtype
    tolerance = 4 * float(ml_dtypes.finfo(dtype).eps) if dtype.itemsize == 2 else 0
    for path, array in found.items():
        np.testing.assert_allclose(array, plain[path], rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("case", mostly_slow([*WRAPPED, *HEADLESS], 2))
def test_the_model_in_a_file(tmp_path, case):
    name, change = WRAPPED.get(case) or (TIMM, HEADLESS[case])
    arrays = arrays_of(name) if case in WRAPPED else bare(name)
    content = change(arrays)
    heads = {} if (REFERENCES / name / files.CONFIG).exists() else {"heads": 3}
    options = heads | ({"classes": None} if case in HEADLESS else {})
    model, parameters, report = weights.load(put(tmp_path, content, name), **heads)
    same(flattened(parameters), content, name, **options)
    assert model == weights.load(REFERENCES / name, **options)[0]
    assert sorted(name for row in report.rows for name in row.names) == sorted(content)
    assert all(row.detail for row in report.rows if row.action == "ignored")


def message_of(path, **options):
    with pytest.raises(UserError) as caught:
        weights.load(path, **{"heads": 3, **options})
    message = str(caught.value)
    assert message.count("\n") <= 2 and str(path) in message.splitlines()[0], message
    return message


def two(first, second):
    return lambda a: below(first, a) | below(second, {name: x + 1 for name, x in a.items()})


SEVERAL = {
    "student and teacher": (two("student.module.backbone.", "teacher.backbone."), "teacher.backbone", 1),
    "parameters and average": (two("state_dict.", "state_dict_ema."), "state_dict_ema", 1),
    "average and bare names": (two("", "ema."), "ema", 1),
    "a wrapper called encoder": (two("", "encoder."), "encoder", 1),
    "a wrapper with a name of Hugging Face": (two("", "deit."), "deit", 1),
    "bare names, chosen": (two("", "model_ema."), "", 0),
    "MoCo": (two("module.base_encoder.", "module.momentum_encoder."), "module.momentum_encoder", 1),
    "I-JEPA": (two("encoder.module.", "target_encoder.module."), "target_encoder", 1),
    "a wrapper of both": (two("params.online_network.", "params.target_network."), "params.target_network", 1),
}


@pytest.mark.parametrize("name", mostly_slow([TIMM, HF], 2))
@pytest.mark.parametrize("case", mostly_slow(list(SEVERAL), 3))
def test_several_models(tmp_path, case, name):
    change, prefix, added = SEVERAL[case]
    arrays = arrays_of(name)
    folder = put(tmp_path / "in", change(arrays), name)
    message = message_of(folder)
    assert "it has 2 models: " in message
    # The way out that the message gives, as Python and as a command.
    assert "--prefix=" in message and prefix in message
    source, target, option = shlex.split(message.splitlines()[2])[3:]
    assert Path(source).samefile(folder / files.SAFETENSORS) and not Path(target).exists()
    assert convert.main([source, target, option]) == 0 and convert.main([str(folder), source, option]) == 2
    plain = flattened(weights.load(put(tmp_path / "plain", {key: x + added for key, x in arrays.items()}, name))[1])
    found = flattened(weights.load(folder, prefix=prefix)[1])
    assert convert.main([str(folder), str(tmp_path / "out.safetensors"), f"--tower={prefix}"]) == 0
    again = flattened(weights.load(tmp_path / "out.safetensors", heads=3)[1])
    for path, array in plain.items():
        np.testing.assert_array_equal(found[path], array)
        np.testing.assert_array_equal(again[path], array)
    assert weights.recognise(folder, prefix=prefix).model == weights.load(folder, prefix=prefix)[0]
    assert "allowed: " in message_of(folder, prefix="no_such")


def without(arrays, *names):
    return {name: array for name, array in arrays.items() if name not in names}


def clip(*names):
    """The names of a CLIP of OpenAI, with those of its image tower."""
    text = ("transformer.resblocks.0.attn.in_proj_weight", "positional_embedding", "token_embedding.weight")
    return dict.fromkeys([*text, *(f"visual.{name}" for name in names)], ONE)


# Each with what the message says, and what it must not say.
REFUSED = {
    "a ResNet of CLIP": (
        lambda: clip("conv1.weight", "layer4.0.conv1.weight", "attnpool.k_proj.weight"),
        "a ResNet of CLIP, which is not supported",
        "renamed",
    ),
    "CLIP without most of its arrays": (
        lambda: {"vision_model.encoder.layers.0.self_attn.k_proj.weight": ONE},
        "not a complete model in Hugging Face's naming of CLIP: missing: ",
        "renamed",
    ),
    "Swin": (lambda: {"layers.0.blocks.0.attn.qkv.weight": ONE, "layers.1.blocks.0.attn.qkv.weight": ONE}, "Swin", ""),
    "BEiT": (
        lambda: arrays_of() | {"blocks.0.attn.relative_position_bias_table": np.ones((12, 3), np.float32)},
        "positions at the input and in the layers are not supported",
        "renamed",
    ),
    "LoRA": (
        lambda: {"base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight": ONE},
        "LoRA adapter",
        "missing",
    ),
    "LoRA, not merged": (lambda: arrays_of() | {"blocks.0.attn.qkv.lora_A.default.weight": ONE}, "LoRA adapter", ""),
    "int8": (
        lambda: arrays_of() | {"blocks.0.attn.qkv.weight": np.ones((36, 12), np.int8), "blocks.0.attn.qkv.SCB": ONE},
        "blocks.0.attn.qkv.SCB is float32: parameters must be floating-point numbers, not quantized",
        "renamed",
    ),
    "float8": (
        lambda: {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in arrays_of().items()},
        "is float8_e4m3fn: parameters must be floating-point numbers, not quantized",
        "",
    ),
    "optimizer alone": (lambda: below("optimizer.exp_avg.", arrays_of()), "not a known Vision Transformer", "renamed"),
    "Flax of Hugging Face": (
        lambda: {name.replace("weight", "kernel"): array for name, array in arrays_of(HF).items()},
        "a Flax model in Hugging Face's naming, which is not supported",
        "renamed",
    ),
    "our names alone": (
        lambda: {"parameters/encoder/block_0/attention/qkv/kernel": ONE},
        "a run of vit_jax, without its config",
        "",
    ),
    "half of the names wrapped": (
        lambda: {f"module.{name}" if "blocks" in name else name: array for name, array in arrays_of().items()},
        "\n  not below module: cls_token, norm.bias, norm.weight, patch_embed.proj.bias",
        "looks like",
    ),
    "the same name twice": (
        lambda: below("m.", arrays_of()) | {"m._orig_mod.cls_token": arrays_of()["cls_token"]},
        "m._orig_mod.cls_token and m.cls_token are both cls_token",
        "",
    ),
    "transposed": (
        lambda: {name: array.T if "qkv.weight" in name else array for name, array in arrays_of().items()},
        "blocks.0.attn.qkv.weight: encoder/block_0/attention/qkv/kernel would have shape [36, 12]",
        "",
    ),
    "a classifier outside": (
        lambda: below("backbone.", bare()) | {"head.weight": ONE, "head.bias": ONE},
        "head.bias, head.weight: a head outside the model, so that what it reads is unknown",
        "renamed",
    ),
    "a head with BatchNorm": (
        lambda: bare() | {"head.0.running_mean": ONE, "head.1.weight": ONE},
        "its head is not one linear layer with a bias (head.0.running_mean [2, 3], head.1.weight [2, 3])",
        "renamed",
    ),
    "unknown arrays outside": (lambda: below("net.", arrays_of()) | {"neck.a": ONE}, "unexpected: neck.a", "renamed"),
    "unknown arrays inside": (lambda: arrays_of() | {"blocks.0.lambda": ONE}, "unexpected: blocks.0.lambda", "renamed"),
    "a renamed array": (
        lambda: {name.replace("cls_token", "class_token"): array for name, array in arrays_of().items()},
        "class_token looks like cls_token renamed",
        "",
    ),
    "a missing array": (lambda: without(arrays_of(), "norm.bias"), "missing: norm.bias", "renamed"),
    "no patch embedding": (
        lambda: without(arrays_of(), "patch_embed.proj.weight", "patch_embed.proj.bias"),
        "patch_embed.proj.weight is missing",
        "renamed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_content(tmp_path, case):
    make, words, never = REFUSED[case]
    message = message_of(put(tmp_path, make(), None))
    assert words in message and not (never and never in message), message


def test_ways_out_of_arrays_outside_a_model(tmp_path):
    """Whoever names the model, or wants no head, gets the model."""
    head_outside = put(tmp_path / "head", REFUSED["a classifier outside"][0]())
    unknown = put(tmp_path / "unknown", REFUSED["unknown arrays outside"][0]())
    assert "pass classes=N for a new head, or classes=None" in message_of(head_outside)
    assert "prefix='net'" in message_of(unknown)
    same(flattened(weights.load(head_outside, classes=None)[1]), bare(), TIMM, classes=None)
    same(flattened(weights.load(head_outside, prefix="backbone")[1]), bare(), TIMM, classes=None)
    same(flattened(weights.load(unknown, prefix="net")[1]), arrays_of(), TIMM)


def head_of(name, change):
    """The arrays of a reference with other arrays in place of its head."""
    start = "classifier." if name == HF else "head."
    own = {key.removeprefix(start): array for key, array in arrays_of(name).items() if key.startswith(start)}
    assert set(own) == {"weight", "bias"}
    return bare(name) | below(start, change(**own))


# Heads that are not what the model's own is: their backbone is loaded, with a new head or without one.
HEADS = {
    "Dropout and Linear": lambda weight, bias: {"1.weight": weight, "1.bias": bias},
    "two layers": lambda weight, bias: {"0.weight": ONE, "0.bias": ONE[0], "3.weight": weight, "3.bias": bias},
    "a layer with a name": lambda weight, bias: {"fc.weight": weight, "fc.bias": bias},
    "without a bias": lambda weight, bias: {"weight": weight},
    "no classes": lambda weight, bias: {"weight": weight[:0], "bias": bias[:0]},
    "a convolution": lambda weight, bias: {"weight": weight[..., None, None], "bias": bias},
    "weight normalization": lambda weight, bias: {"weight_g": bias[:, None], "weight_v": weight, "bias": bias},
}


@pytest.mark.parametrize("name", [TIMM, HF])
@pytest.mark.parametrize("case", HEADS)
def test_a_head_of_another_kind(tmp_path, case, name):
    folder = put(tmp_path, head_of(name, HEADS[case]), name)
    message = message_of(folder)
    assert "its head is not one linear layer with a bias" in message and "pass classes=N for a new head" in message
    same(flattened(weights.load(folder, classes=None)[1]), arrays_of(name), name, classes=None)
    model, parameters, _ = weights.load(folder, classes=7)
    assert model.classes == 7 and parameters["head"]["logits"]["kernel"].shape == (12, 7)


@pytest.mark.parametrize("start", ["head2.", "heads.head.", "heads.0.", "classifier2.", "aux_head."])
def test_further_heads_are_named(tmp_path, start):
    folder = put(tmp_path, arrays_of() | {f"{start}weight": ONE, f"{start}bias": ONE[0]})
    _, parameters, report = weights.load(folder)
    same(flattened(parameters), arrays_of(), TIMM)
    assert f"{start}weight" in str(report) and "outside the model" in str(report)


def test_a_config_with_a_byte_order_mark(tmp_path):
    path = put(tmp_path, arrays_of()) / files.CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    same(flattened(weights.load(tmp_path)[1]), arrays_of(), TIMM)


@pytest.mark.slow
def test_a_layer_before_the_logits(tmp_path):
    """timm's pre_logits, a Linear and a tanh, is the pre_logits of Google's files."""
    generator = np.random.default_rng(0)
    kernel, bias = generator.normal(size=(12, 12)).astype("f"), generator.normal(size=12).astype("f")
    arrays = arrays_of() | {"pre_logits.fc.weight": kernel, "pre_logits.fc.bias": bias}
    model, parameters, _ = weights.load(put(tmp_path, arrays))
    images = jnp.asarray(generator.normal(size=(2, 12, 12, 3)), jnp.float32)
    features, body, _ = weights.load(REFERENCES / TIMM, classes=None)
    inner = np.tanh(features.apply({"params": body}, images) @ kernel.T + bias)
    logits = inner @ arrays["head.weight"].T + arrays["head.bias"]
    np.testing.assert_allclose(model.apply({"params": parameters}, images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["sorted", "reversed", "shuffled"])
def test_no_answer_depends_on_the_order_of_names(tmp_path, order):
    equal = {**arrays_of(), **decoder(), **below("x.", head(""))}
    several = two("model.", "model_ema.")(arrays_of())
    found = []
    for content in (equal, several):
        names = sorted(content, reverse=order == "reversed")
        if order == "shuffled":
            np.random.default_rng(1).shuffle(names)
        path = tmp_path / "a.npz"
        files.write_npz(path, {name: content[name] for name in names})
        try:
            found.append(weights.load(path, heads=3)[2].table(verbose=True))
        except UserError as error:
            found.append(str(error))
    plain = tmp_path / "a.npz"
    files.write_npz(plain, {name: equal[name] for name in sorted(equal)})
    assert found[0] == weights.load(plain, heads=3)[2].table(verbose=True)
    assert "it has 2 models: model, model_ema\n" in found[1]


@pytest.mark.slow
def test_no_answer_depends_on_the_hash_seed(tmp_path):
    put(tmp_path / "equal", arrays_of() | decoder())
    put(tmp_path / "several", two("model.", "model_ema.")(arrays_of()))
    put(tmp_path / "wrong", {f"x{name}" if "blocks" in name else name: array for name, array in arrays_of().items()})
    program = """
import sys
from vit_jax import weights
from vit_jax.errors import UserError
for path in sys.argv[1:]:
    try:
        print(weights.load(path)[2].table(verbose=True))
    except UserError as error:
        print(error)
"""
    paths = [tmp_path / name for name in ("equal", "several", "wrong")]
    assert len({run_command(program, *paths, PYTHONHASHSEED=str(seed)) for seed in range(3)}) == 1


# --- folders and formats -----------------------------------------------------------------------------------------


def shards(folder, index=True, lacking=None):
    names = sorted(arrays_of())
    parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for part, own in parts.items():
        put(folder, {name: arrays_of()[name] for name in own}, file=part)
    if index:
        content = {"metadata": {}, "weight_map": {name: part for part, own in parts.items() for name in own}}
        (folder / files.INDEX).write_text(json.dumps(content))
    if lacking is not None:
        (folder / sorted(parts)[lacking]).unlink()
    return folder


def several_formats(folder):
    (put(folder, arrays_of()) / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    (folder / "tf_model.h5").write_bytes(b"\x89HDF\r\n")
    return folder


def named(folder, name, form="safetensors"):
    (files.write_npz if form == "npz" else files.write_safetensors)(folder / name, arrays_of())
    shutil.copy(REFERENCES / TIMM / files.CONFIG, folder)
    return folder / name


def of_a_trainer(folder):
    """Weights among the files of a trainer, and an empty directory of checkpoints."""
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        (put(folder, arrays_of(), file="weights.bin") / name).write_bytes(b"\x80\x02}.")
    (folder / "checkpoints").mkdir()
    return folder


def with_metadata(folder):
    metadata = {"format": "pt", "modelspec.title": "{not: json", "ss_steps": "12"}
    files.write_safetensors(put(folder, arrays_of()) / files.SAFETENSORS, arrays_of(), metadata)
    return folder


LOADED = {
    "folder called checkpoints": lambda at: put(at / "checkpoints", arrays_of()),
    "next to an empty folder": lambda at: put(at, arrays_of()) / ((at / "checkpoints").mkdir() or ""),
    "folder called checkpoints/12000": lambda at: put(at / "checkpoints" / "12000", arrays_of()),
    "weights next to checkpoints of another program": lambda at: (
        put(at / "checkpoints" / "12", arrays_of()) and put(at, arrays_of())
    ),
    "a trainer's files": of_a_trainer,
    "shards": shards,
    "the index itself": lambda at: shards(at) / files.INDEX,
    "shards without an index": lambda at: shards(at, index=False),
    "one of the shards": lambda at: shards(at, index=False) / "model-00002-of-00003.safetensors",
    "several formats": several_formats,
    "safetensors called .pth": lambda at: named(at, "model.pth"),
    "safetensors called .bin, in its folder": lambda at: named(at, "pytorch_model.bin").parent,
    "npz called .safetensors": lambda at: named(at, "model.safetensors", "npz"),
    "a name with dots and spaces": lambda at: named(at, "vit.b16 (final).v2.safetensors"),
    "metadata of another program": with_metadata,
}


@pytest.mark.parametrize("case", LOADED)
def test_folders_and_formats_that_are_read(tmp_path, case):
    _, parameters, _ = weights.load(LOADED[case](tmp_path))
    same(flattened(parameters), arrays_of(), TIMM)


def written(name, data):
    def write(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return write


def truncated(size):
    def write(folder):
        path = put(folder, arrays_of()) / files.SAFETENSORS
        path.write_bytes(path.read_bytes()[:size])
        return path

    return write


def outside(folder):
    (folder / files.INDEX).write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    return folder / files.INDEX


def linked(folder):
    (folder / files.SAFETENSORS).symlink_to(folder / "blobs" / "abc")
    return folder / files.SAFETENSORS


def a_run(folder):
    (folder / files.CONFIG).write_text(json.dumps({"model": {}, "data": {}, "train": {}}))
    (folder / "metrics.jsonl").write_text("")
    return folder


def weights_below(folder):
    put(folder / "vit" / "v1", arrays_of())
    return folder


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb\nsize 12345\n"
UNREADABLE = {
    "git-lfs pointer": (written("model.safetensors", LFS), "a git-lfs pointer instead of the file: run git lfs pull"),
    "git-lfs pointer called .bin": (written("pytorch_model.bin", LFS), "a git-lfs pointer"),
    "web page": (written("model.safetensors", b"\n<!doctype html><html></html>"), "a web page instead of the file"),
    "web page called .pth": (written("model.pth", b"<html>" + b" " * 99), "a web page instead of the file"),
    "text": (written("model.safetensors", b"Entry not found"), "it begins with the text 'Entry not found'"),
    "text called .bin": (written("a.bin", b"Repository not found"), "it begins with the text 'Repository not found'"),
    "empty": (written("model.pth", b""), "the file is empty"),
    "gzip": (written("model.pth", b"\x1f\x8b\x08" + bytes(20)), "is gzip-compressed, which is not supported"),
    "MessagePack, in its folder": (
        lambda at: written("flax_model.msgpack", b"\x81")(at).parent,
        "truncated or corrupt",
    ),
    "GGUF": (written("model.gguf", b"GGUF" + bytes(20)), "is GGUF"),
    "truncated": (truncated(5000), "truncated: its arrays take"),
    "truncated header": (truncated(100), "truncated or corrupt: a header of"),
    "truncated torch.save": (written("a.pth", b"PK\x03\x04" + bytes(99)), "download or export it again"),
    "shard missing": (lambda at: shards(at, lacking=1), "its shard model-00002-of-00003.safetensors is missing"),
    "shard missing, no index": (lambda at: shards(at, False, 0), "model-00001-of-00003.safetensors is missing"),
    "index that points outside": (outside, "the shard '../../etc/passwd' is not in its directory"),
    "dangling link": (linked, "which does not exist"),
    "run without checkpoints": (a_run, "is a run directory without checkpoints"),
    "weights two folders below": (weights_below, "give one of: vit/v1/model.safetensors"),
    "misspelt": (lambda at: written("vit.safetensors", LFS)(at).with_name("vti.safetensors"), "nearest: "),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_folders_and_formats_that_are_refused(tmp_path, case):
    make, words = UNREADABLE[case]
    message = message_of(make(tmp_path))
    assert words in message and "pickle" not in message, message


@pytest.mark.parametrize("where", ["file", "folder", "folder above"])
def test_what_may_not_be_read_is_not_called_corrupt(tmp_path, monkeypatch, where):
    folder = put(tmp_path / "a" / "b", arrays_of())
    barred = {"file": folder / files.SAFETENSORS, "folder": folder, "folder above": folder.parent}[where]

    def bar(function):
        def barring(path, *arguments, **options):
            if Path(path) == barred or (where != "file" and barred in Path(path).parents):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *arguments, **options)

        return barring

    for name in ("open", "stat", "iterdir"):  # root may read everything
        monkeypatch.setattr(Path, name, bar(getattr(Path, name)))
    message = message_of(folder)
    assert "cannot be read: Permission denied" in message and "corrupt" not in message


HALF, IMAGENET = ([0.5] * 3, [0.5] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# What the JSON files beside weights say: a reference, config.json, preprocessor_config.json; mean and std of images.
RECORDED = {
    "timm, ImageNet": (TIMM, {"pretrained_cfg": {"mean": IMAGENET[0], "std": IMAGENET[1]}}, None, IMAGENET),
    "timm, others": (TIMM, {"pretrained_cfg": {"mean": CLIP[0], "std": CLIP[1]}}, None, CLIP),
    "timm, half": (TIMM, {"pretrained_cfg": {"mean": HALF[0], "std": HALF[1]}}, None, HALF),
    "timm, top level": (TIMM, {"pretrained_cfg": None, "mean": IMAGENET[0], "std": IMAGENET[1]}, None, IMAGENET),
    "Hugging Face, ImageNet": (HF, {}, {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}, IMAGENET),
    "Hugging Face, not normalized": (HF, {}, {"do_normalize": False}, ([0.0] * 3, [1.0] * 3)),
    "nothing": (HF, {}, {"size": 12}, HALF),
}


@pytest.mark.parametrize("case", RECORDED)
def test_preprocessing_and_class_names_of_a_file_are_used(tmp_path, case):
    name, config, preprocessor, (mean, std) = RECORDED[case]
    put(tmp_path, arrays_of(name), name)
    names = [f"class {label}" for label in range(weights.load(tmp_path)[0].classes)]
    named = {"label_names": names} if name == TIMM else {"id2label": {str(i): text for i, text in enumerate(names)}}
    config = json.loads((tmp_path / files.CONFIG).read_text()) | config | named
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    if preprocessor is not None:
        (tmp_path / files.PREPROCESSOR).write_text(json.dumps(preprocessor))
    classifier = inference.of_file(tmp_path)
    assert classifier.inputs.classes == {"label": tuple(names)}
    np.testing.assert_allclose([classifier.augment.mean, classifier.augment.std], [mean, std])
    assert inference.of_file(tmp_path, normalize="half").augment.mean == (0.5, 0.5, 0.5)
    backbone = extraction.load(tmp_path)
    assert backbone.statistics == (tuple(mean), tuple(std))
    if mean in (HALF[0], IMAGENET[0]):
        assert backbone.normalization == ("half" if mean == HALF[0] else "imagenet")
    else:
        assert normalization.constants(backbone.normalization, 3) == backbone.statistics


@pytest.mark.parametrize("mean", [[0.5], "half", [0.5, None, 0.5], [0.5, float("nan"), 0.5]])
def test_a_recorded_mean_that_is_none_is_refused(tmp_path, mean):
    put(tmp_path, arrays_of(HF), HF)
    (tmp_path / files.PREPROCESSOR).write_text(json.dumps({"image_mean": mean, "image_std": [0.5] * 3}))
    with pytest.raises(UserError, match=r"preprocessor_config\.json: image_mean and image_std are"):
        weights.load(tmp_path)
