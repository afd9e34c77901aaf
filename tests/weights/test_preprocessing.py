"""The preprocessing that files record: pixels as timm and transformers prepare them, mean and std, class names."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax import convert, inference, predict, weights
from vit_jax.config import OPTIONS
from vit_jax.data import normalization, user_images
from vit_jax.data.preparation import COVER, Preparation, fit
from vit_jax.errors import UserError
from vit_jax.weights import class_names, files, image_processors

RECORDED = np.load(Path(__file__).with_name("references_pixels.npz"))
CONFIGS = json.loads(str(RECORDED["configs"]))
IMAGENET, CLIP = (normalization.RED_GREEN_BLUE[name] for name in ("imagenet", "clip"))
HALF = normalization.constants("half", 3)
TIMM = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 3}}


@pytest.fixture(scope="module")
def put(helpers, tmp_path_factory):
    """A function that writes a tiny model as timm names its arrays, other arrays and JSON files; returns the folder."""
    made = {}

    def make(classes):
        if classes not in made:
            file = tmp_path_factory.mktemp("made") / "model.safetensors"
            weights.save(file, *helpers.small((8, 8), classes=classes, depth=1), 8)
            made[classes] = dict(files.open_file(file).arrays)
        return made[classes]

    def put(config=TIMM, preprocessor=None, name="model", more=(), classes=3):
        folder = tmp_path_factory.mktemp("weights") / name
        folder.mkdir()
        arrays = make(classes)
        like = {key: np.zeros(arrays["norm.weight"].shape, "f") for key in more}
        files.write_safetensors(folder / "model.safetensors", arrays | like)
        for file, content in ((files.CONFIG, config), (files.PREPROCESSOR, preprocessor)):
            if content is not None:
                (folder / file).write_text(json.dumps(content))
        return folder

    return put


def put_case(put, case):
    """The folder of a tiny model with a recorded config of timm or transformers."""
    if case.startswith("timm"):
        return put({**TIMM, "pretrained_cfg": CONFIGS[case]})
    return put(preprocessor=CONFIGS[case])


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONFIGS)
def test_pixels_are_those_of_timm_and_transformers(put, case):
    found, expected = weights.recognise(put_case(put, case)), RECORDED[case]
    assert tuple(found.evaluation["input_size"]) == expected.shape[:2]
    how, (mean, std) = weights.preparation(found.evaluation, found.statistics), found.statistics
    pixels = (user_images.read(RECORDED["picture"], expected.shape, how) / 255 - mean) / std
    np.testing.assert_allclose(pixels * std, expected * std, rtol=0, atol=1e-5)  # exact; a level is 1 / 255
    as_in_training = (user_images.read(RECORDED["picture"], expected.shape) / 255 - mean) / std
    assert np.abs((as_in_training - expected) * std).max() > 0.1  # the pictures tell preparations apart


def test_the_inputs_of_a_model_are_the_recorded_pixels(put):
    classifier = inference.of_file(put_case(put, "DINOv2"))
    assert classifier.inputs.image_shape == (32, 32, 3)
    np.testing.assert_allclose(classifier.pixels(RECORDED["picture"]), RECORDED["DINOv2"], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="the image cannot be read: not an image"):
        classifier.pixels(b"text")


def test_another_size_scales_resize_and_crop():
    large = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224}
    evaluation, note = image_processors.evaluation(large, None, (518, 518))
    how = weights.preparation(evaluation, IMAGENET)
    assert note is None and evaluation["input_size"] == [224, 224]
    assert how.resized((300, 400), (224, 224)) == (256, 341) and how.corner((256, 341), (224, 224)) == (16, 58)
    assert how.resized((300, 400), (448, 448)) == (512, 682)


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos", "nearest"])
def test_long_images_are_cropped_before_they_are_resized(interpolation):
    """The shortcut gives what the definition gives: resize the whole image, then crop."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 900, 3), np.uint8))
    how = Preparation(interpolation=interpolation, crop_pct=0.8, resize_rules="transformers")
    whole = image.resize((450, 10), getattr(Image.Resampling, interpolation.upper()))
    expected = np.asarray(whole)[1:9, 221:229].astype(int)
    assert np.abs(fit(image, (8, 8), how).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        ({"resample": 9}, "resample 9"),
        ({"size": {"height": -1, "width": 2}}, "size {'height': -1"),
        ({"size": {"shortest_edge": "8"}}, "size {'shortest_edge': '8'}"),
        ({"rescale_factor": 0}, "rescale_factor 0"),
    ],
)
def test_wrong_values_of_an_image_processor_are_named(put, preprocessor, message):
    with pytest.raises(UserError, match=f"preprocessor_config.json has {message}"):
        weights.recognise(put(preprocessor=preprocessor))


def test_what_is_not_supported_is_noted(put):
    found = weights.recognise(put(preprocessor={"size": {"shortest_edge": 8, "longest_edge": 9}}))
    assert "'longest_edge': 9}" in found.notes[0] and "resized as in training" in found.notes[0]
    assert weights.preparation(found.evaluation, HALF) == COVER
    with pytest.raises(UserError, match=r"crop_mode is 'most'\n  allowed: center, squash, border, none"):
        weights.recognise(put({**TIMM, "pretrained_cfg": {"crop_mode": "most"}}))


