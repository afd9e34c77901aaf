"""Predictions agree with evaluation for every kind of image file, and mistakes are reported."""

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import run_command
from PIL import Image

from vit_jax import config as options
from vit_jax import evaluate, inference, predict, weights
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import build_model


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", "test")


@pytest.fixture(scope="module")
def album(digits, tmp_path_factory):
    """Returns a directory with the first twelve test digits as PNG files, some of them in a subdirectory."""
    directory = tmp_path_factory.mktemp("album")
    (directory / "more" / ".hidden").mkdir(parents=True)
    for index in range(12):
        path = directory / ("more" if index > 7 else "") / f"{index:02}.png"
        Image.fromarray(digits.images[index, ..., 0]).save(path)
    Image.new("L", (8, 8)).save(directory / "more" / ".hidden" / "no.png")
    (directory / "more" / "notes.txt").write_text("not an image")
    return directory


def expected_logits(workdir, images, classes):
    """Returns the logits of uint8 images: Orbax reads the parameters, and images are normalized here."""
    from orbax.checkpoint import v1 as ocp

    parameters = ocp.load_checkpointables(workdir / "checkpoints" / "0")["state"]["parameters"]
    config = options.from_dict(json.loads((workdir / "config.json").read_text()))
    model = build_model.build(config.model, classes=classes, dtype=np.float32)
    train = sources.load("digits", "train").images / 255
    inputs = ((images / 255 - train.mean()) / train.std()).astype(np.float32)
    return jax.tree.map(np.asarray, jax.jit(model.apply)({"params": parameters}, inputs))


HEADS = {"label": 10, "parity": 2}


def test_predictions_agree_with_the_model(digits_run, digits, album):
    expected = expected_logits(digits_run, digits.images[:12], HEADS)
    predictions = predict.Predictor(digits_run)(album)
    assert [Path(prediction.image).name for prediction in predictions] == [f"{index:02}.png" for index in range(12)]
    for head in HEADS:
        actual = [prediction.logits[head] for prediction in predictions]
        np.testing.assert_allclose(actual, expected[head], atol=1e-5)
    for prediction, row in zip(predictions, expected["label"], strict=True):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        order = np.argsort(-probabilities)[:5]
        assert [guess.label for guess in prediction.guesses] == [str(index) for index in order]
        actual = [guess.probability for guess in prediction.guesses]
        np.testing.assert_allclose(actual, probabilities[order], atol=1e-5)
        assert prediction.label == prediction.guesses[0].label
        parity = ("even", "odd")[prediction.logits["parity"].argmax()]
        assert prediction.heads["parity"][0].label == parity


@pytest.mark.slow
def test_accuracy_of_predictions_equals_that_of_evaluate(digits_run, digits, capsys):
    assert evaluate.main([f"--workdir={digits_run}"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    predictions = predict.Predictor(digits_run, batch_size=56)(digits.images)  # the last batch is not full
    assert [prediction.image for prediction in predictions] == list(range(360))
    labels = np.array([int(prediction.label) for prediction in predictions])
    assert (labels == digits.labels).mean() == pytest.approx(metrics["test/label/accuracy"])


@pytest.mark.slow
def test_predictions_average_the_views_of_evaluation(make_run, digits):
    workdir = make_run(augment={"test_flip": True, "test_shift": 1})
    predictions = predict.Predictor(workdir, batch_size=8)(digits.images[3])
    padded = np.pad(digits.images[3, ..., 0], 1, mode="reflect")
    views = [digits.images[3, ..., 0], *(padded[t : t + 8, x : x + 8] for t, x in ((0, 1), (1, 0), (1, 2), (2, 1)))]
    views = np.stack([*views, *(view[:, ::-1] for view in views)])[..., None]
    logits = expected_logits(workdir, views, 10)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = (exponentials / exponentials.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(predictions[0].logits["label"], np.log(probabilities), atol=1e-5)


def resize_with_pillow(image):
    """Returns an image as 8x8 grey pixels, step by step as docs/data.md describes it."""
    factor = 8 / min(image.size)
    size = tuple(max(8, round(side * factor)) for side in image.size)
    resized = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - 8) // 2, (resized.shape[1] - 8) // 2
    return resized[top : top + 8, left : left + 8]


def test_every_kind_of_image_file_is_converted(digits_run, digits, tmp_path):
    grey = digits.images[5, ..., 0]
    alpha = np.dstack([np.full_like(grey, 90)] * 3 + [grey])
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)).resize((500, 300))
    orientation = Image.Exif()
    orientation[274] = 6  # rotate by 90 degrees clockwise
    files = {
        "grey.png": (Image.fromarray(grey), {}, grey),
        "sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}, grey),
        "rgb.bmp": (Image.fromarray(np.dstack([grey] * 3)), {}, grey),
        "opaque.png": (Image.fromarray(np.dstack([grey] * 3 + [np.full_like(grey, 255)])), {}, grey),
        "alpha.png": (Image.fromarray(alpha), {}, np.rint((alpha[..., 0] * (grey / 255)) + 255 - grey)),
        "large.jpg": (large, {"quality": 100, "subsampling": 0}, None),
        "rotated.png": (Image.fromarray(grey), {"exif": orientation}, np.rot90(grey, -1)),
    }
    for name, (image, save_options, _) in files.items():
        image.save(tmp_path / name, **save_options)
    with Image.open(tmp_path / "large.jpg") as image:
        files["large.jpg"] = (*files["large.jpg"][:2], resize_with_pillow(image))
    predictions = predict.Predictor(digits_run)([tmp_path / name for name in files])
    images = np.stack([pixels for _, _, pixels in files.values()])[..., None]
    expected = expected_logits(digits_run, images, HEADS)["label"]
    for prediction, row in zip(predictions, expected, strict=True):
        # Pillow blends transparent pixels in 8 bits, with its own rounding.
        atol = 0.1 if "alpha.png" in prediction.image else 1e-5
        np.testing.assert_allclose(prediction.logits["label"], row, atol=atol, err_msg=prediction.image)


