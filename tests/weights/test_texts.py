"""Text towers and zero-shot classification against transformers, as make_text_references.py has recorded them."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from helpers import mostly_slow
from PIL import Image

import vit_jax
from vit_jax import predict, zero_shot
from vit_jax.errors import UserError
from vit_jax.weights import files, hub, texts, tokenizer

# Those of make_text_references.py.
TEXTS = ("a cat", "a photo of a tiny dog", "Cats,  and DOGS!", "cat, dog, cat, dog, cat, dog, cat, dog, cat, dog, cat")


@pytest.fixture(scope="module")
def recorded(request):
    return request.path.parent / "references_text"


@pytest.fixture
def library():
    return pytest.importorskip("tokenizers", reason="the optional library tokenizers is not installed")


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def copied(recorded, name, folder, arrays=None, **configs):
    """A copy of a recording with other arrays, or JSON files changed or, for None, without them."""
    shutil.copytree(recorded / name, folder, dirs_exist_ok=True)
    for config, changes in configs.items():
        path = folder / f"{config}.json"
        if changes is None:
            path.unlink()
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if arrays is not None:
        files.write_safetensors(folder / "model.safetensors", arrays)
    return folder


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


NAMES = ["clip", "siglip"]
OPENAI = {  # of transformers' names of the text tower, in the order in which they are replaced
    r"text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"text_model\.embeddings\.token_embedding": "token_embedding",
    r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"text_model\.final_layer_norm": "ln_final",
    r"layer_norm": "ln_",
    r"self_attn\.out_proj": "attn.out_proj",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
}


def as_openai(arrays):
    """The text tower of transformers' CLIP by the names that OpenAI's code gives to its arrays."""
    renamed = {}
    for name, array in arrays.items():
        for pattern, replacement in OPENAI.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    renamed["text_projection"] = renamed.pop("text_projection.weight").T
    for kind in ("weight", "bias"):
        for layer in range(2):
            start = f"transformer.resblocks.{layer}."
            parts = [renamed.pop(f"{start}self_attn.{part}_proj.{kind}") for part in "qkv"]
            renamed[f"{start}attn.in_proj_{kind}"] = np.concatenate(parts)
    return {name: array for name, array in renamed.items() if not name.startswith("vi")}


@pytest.mark.parametrize("name", NAMES)
def test_text_features_are_those_of_transformers(recorded, name):
    reference = np.load(recorded / name / "numbers.npz")
    with jax.default_matmul_precision("highest"):
        close(texts.load_text(recorded / name).embed(reference["ids"]), reference["text_features"])


def test_texts_are_embedded_in_batches_of_one_shape(recorded, monkeypatch):
    reference = np.load(recorded / "clip" / "numbers.npz")
    monkeypatch.setattr(texts, "_BATCH_SIZE", 3)
    with jax.default_matmul_precision("highest"):
        close(texts.load_text(recorded / "clip").embed(reference["ids"]), reference["text_features"])


def test_files_of_openai_and_openclip_have_the_same_text_tower(recorded, tmp_path):
    reference = np.load(recorded / "clip" / "numbers.npz")
    arrays = as_openai(files.open_file(recorded / "clip").arrays)
    config = {"model_cfg": {"quick_gelu": True, "text_cfg": {"heads": 2}, "vision_cfg": {"width": 12}}}
    folder = copied(recorded, "clip", tmp_path, arrays, config=None)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tower = texts.load_text(folder)
    assert tower.model.end_token is None
    with jax.default_matmul_precision("highest"):
        close(tower.embed(reference["ids"]), reference["text_features"])
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "roberta-base"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"hf_model_name 'roberta-base'\n  allowed: None"):
        texts.load_text(folder)


def test_the_end_token_of_old_configs_is_the_largest_id(recorded, tmp_path):
    config = json.loads((recorded / "clip" / "config.json").read_text())["text_config"]
    folder = copied(recorded, "clip", tmp_path, config={"text_config": config | {"eos_token_id": 2}})
    reference = np.load(recorded / "clip" / "numbers.npz")
    tower = texts.load_text(folder)
    assert tower.model.end_token is None
    with jax.default_matmul_precision("highest"):
        close(tower.embed(reference["ids"]), reference["text_features"])


@pytest.mark.parametrize("name", mostly_slow(NAMES, 2))
def test_ids_and_logits_are_those_of_transformers(library, recorded, name, capsys):
    reference = np.load(recorded / name / "numbers.npz")
    ids, cut = tokenizer.token_ids(recorded / name, texts.load_text(recorded / name).model, TEXTS)
    np.testing.assert_array_equal(ids, reference["ids"])
    assert TEXTS[3] in cut and TEXTS[0] not in cut
    model = zero_shot.of_file(recorded / name, TEXTS, "{}")
    assert "cut off there: a photo of a tiny dog" in capsys.readouterr().err
    assert model.loss == {"clip": "softmax", "siglip": "sigmoid"}[name]
    with jax.default_matmul_precision("highest"):
        close(jax.jit(model.model.apply)({"params": model.parameters}, reference["inputs"]), reference["logits"])


def test_texts_for_siglip_are_in_lower_case_and_for_the_first_one_without_punctuation(library, recorded, tmp_path):
    model = texts.load_text(recorded / "siglip").model
    folder = copied(recorded, "siglip", tmp_path, tokenizer_config={"tokenizer_class": "SiglipTokenizer"})
    tokens = tokenizer.token_ids(folder, model, ["a  Cat!", "a cat", "a cat!"])[0]
    assert (tokens[1:] == tokens[0]).all()
    tokens = tokenizer.token_ids(recorded / "siglip", model, ["A Cat!", "a cat", "a cat!"])[0]
    assert (tokens[0] == tokens[2]).all() and (tokens[1] != tokens[2]).any()


def test_several_prompts_are_averaged(library, recorded):
    tower = texts.load_text(recorded / "clip")
    each = tower.embed(
        tokenizer.token_ids(recorded / "clip", tower.model, ("a cat", "of a cat", "a dog", "of a dog"))[0]
    )
    mean = np.stack([each[:2].mean(0), each[2:].mean(0)])
    both = zero_shot.text_features(str(recorded / "clip"), tower, ("cat", "dog"), ("a {}", "of a {}"))
    np.testing.assert_allclose(both, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.slow
def test_from_python_and_at_the_command_line(library, recorded, picture, capsys):
    clip = str(recorded / "clip")
    model = vit_jax.load(clip, class_names=["cat", "dog"], prompt="a {}")
    assert model.classes == ("cat", "dog")
    assert model.features([picture]).shape == (1, 12)  # before the projection
    wanted = model.probabilities([picture])[0]
    np.testing.assert_allclose(wanted.sum(), 1, rtol=1e-6)
    assert predict.main([f"--init={clip}", "--classes=cat, dog", "--prompt=a {}", "--json", picture]) == 0
    found = {one["label"]: one["probability"] for one in json.loads(capsys.readouterr().out)["predictions"]}
    np.testing.assert_allclose([found["cat"], found["dog"]], wanted, rtol=1e-5)


def test_class_names_of_a_flag(tmp_path):
    (tmp_path / "a,b.txt").write_text("cat\ndog\n")
    cases = {"cat, dog": ("cat", "dog"), str(tmp_path / "a,b.txt"): ("cat", "dog"), "imagenet": "imagenet"}
    for classes, names in cases.items():
        assert zero_shot.flag_values(classes, ["a {}"]) == {"class_names": names, "prompt": ["a {}"]}
    assert zero_shot.flag_values("a {}", None) == {"class_names": None, "prompt": ["a {}"]}


def test_a_prompt_alone_is_for_the_names_of_imagenet(monkeypatch, library, recorded):
    monkeypatch.setattr(zero_shot, "imagenet1k", lambda: ("cat", "dog"))
    named = zero_shot.flag_values("a {}", None)
    assert zero_shot.of_file(recorded / "clip", **named).inputs.classes == {"label": ("cat", "dog")}
    with pytest.raises(UserError, match=r"--classes=a \{\} and --prompt are both prompts\n  omit one"):
        zero_shot.flag_values("a {}", ["the {}"])


def test_mistakes(library, recorded, references, tmp_path, monkeypatch):
    names, clip = ["cat", "dog"], recorded / "clip"

    def refused(message, file=clip, prompt=None, names=names):
        with pytest.raises(UserError, match=message) as error:
            zero_shot.of_file(file, names, prompt)
        assert len(str(error.value).split("\n")) <= 3

    refused("prompt is 'a photo'\n  expected: a text with {} for", prompt="a photo")
    refused("prompt is ''", prompt=[])
    refused("class_names is empty", names=[])
    refused("has no text tower that can be read\n  use a model of CLIP", references / "clip_vision", "a {}")
    without = copied(recorded, "clip", tmp_path / "one", tokenizer=None)
    refused(r"one has no tokenizer.json, which makes tokens of texts\n  put that of the model there", without)
    (without / "tokenizer.json").write_text("{}")
    refused(r"tokenizer.json cannot be read: .*\n  download it again", without)
    shutil.copy(recorded / "siglip" / "tokenizer.json", without / "tokenizer.json")
    shutil.copy(recorded / "clip" / "tokenizer.json", tmp_path)
    other = copied(recorded, "siglip", tmp_path / "two")
    shutil.copy(recorded / "clip" / "tokenizer.json", other / "tokenizer.json")
    refused("tokenizer.json is of another model: its ids are not those of the weights", other)
    arrays = dict(files.open_file(clip).arrays)
    del arrays["text_model.final_layer_norm.bias"]
    refused("no array text_model.final_layer_norm.bias", copied(recorded, "clip", tmp_path / "three", arrays))
    arrays = dict(files.open_file(clip).arrays)
    arrays["text_model.final_layer_norm.bias"] = np.zeros(5, np.float32)
    refused("arrays of other sizes: encoder/norm/bias", copied(recorded, "clip", tmp_path / "three", arrays))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(r"^tokenizers is not installed: .*\n  to install it: pip install tokenizers$")


def test_files_beside_weights_of_the_hub_are_downloaded_when_they_are_needed(tmp_path, monkeypatch):
    directory = tmp_path / "models--owner--a--name" / "snapshots" / "0123abc"
    directory.mkdir(parents=True)
    calls = []

    def download(identifier, filename, revision):
        calls.append((identifier, filename, revision))
        (directory / filename).write_text("{}")
        return str(directory / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert hub.sibling(directory, "tokenizer.json") == directory / "tokenizer.json"
    assert hub.sibling(directory, "tokenizer.json") == directory / "tokenizer.json"
    assert calls == [("owner/a--name", "tokenizer.json", "0123abc")]
    assert hub.sibling(tmp_path, "tokenizer.json") is None

    def fail(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(UserError, match=r"other.json of .*owner/a--name cannot be downloaded: no network\n  download"):
        hub.sibling(directory, "other.json")
