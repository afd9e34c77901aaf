"""What is known of a model's inputs and outputs is kept when it is converted: size, mean, std, class names, views."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import tiny_config
from PIL import Image
from toy import make_state

from vit_jax import atomic, checkpoints, convert, inference, optim, weights
from vit_jax.checkpoint import input_spec, manager
from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.errors import UserError
from vit_jax.training import build_model, setup

SHAPE = (8, 12, 3)
SPEC = InputSpec("photos", SHAPE, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), {"label": ("ant", "bee", "cat", "dog")})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The directory of a run on images of 8 x 12 pixels, with positions that are no array and its own normalization."""
    directory = tmp_path_factory.mktemp("run")
    config = tiny_config(model={"variant": "Ti/2", "position": "sincos_2d"}, train={"loss": "sigmoid"})
    config.augment.update(test_flip=True, test_shift=1)
    model = build_model.build(config.model, classes=4, dtype=None).clone(attention_kernel="plain")
    state = make_state(setup.init_parameters(model, SHAPE, 0), optim.make(config.optimizer, 10), False)
    head = state.parameters["head"]["logits"]
    head["kernel"] = np.random.default_rng(0).normal(size=head["kernel"].shape).astype("f")
    with manager.CheckpointManager(directory, keep=1) as kept:
        kept.save(state.to_arrays(), {"config": config.to_dict(), "seconds": 1.0})
    atomic.write_json(directory / "config.json", config.to_dict())
    input_spec.write(directory, SPEC)
    return directory


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The directory of the run's export for timm."""
    file = tmp_path_factory.mktemp("export") / "model.safetensors"
    assert convert.main([str(workdir), str(file)]) == 0
    return file.parent


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def about(report):
    fields = ("image_size", "channels", "statistics", "class_names", "evaluation")
    return {name: getattr(report, name) for name in fields}