def write_damaged_files(directory, digits):
    """Returns the paths of three damaged files, a good one (the second), and one that does not exist."""
    Image.fromarray(digits.images[0, ..., 0]).save(directory / "good.png")
    (directory / "cut.png").write_bytes((directory / "good.png").read_bytes()[:60])
    (directory / "empty.jpg").write_bytes(b"")
    (directory / "text.png").write_text("not an image")
    return [str(directory / name) for name in ("text.png", "good.png", "cut.png", "missing.png", "empty.jpg")]


def test_unreadable_files_are_reported_and_skipped(digits_run, digits, tmp_path, capsys):
    files = write_damaged_files(tmp_path, digits)
    assert predict.main([f"--workdir={digits_run}", *files, "--json"]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["path"] for line in captured.out.splitlines()] == [files[1]]
    errors = captured.err.splitlines()
    assert [line.split(": ")[0] for line in errors[:4]] == [files[0], *files[2:]]
    assert errors[2].endswith("no such file") and errors[4] == "4 of 5 images could not be read"
    assert predict.main([f"--workdir={digits_run}", files[0], files[4]]) == 2
    with pytest.raises(UserError, match=r"text\.png cannot be read as an image: not an image"):
        predict.Predictor(digits_run)(files)
    results = list(predict.Predictor(digits_run).stream([np.zeros((8, 8)), digits.images[0]]))
    assert results[0] == inference.Unreadable(0, "the array has dtype float64, not uint8")
    assert results[1].image == 1


