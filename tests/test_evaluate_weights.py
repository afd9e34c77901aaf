"""`vit-jax evaluate --init`: a weights file with its own head and class names, on a dataset."""

import csv
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow
from PIL import Image

from vit_jax import evaluate, predict, weights
from vit_jax.data import preparation, sources
from vit_jax.models.parameters import nested, parameter_shapes
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import files

NAMES = ("eleven", "ten", "Nine_9", *(str(digit) for digit in range(8, -1, -1)), "nine, number")
STATISTICS = (0.3, 0.35, 0.4), (0.5, 0.4, 0.45)


@pytest.fixture(scope="module")
def model():
    """A model of RGB images with more classes than there are digits, and parameters of it."""
    made = VisionTransformer(classes=len(NAMES), patch_size=4, width=16, depth=1, heads=2, mlp_width=16)
    generator, shapes = np.random.default_rng(5), parameter_shapes(made, (2, 2), 3)
    return made, nested({path: generator.normal(size=shape).astype("f") for path, shape in shapes.items()})


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    weights.save(path, *model, (8, 8), 3, statistics=STATISTICS, class_names=NAMES)
    return path.parent


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", "test")


@pytest.fixture(scope="module")
def predicted(model, digits):
    """The index of the most probable class of each test digit; images are converted and normalized here."""
    images = (np.repeat(digits.images, 3, axis=3) / 255 - STATISTICS[0]) / STATISTICS[1]
    logits = jax.jit(model[0].apply)({"params": model[1]}, jnp.asarray(images, jnp.float32))
    assert len(np.unique(np.argmax(logits, axis=1))) >= 3
    return np.asarray(logits).argmax(axis=1)


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """20 digits as image files in folders whose names are those of the model but for their spelling."""
    root = tmp_path_factory.mktemp("digits")
    for index in range(20):
        label = digits.labels[index]
        directory = root / ("nine 9" if label == 9 else str(label))
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(digits.images[index], 3, axis=2)).save(directory / f"{index}.png")
    return root