# --- mean and std of families ----------------------------------------------------------------------------------------

FAMILIES = {
    "layer scale": ({"more": ["blocks.0.ls1.gamma", "blocks.0.ls2.gamma"]}, IMAGENET),
    "DINOv2 in a folder of another name": (
        {"more": ["blocks.0.ls1.gamma", "blocks.0.ls2.gamma"], "name": "google"},
        IMAGENET,
    ),
    "decoder": ({"more": ["decoder_embed.weight", "decoder_norm.weight"]}, IMAGENET),
    "DINOv2 by its name": ({"name": "dinov2-base"}, IMAGENET),
    "I-JEPA by its name": ({"name": "ijepa_vith14_1k"}, IMAGENET),
    "not dino": ({"name": "dinosaurs"}, None),
    "DINO by timm's tag": ({"config": {**TIMM, "pretrained_cfg": {"tag": "dino"}}}, IMAGENET),
    "CLIP": ({"config": {**TIMM, "architecture": "vit_base_patch16_clip_224"}}, CLIP),
    "SigLIP": ({"config": {**TIMM, "architecture": "vit_base_patch16_siglip_224"}}, HALF),
    "AugReg": ({"name": "vit_base_patch16_224.augreg_in21k"}, HALF),
    "unknown": ({}, None),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_mean_and_std_that_are_not_recorded_are_those_of_the_family(put, case):
    keywords, expected = FAMILIES[case]
    found = weights.recognise(put(**{"config": None} | keywords), heads=3)
    assert found.statistics == (expected or HALF)
    assert found.normalization == normalization.text(found.statistics)
    assert len(found.assumed.splitlines()) == 1 and "--normalize or config.data.normalization" in found.assumed
    assert ("nothing tells its family" in found.assumed) == (expected is None)


@pytest.mark.parametrize("name", ["hf_dinov2", "hf_dinov2_classifier", "hf_dinov2_registers", "timm_registers"])
@pytest.mark.parametrize("with_config", [True, False])
def test_dinov2_is_never_half(references, tmp_path, name, with_config):
    (tmp_path / "model.safetensors").write_bytes((references / name / "model.safetensors").read_bytes())
    if with_config:
        (tmp_path / "config.json").write_bytes((references / name / "config.json").read_bytes())
    report = weights.load(tmp_path, classes=None, **({} if with_config else {"heads": 3}))[2]
    assert (report.normalization, report.statistics) == ("imagenet", IMAGENET)
    assert f"note: {report.assumed}" in report.table() and report.assumed in report.changes("x")


@pytest.mark.parametrize(("name", "expected"), [("hf_deit", IMAGENET), ("hf_mae_pretraining", IMAGENET)])
def test_other_models_of_meta(references, name, expected):
    assert weights.recognise(references / name).statistics == expected


def test_what_is_recorded_is_not_assumed(put, goldens):
    assert (
        weights.recognise(put_case(put, "CLIP")).assumed == "" == weights.recognise(put_case(put, "timm wide")).assumed
    )
    google = weights.recognise(goldens / "params_token.npz")  # as heads and GELU: the convention of its project
    assert (google.statistics, google.assumed) == (HALF, "")


def test_statistics_of_other_channels_are_not_used(put):
    found = weights.recognise(put({**TIMM, "pretrained_cfg": {"mean": [0.1], "std": [0.2]}}))
    assert found.statistics == HALF and "are of 1 channels" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("clip", CLIP), ("0.1,0.2,0.3/1,2,3", ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))), ("half", HALF), ("set", None)],
)
def test_names_and_numbers_are_the_normalization(text, expected):
    option = OPTIONS["data"]["normalization"]
    assert normalization.constants(text, 3) == expected
    if expected is not None:
        assert normalization.constants(normalization.text(expected), 3) == expected
        option.check("data.normalization", normalization.text(expected))
    for wrong in ("0.1/0", "0.1,0.2/1", "nan/1", "0.5", "a/b", "1/2/3"):
        with pytest.raises(UserError, match=r"allowed: set, half, imagenet, clip, or MEAN/STD"):
            normalization.constants(wrong, 1)
        with pytest.raises(UserError, match="MEAN/STD"):
            option.parse("data.normalization", wrong)
    with pytest.raises(UserError, match="the images have 1 channels"):
        normalization.constants("clip", 1)


# --- class names -----------------------------------------------------------------------------------------------------


def test_the_names_of_imagenet():
    names = class_names.imagenet1k()
    assert len(names) == len(set(names)) == 1000
    known = {
        0: "tench",
        1: "goldfish",
        207: "golden retriever",
        281: "tabby",
        340: "zebra",
        954: "banana",
        999: "toilet",
    }
    assert all(names[label].startswith(name) for label, name in known.items())