def test_csv_and_json_agree(digits_run, album, tmp_path, capsys):
    out = tmp_path / "predictions.csv"
    assert predict.main([f"--workdir={digits_run}", "--json", "--top=3", f"--csv={out}", str(album)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12 and list(lines[0]["predictions"]) == ["label", "parity"]
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "head", "rank", "class", "probability"] and len(rows) == 12 * (3 + 2)
    expected = [
        (line["path"], head, str(rank), guess["label"], pytest.approx(guess["probability"], rel=1e-5))
        for line in lines
        for head, guesses in line["predictions"].items()
        for rank, guess in enumerate(guesses, 1)
    ]
    assert [(*list(row.values())[:4], float(row["probability"])) for row in rows] == expected
    for line in lines:
        assert sum(guess["probability"] for guess in line["predictions"]["parity"]) == pytest.approx(1)


def test_output_of_a_single_head_does_not_name_it(make_run, digits, tmp_path, capsys):
    workdir, out = make_run(), tmp_path / "predictions.csv"
    Image.fromarray(digits.images[0, ..., 0]).save(tmp_path / "one.png")
    arguments = [f"--workdir={workdir}", str(tmp_path / "one.png"), "--top=2"]
    assert predict.main([*arguments, "--json", f"--csv={out}"]) == 0
    guesses = json.loads(capsys.readouterr().out)["predictions"]
    assert [sorted(guess) for guess in guesses] == [["label", "probability"]] * 2
    assert out.read_text().splitlines()[0] == "path,rank,class,probability"
    assert predict.main(arguments) == 0
    classes = ", ".join(f"{guess['label']} {100 * guess['probability']:.1f} %" for guess in guesses)
    assert capsys.readouterr().out == f"{tmp_path / 'one.png'}  {classes}\n"


def test_data_json_replaces_the_data_set(digits_run, digits, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(digits_run, copy)
    (copy / "data.json").unlink()
    with_data_set = predict.Predictor(copy)(digits.images[0])[0]
    monkeypatch.setattr(sources, "load", lambda *_, **__: pytest.fail("the dataset was opened"))
    with_data_json = predict.Predictor(digits_run)(digits.images[0])[0]
    np.testing.assert_array_equal(with_data_set.logits["label"], with_data_json.logits["label"])
    assert with_data_set.heads == with_data_json.heads


@pytest.mark.slow
def test_predictions_with_a_weights_file(tmp_path, digits, monkeypatch, capsys):
    model = VisionTransformer(classes=3, patch_size=4, width=12, depth=1, heads=2, mlp_width=12)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    generator = np.random.default_rng(0)
    parameters = jax.tree.map(lambda leaf: generator.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
    weights.save(tmp_path / "model.npz", model, parameters)
    image = generator.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    expected = model.apply({"params": parameters}, jnp.asarray(image[None] / 127.5 - 1, jnp.float32))[0]
    prediction = predict.Predictor(predict.of_file(tmp_path / "model.npz"))(image)[0]
    np.testing.assert_allclose(prediction.logits["label"], expected, atol=1e-5)
    arguments = [f"--init={tmp_path / 'model.npz'}", str(tmp_path / "image.png"), "--json"]
    assert predict.main([*arguments, f"--classes={tmp_path / 'names.txt'}"]) == 0
    labels = [guess["label"] for guess in json.loads(capsys.readouterr().out)["predictions"]]
    assert labels == [("cat", "dog", "owl")[index] for index in np.argsort(-np.asarray(expected))]
    (tmp_path / "names.txt").write_text("cat\n")
    assert predict.main([*arguments, f"--classes={tmp_path / 'names.txt'}"]) == 2
    assert "has 3 classes, but 1 class names are given" in capsys.readouterr().err
    # A file such as an average of an older version says 'set', but has no mean and std of that dataset.
    model, parameters, report = weights.load(tmp_path / "model.npz")
    by_set = dataclasses.replace(report, normalization="set", statistics=None)
    monkeypatch.setattr(weights, "load", lambda *_, **__: (model, parameters, by_set))
    assert predict.main(arguments) == 2
    assert "mean and std of their dataset, which are not in the file" in capsys.readouterr().err
    assert predict.main([*arguments, "--normalize=half"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=RUN", "--step=7"], "step 7"),
        (["--workdir=RUN", "--best"], "RUN"),
        (["--workdir=RUN", "--top=0"], "--top is 0"),
        (["--workdir=RUN", "--batch_size=0"], "--batch_size is 0"),
        (["--workdir=RUN", "--classes=names.txt"], "--classes cannot be combined with --workdir"),
        (["--workdir=RUN", "--csv=/nowhere/at/all.csv"], "--csv=/nowhere/at/all.csv cannot be written"),
        (["--workdir=EMPTY"], "EMPTY"),
        (["--workdir=RUN", "EMPTY"], "no images found below"),
        (["--init=RUN/none.npz"], "none.npz"),
        (["--init=RUN/none.npz", "--best"], "--best cannot be combined with --init"),
    ],
)
def test_mistakes_are_reported(arguments, message, digits_run, album, tmp_path, capsys):
    images = [str(tmp_path)] if "EMPTY" in arguments else [str(album)]
    *typed, message = (
        text.replace("RUN", str(digits_run)).replace("EMPTY", str(tmp_path)) for text in (*arguments, message)
    )
    assert predict.main([*(argument for argument in typed if argument.startswith("--")), *images]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.splitlines()) <= 3


def test_a_run_without_checkpoints_is_reported(digits_run, album, tmp_path, capsys):
    shutil.copy(digits_run / "config.json", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert predict.main([f"--workdir={tmp_path}", str(album)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_in_a_process(digits_run, album):
    """The command's module does not import JAX, and a closed output pipe is not an error."""
    run_command("import sys, vit_jax.predict\nassert 'jax' not in sys.modules\nvit_jax.predict.Predictor")
    arguments = ["vit_jax.predict", f"--workdir={digits_run}", "--json", album]
    output = run_command(*arguments, stderr=subprocess.PIPE)
    assert [Path(json.loads(line)["path"]).name for line in output.splitlines()][:2] == ["00.png", "01.png"]
    output = run_command('"$@" | true\n', "bash", sys.executable, "-m", *arguments, python="bash")
    assert "left out" in output and len(output.splitlines()) == 1


@pytest.mark.parametrize(
    "fields", [{"pooling": "map", "pool_heads": 4}, {"pooling": "mean", "norm_after_pooling": True}]
)
@pytest.mark.slow
def test_patches_of_models_whose_options_belong_to_their_pooling(fields):
    """Options that have no meaning without pooling do not prevent reading the tokens before it."""
    import jax

    from vit_jax.checkpoint.input_spec import InputSpec
    from vit_jax.classifier import Classifier
    from vit_jax.data.augment import Augment
    from vit_jax.inference import Predictor
    from vit_jax.models.vit import VisionTransformer

    model = VisionTransformer(classes=2, patch_size=4, width=16, depth=1, heads=2, mlp_width=16, **fields)
    half = ((0.5,) * 3,) * 2
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    parameters = model.init(jax.random.key(0), Augment(*half).normalize(jax.numpy.asarray(images)))["params"]
    spec = InputSpec("test", (8, 8, 3), *half, {"label": ("a", "b")})
    found = Predictor(Classifier(model, parameters, Augment(*half), spec)).features(images, patches=True)
    assert found.shape == (2, 5 - 1, 16) and np.isfinite(found).all()