def test_a_run_is_exported_without_flags(exported):
    config = config_of(exported)
    assert config["model_args"]["img_size"] == [8, 12] and config["model_args"]["in_chans"] == 3
    assert config["pretrained_cfg"] == {
        "input_size": [3, 8, 12],
        "fixed_input_size": True,
        "num_classes": 4,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    assert config["label_names"] == ["ant", "bee", "cat", "dog"] and config["num_classes"] == 4
    views = {"loss": "sigmoid", "test_flip": True, "test_shift": 1}
    assert config["vit_jax"] == {**views, "resize_rules": "vit_jax"}


def test_what_is_exported_is_read_back(workdir, exported, tmp_path):
    run, export = weights.load(workdir)[2], weights.load(exported)[2]
    assert about(run) == about(export)
    assert (run.statistics, run.image_size) == ((SPEC.mean, SPEC.std), (8, 12))
    assert convert.main([str(exported), str(tmp_path / "model.safetensors")]) == 0
    assert config_of(tmp_path) == config_of(exported)


def test_an_average_has_it_too(workdir, tmp_path):
    file = tmp_path / "mean.safetensors"
    assert checkpoints.main(["average", str(workdir), f"--out={file}"]) == 0
    assert about(weights.load(file)[2]) == about(weights.load(workdir)[2])
    assert inference.of_file(file).inputs == dataclasses.replace(SPEC, set=str(file))


def test_what_no_longer_fits_is_left_out(workdir, tmp_path):
    assert convert.main([str(workdir), str(tmp_path / "x.safetensors"), "--classes=7", "--channels=1"]) == 0
    config = config_of(tmp_path)
    assert "label_names" not in config and "mean" not in config["pretrained_cfg"]
    assert (config["num_classes"], config["pretrained_cfg"]["input_size"]) == (7, [1, 8, 12])


def test_a_run_without_data_json_is_exported_as_before(workdir, tmp_path, capsys):
    for name in ("config.json", "checkpoints"):
        (tmp_path / name).symlink_to(workdir / name)
    target = tmp_path / "out" / "model.safetensors"
    assert convert.main([str(tmp_path), str(target)]) == 2
    assert "--image_size=HEIGHTxWIDTH" in capsys.readouterr().err
    assert convert.main([str(tmp_path), str(target), "--image_size=8x12"]) == 0
    assert "mean" not in config_of(target.parent)["pretrained_cfg"]


def test_an_npz_file_says_what_it_loses(workdir, goldens, tmp_path, capsys):
    assert convert.main([str(workdir), str(tmp_path / "model.npz")]) == 0
    note = "note: a .npz file has no place for the mean and std of its images and class names"
    assert note in capsys.readouterr().out
    assert convert.main([str(goldens / "params_token.npz"), str(tmp_path / "google.npz")]) == 0
    assert "has no place" not in capsys.readouterr().out


def test_googles_models_are_exported_with_mean_and_std_one_half(goldens, tmp_path):
    """timm would take those of ImageNet."""
    assert convert.main([str(goldens / "params_token.npz"), str(tmp_path / "model.safetensors")]) == 0
    recorded = config_of(tmp_path)["pretrained_cfg"]
    assert (recorded["mean"], recorded["std"]) == ([0.5] * 3, [0.5] * 3)


def test_what_timm_recorded_is_kept(helpers, tmp_path):
    model, parameters = helpers.small()
    weights.save(tmp_path / "model.safetensors", model, parameters, 32)
    config = config_of(tmp_path)
    theirs = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9, "interpolation": "bilinear"}
    config["pretrained_cfg"] |= theirs
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = tmp_path / "again" / "model.safetensors"
    assert convert.main([str(tmp_path / "model.safetensors"), str(target)]) == 0
    assert {key: config_of(target.parent)["pretrained_cfg"][key] for key in theirs} == theirs


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("pretrained_cfg", {"crop_pct": "most"}, "crop_pct 'most': it must be of type float"),
        ("pretrained_cfg", {"crop_pct": -1.0}, "crop_pct -1.0: it must not be negative"),
        ("vit_jax", {"test_shift": 1.5}, "test_shift 1.5: it must be of type int"),
        ("vit_jax", {"loss": "mse"}, "loss 'mse'\n  allowed: softmax, sigmoid"),
    ],
)
def test_invalid_records_are_named(helpers, tmp_path, section, value, message):
    model, parameters = helpers.small()
    weights.save(tmp_path / "model.safetensors", model, parameters, 32)
    config = config_of(tmp_path)
    config[section] = {**config.get(section, {}), **value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json has {message}"):
        inference.of_file(tmp_path)


def test_save_checks_the_counts(helpers, tmp_path):
    model, parameters = helpers.small()
    for keywords, message in (
        ({"class_names": ["a", "b"]}, "class_names has 2 names\n  allowed: one per class \\(5\\)"),
        ({"statistics": ((0.5,), (0.5,))}, "one number per channel \\(3\\)"),
    ):
        with pytest.raises(UserError, match=message):
            weights.save(tmp_path / "model.safetensors", model, parameters, 32, **keywords)
    assert not list(tmp_path.iterdir())


def pictures(folder):
    """Paths of images of the size of the model, and of other sizes and modes."""
    generator, paths = np.random.default_rng(1), []
    for index, (size, mode) in enumerate([((12, 8), "RGB"), ((12, 8), "RGB"), ((40, 31), "RGB"), ((20, 50), "L")]):
        image = Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
        image.save(folder / f"{index}.png")
        paths.append(folder / f"{index}.png")
    return paths


@pytest.mark.slow
def test_the_export_predicts_what_the_run_predicts(workdir, exported, tmp_path):
    run, export = inference.Predictor(workdir), inference.Predictor(inference.of_file(exported))
    for one, other in zip(run(pictures(tmp_path)), export(pictures(tmp_path)), strict=True):
        assert [guess.label for guess in one.guesses] == [guess.label for guess in other.guesses]
        probabilities = [[guess.probability for guess in each.guesses] for each in (one, other)]
        np.testing.assert_allclose(*probabilities, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_timm_prepares_images_as_the_run_does(timm, workdir, exported, tmp_path):
    import torch

    theirs = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(theirs)
    assert (data["mean"], data["std"], data["input_size"]) == (list(SPEC.mean), list(SPEC.std), (3, 8, 12))
    assert (data["crop_pct"], data["interpolation"], data["crop_mode"]) == (1.0, "bicubic", "center")
    assert theirs.pretrained_cfg["label_names"] == ["ant", "bee", "cat", "dog"]
    transform = timm.data.create_transform(**data, is_training=False)
    paths = pictures(tmp_path)[:2]  # of the model's size: others are cut a pixel differently
    with torch.no_grad():
        logits = theirs(torch.stack([transform(Image.open(path)) for path in paths])).numpy()
    classifier = inference.of_run(workdir)
    plain = dataclasses.replace(classifier.augment, test_flip=False, test_shift=0)  # timm averages no views
    ours = inference.Predictor(dataclasses.replace(classifier, augment=plain))(paths)
    np.testing.assert_allclose([one.logits["label"] for one in ours], logits, rtol=0, atol=1e-4)


def test_images_of_another_size_than_the_parameters_are_for(workdir):
    model, parameters, _ = weights.load(workdir)
    model = model.clone(position="learned", position_grid=None)
    parameters = {**parameters, "positions": {"table": np.zeros((1, 24 + model.class_token, model.width), "f")}}
    jax.eval_shape(model.apply, {"params": parameters}, np.zeros((1, *SHAPE), "f"))
    for shape, words in ((1, 8, 8, 3), "8x8x3"), ((1, 8, 12, 1), "8x12x1"):
        with pytest.raises(ValueError, match=rf"another size or number of channels than {words}.*\n.*weights\.load\("):
            jax.eval_shape(model.apply, {"params": parameters}, np.zeros(shape, "f"))


def test_the_state_of_training_is_one_row_of_the_report(workdir):
    report = weights.load(workdir)[2]
    rows = [line for line in report.table().splitlines() if line.startswith("  ignored")]
    arrays = sum(row.action == "ignored" for row in report.rows)
    assert len(rows) == 1 and rows[0].startswith(f"  ignored      {arrays} arrays: ")
    assert rows[0].endswith(f" and {arrays - 3} more  (training state)")
    assert len(report.table(verbose=True).splitlines()) > arrays
    loaded = len(report.rows) - arrays
    first = (
        f"initial parameters: runs/one, a run of vit_jax, {len(report.rows)} arrays: {loaded} loaded, {arrays} ignored"
    )
    assert report.changes("runs/one").splitlines() == [first, *rows, "note: the parameters of step 0"]


@pytest.mark.parametrize("fields", [{"pooling": "map", "class_token": False}, {"final_norm": False}], ids=str)
def test_an_export_with_a_norm_before_the_blocks_is_no_perception_encoder(tmp_path, helpers, fields):
    """Files without a config.json that have such arrays are of PE, whose positions are rotary too."""
    model, parameters = helpers.small((16, 16), input_norm="tokens", layer_norm_epsilon=1e-5, **fields)
    weights.save(tmp_path / "model.safetensors", model, parameters, (16, 16))
    assert weights.load(tmp_path)[0] == model