@pytest.mark.parametrize(
    ("keywords", "is_named"),
    [
        ({"config": {**TIMM, "pretrained_cfg": {"num_classes": 1000}}}, True),
        ({"config": {**TIMM, "layer_norm_epsilon": 1e-6, "pretrained_cfg": {"num_classes": 1000}}}, False),
        ({"name": "timm--vit_base_patch16_224.augreg_in21k_ft_in1k"}, True),
        ({"name": "B_16-i21k-300ep--imagenet2012-steps_20k"}, True),
        ({"name": "deit-b16-224"}, True),
        ({"name": "augreg-b16-in21k"}, False),
        ({}, False),
        ({"config": {**TIMM, "id2label": {str(i): f"LABEL_{i}" for i in range(1000)}}}, False),
    ],
)
def test_files_of_imagenet_have_its_names(put, keywords, is_named):
    found = weights.recognise(put(classes=1000, **keywords)).class_names
    assert found == (class_names.imagenet1k() if is_named else None)


def test_recorded_names_come_first(put):
    names = {str(i): f"name {i}" for i in range(1000)}
    found = weights.recognise(put({**TIMM, "id2label": names}, classes=1000, name="deit-b16-224"))
    assert found.class_names == tuple(names.values())


def test_predict_prints_the_recorded_names(put, tmp_path, capsys):
    Image.fromarray(RECORDED["picture"]).save(tmp_path / "picture.png")
    labels = {"id2label": {"0": "tabby", "1": "zebra", "2": "banana"}}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 8}
    folder = put({**TIMM, **labels}, preprocessor=half)
    assert predict.main([f"--init={folder}", str(tmp_path / "picture.png"), "--json"]) == 0
    shown = capsys.readouterr()
    assert {guess["label"] for guess in json.loads(shown.out)["predictions"]} == {"tabby", "zebra", "banana"}
    assert "assumed" not in shown.err


def test_predict_warns_in_one_line_of_what_it_assumes(put, capsys, tmp_path):
    folder = put(name="dinov2", classes=1000)
    by_number = inference.of_file(folder)
    lines = capsys.readouterr().err.splitlines()
    assert by_number.inputs.classes["label"][1] == "1" and len(lines) == 2
    assert "assumed: imagenet" in lines[0] and "--classes=imagenet" in lines[1]
    by_name = inference.of_file(folder, class_names="imagenet", normalize="0.1,0.2,0.3/0.4,0.5,0.6")
    assert by_name.inputs.classes["label"][1].startswith("goldfish") and by_name.inputs.mean == (0.1, 0.2, 0.3)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="normalize is 'set'"):
        inference.of_file(folder, normalize="set")


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["timm augreg", "timm border", "DINOv2", "not normalized", "ConvNeXT"])
def test_what_is_recorded_is_converted_too(put, tmp_path, case):
    folder = put_case(put, case)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "label_names": ["a", "b", "c"]}))
    target = tmp_path / "converted" / "model.safetensors"
    assert convert.main([str(folder), str(target)]) == 0
    before = weights.recognise(folder)
    (tmp_path / "alone").mkdir()
    target.rename(tmp_path / "alone" / "model.safetensors")  # without its config.json: the header has it too
    after = weights.recognise(tmp_path / "alone")
    assert (after.statistics, after.class_names, after.assumed) == (before.statistics, ("a", "b", "c"), "")
    assert after.evaluation == before.evaluation
    sized = tmp_path / "sized.safetensors"
    assert convert.main([str(folder), str(sized), "--image_size=12"]) == 0
    assert "input_size" not in weights.recognise(sized).evaluation


def test_a_model_that_records_nothing_is_converted_as_it_predicts(put, tmp_path):
    """timm would crop to 0.875 of the image where its config says nothing."""
    folder, target = put(name="dinov2"), tmp_path / "model.safetensors"
    assert convert.main([str(folder), str(target)]) == 0
    found = weights.recognise(target)
    assert weights.preparation(found.evaluation, IMAGENET) == COVER and found.statistics == IMAGENET
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 1.0


def test_the_processor_of_images_and_texts_is_read(put):
    """transformers writes processor_config.json for models of both."""
    folder = put(config={})
    recorded = {"do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2, "do_normalize": True}
    recorded |= {"image_mean": list(CLIP[0]), "image_std": list(CLIP[1]), "image_processor_type": "ViTImageProcessor"}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": recorded, "tokenizer": {}}))
    report = weights.load(folder, heads=3)[2]
    assert (report.normalization, report.assumed) == ("clip", "")
    assert report.evaluation["interpolation"] == "bilinear" and report.evaluation["crop_mode"] == "squash"


def test_the_preprocessing_of_open_clip_is_read(put):
    recorded = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
    folder = put(config={})
    (folder / files.OPEN_CLIP).write_text(json.dumps({"preprocess_cfg": recorded}))
    report = weights.load(folder, heads=3)[2]
    assert report.statistics == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and not report.assumed
    assert report.evaluation == {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    (folder / files.OPEN_CLIP).write_text(json.dumps({"preprocess_cfg": {**recorded, "resize_mode": "longest"}}))
    assert "resize_mode 'longest'" in str(weights.load(folder, heads=3)[2])