def run(capsys, *arguments):
    status = evaluate.main([*arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_every_image_of_a_folder_is_scored_among_all_classes_of_the_model(
    file, folder, predicted, digits, tmp_path, capsys
):
    arguments = ["--data=folder", f"--data_dir={folder}", "--batch_size=8", f"--out={tmp_path / 'out'}"]
    status, output, errors = run(capsys, f"--init={file}", *arguments)
    assert status == 0, errors
    found = json.loads(output)
    names = [NAMES.index("Nine_9" if label == 9 else str(label)) for label in digits.labels[:20]]
    assert found["all/examples"] == 20 and (found["init"], found["data"]) == (str(file), "folder")
    assert found["all/accuracy"] == pytest.approx(np.mean(predicted[:20] == names))
    assert f"{folder} has no splits: all images are scored" in errors
    count = len({*digits.labels[:20]})
    assert f"accuracy is among all 13 classes of {file}, of which folder has {count}" in errors
    with open(tmp_path / "out" / "predictions.csv", newline="") as rows:
        for row in csv.DictReader(rows):
            index = int(row["path"].rpartition("/")[2].removesuffix(".png"))
            assert (row["true"], row["predicted"]) == (NAMES[names[index]], NAMES[predicted[index]])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["init"] == str(file)


PREPARED = {
    "timm": {"crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"},
    "border": {"crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "border"},
    "hugging face": {"do_resize": True, "size": {"shortest_edge": 12}, "do_center_crop": True, "crop_size": 8},
}


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory):
    """A function that writes the model with a recorded preparation, and returns its folder."""

    def write(case):
        path = tmp_path_factory.mktemp("prepared") / "model.safetensors"
        weights.save(path, *model, (8, 8), 3, statistics=STATISTICS, class_names=NAMES)
        config = json.loads((path.parent / "config.json").read_text())
        del config["vit_jax"]["resize_rules"]
        recorded = config.pop("pretrained_cfg")
        if case == "hugging face":
            processor = {**PREPARED[case], "image_mean": recorded["mean"], "image_std": recorded["std"], "resample": 2}
            (path.parent / "preprocessor_config.json").write_text(json.dumps(processor))
        else:
            config["pretrained_cfg"] = {**recorded, **PREPARED[case]}
        (path.parent / "config.json").write_text(json.dumps(config))
        return path.parent

    return write


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """12 pictures of several sizes in folders of three classes."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    for index, (height, width) in enumerate(3 * [(11, 30), (40, 17), (8, 8), (23, 24)]):
        directory = root / ("6", "7", "eleven")[index % 3]
        directory.mkdir(exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (3, 3, 3), np.uint8))
        small.resize((width, height)).save(directory / f"{index}.png")
    return root


@pytest.mark.parametrize("case", mostly_slow(PREPARED, 3))
@pytest.mark.slow
def test_images_are_prepared_as_by_predict(prepared, pictures, case, tmp_path, capsys, monkeypatch):
    file = prepared(case)
    assert predict.main([f"--init={file}", str(pictures), "--top=13", f"--csv={tmp_path / 'predicted.csv'}"]) == 0
    capsys.readouterr()
    expected = {}
    with open(tmp_path / "predicted.csv", newline="") as rows:
        for row in csv.DictReader(rows):
            expected.setdefault(row["path"], (row["class"], float(row["probability"])))
    arguments = ["--data=folder", f"--data_dir={pictures}", f"--out={tmp_path / 'out'}"]
    status, output, errors = run(capsys, f"--init={file}", *arguments)
    assert status == 0, errors
    with open(tmp_path / "out" / "predictions.csv", newline="") as rows:
        scored = list(csv.DictReader(rows))
    assert len(scored) == len(expected) == 12
    for row in scored:
        name, probability = expected[row["path"]]
        assert row["predicted"] == name and float(row["probability"]) == pytest.approx(probability, rel=1e-5)
    right = sum(name == path.split("/")[-2] for path, (name, _) in expected.items())
    assert 0 < right < 12 and json.loads(output)["all/accuracy"] == pytest.approx(right / 12)
    # The pictures tell preparations apart; and each preparation has a cache of its own.
    with monkeypatch.context() as patch:
        patch.setattr(weights, "preparation", lambda *_: preparation.COVER)
        run(capsys, f"--init={file}", *arguments)
    with open(tmp_path / "out" / "predictions.csv", newline="") as rows:
        assert any(abs(float(row["probability"]) - expected[row["path"]][1]) > 1e-3 for row in csv.DictReader(rows))


def test_a_model_without_class_names_gets_those_of_the_data(model, pictures, tmp_path, capsys):
    weights.save(tmp_path / "model.npz", model[0].clone(classes=3), head_of(model[1], 3))
    arguments = ["--data=folder", f"--data_dir={pictures}", f"--out={tmp_path / 'out'}", "--image_size=8"]
    status, _, errors = run(capsys, f"--init={tmp_path / 'model.npz'}", *arguments)
    assert status == 0 and "has no class names: the 3 classes are assumed to be in the same order" in errors, errors
    with open(tmp_path / "out" / "classes.csv", newline="") as rows:
        assert [row["class"] for row in csv.DictReader(rows)] == ["6", "7", "eleven"]


def head_of(parameters, classes):
    """The parameters with the first classes of the head."""
    return {**parameters, "head": jax.tree.map(lambda array: array[..., :classes], parameters["head"])}


def test_a_head_that_is_not_supported_is_refused_with_what_can_be_done(pictures, tmp_path, capsys):
    stored = files.open_file(Path(__file__).parent / "weights" / "references" / "timm_vit")
    file = tmp_path / "model.safetensors"
    shutil.copy(stored.path.with_name("config.json"), tmp_path)
    files.write_safetensors(file, {name: array for name, array in stored.arrays.items() if name != "head.bias"})
    status, output, errors = run(capsys, f"--init={file}", "--data=folder", f"--data_dir={pictures}")
    assert (status, output) == (2, "") and "for features: vit-jax features" in errors and "classes=N" not in errors
    assert "its head is not one linear layer with a bias" in errors


@pytest.mark.parametrize("decoded", [True, False])
def test_only_images_of_another_size_are_prepared(digits, pictures, tmp_path, decoded):
    how = preparation.Preparation(crop_pct=0.5, interpolation="nearest", resize_rules="timm")
    where = {"decoded": decoded, "cache_dir": tmp_path}
    of_own_size = sources.load("digits", "test", image_size=8, preparation=how, **where)
    np.testing.assert_array_equal(of_own_size.images[:], digits.images)
    enlarged = sources.load("digits", "test", image_size=16, preparation=how, **where)
    middle = digits.images[:, 2:6, 2:6].repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_array_equal(enlarged.images[:], middle)
    of_files = sources.load("folder", "train", data_dir=pictures, image_size=6, preparation=how, **where)
    for index, path in enumerate(of_files.paths()):
        expected = preparation.fit(Image.open(path), (6, 6), how)
        np.testing.assert_array_equal(of_files.read([index])[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "train[3:20]"])
def test_grey_images_and_splits_and_class_names_from_a_file(file, model, predicted, split, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["x", "y", *map(str, range(9, -1, -1)), "z"]))
    status, output, _ = run(capsys, f"--init={file}", "--data=digits", f"--classes={names}", f"--split={split}")
    found, source = json.loads(output), sources.load("digits", split)
    assert status == 0 and found[f"{split}/examples"] == len(source)
    if split == "test":
        assert found["test/accuracy"] == pytest.approx(np.mean(predicted == 11 - source.labels))


@pytest.mark.slow
def test_a_converted_run_has_the_metrics_of_the_run(make_run, tmp_path, capsys):
    from vit_jax import convert

    workdir = make_run(augment={"test_flip": True})
    assert convert.main([str(workdir), str(tmp_path / "model.safetensors")]) == 0
    capsys.readouterr()
    status, output, _ = run(capsys, f"--workdir={workdir}")
    expected = json.loads(output)
    for init in (workdir, tmp_path / "model.safetensors"):
        status, output, errors = run(capsys, f"--init={init}", "--data=digits")
        assert status == 0 and "10 classes" in errors
        found = json.loads(output)
        assert found["test/accuracy"] == expected["test/accuracy"] and found["test/examples"] == 360
        assert found["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)
    flags = f"--init={tmp_path / 'model.safetensors'}", "--data=digits", "--views=both"
    found = json.loads(run(capsys, *flags)[1])
    for name, view in (("test/loss", None), ("test/nll/one_view", "off")):
        status, output, _ = run(capsys, f"--workdir={workdir}", *([] if view is None else [f"--views={view}"]))
        assert found[name] == pytest.approx(json.loads(output)[name.removesuffix("/one_view")], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data=digits"], "digits has no class names to match them by"),
        ([], "--data is missing"),
        (["--data=folder"], "--data_dir is not set"),
        (["--data=digits", "--best"], "--best cannot be combined with --init"),
        (["--data=digits", "--batch_size=0"], "--batch_size is 0"),
        (["--data=digits", "--split=other"], "other"),
    ],
)
def test_what_does_not_fit_is_refused(file, arguments, words, capsys):
    status, output, errors = run(capsys, f"--init={file}", *arguments)
    assert (status, output) == (2, "") and words in errors and errors.count("\n") <= 4


def test_flags_of_weights_are_refused_for_a_run_and_one_of_both_is_needed(capsys):
    assert evaluate.main(["--workdir=x", "--data=digits"]) == 2
    assert "--data cannot be combined with --workdir" in capsys.readouterr().err
    for arguments in ([], ["--workdir=x", "--init=y"]):
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
