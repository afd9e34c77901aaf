"""Predictions: the logits that evaluation gives, whatever kind of file the image comes in; what is wrong is named."""

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
from PIL import Image

from vit_jax import config as options
from vit_jax import evaluate, inference, predict, weights
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import build_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", "test")


@pytest.fixture(scope="module")
def album(digits, tmp_path_factory):
    """The first twelve test digits as PNG files, in two folders."""
    folder = tmp_path_factory.mktemp("album")
    (folder / "more" / ".hidden").mkdir(parents=True)
    for place in range(12):
        Image.fromarray(digits.images[place, ..., 0]).save(folder / ("more" if place > 7 else "") / f"{place:02}.png")
    Image.new("L", (8, 8)).save(folder / "more" / ".hidden" / "no.png")
    (folder / "more" / "notes.txt").write_text("no image")
    return folder


def stored(folder):
    """The config and the parameters of a run's checkpoint, as Orbax has them."""
    from orbax.checkpoint import v1 as ocp

    parameters = ocp.load_checkpointables(folder / "checkpoints" / "0")["state"]["parameters"]
    return options.from_dict(json.loads((folder / "config.json").read_text())), parameters


def logits_of(folder, images, classes):
    """Of uint8 images, by the model and a mean and std computed here."""
    config, parameters = stored(folder)
    model = build_model.build(config.model, classes=classes, dtype=np.float32)
    train = sources.load("digits", "train").images / 255
    inputs = ((images / 255 - train.mean()) / train.std()).astype(np.float32)
    return jax.tree.map(np.asarray, jax.jit(model.apply)({"params": parameters}, inputs))


HEADS = {"label": 10, "parity": 2}


def test_the_logits_are_those_of_evaluation(digits_run, digits, album):
    wanted = logits_of(digits_run, digits.images[:12], HEADS)
    predictor = predict.Predictor(digits_run)
    found = predictor(album)
    assert [Path(one.image).name for one in found] == [f"{place:02}.png" for place in range(12)]
    for kind in HEADS:
        np.testing.assert_allclose([one.logits[kind] for one in found], wanted[kind], atol=1e-5)
    for one, row in zip(found, wanted["label"], strict=True):
        shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        order = np.argsort(-shares)[:5]
        assert [guess.label for guess in one.guesses] == [str(place) for place in order]
        np.testing.assert_allclose([guess.probability for guess in one.guesses], shares[order], atol=1e-5)
        assert one.label == one.guesses[0].label
        assert [guess.label for guess in one.heads["parity"]][:1] == [("even", "odd")[one.logits["parity"].argmax()]]


@pytest.mark.slow
def test_all_of_the_test_split_is_as_accurate_as_evaluation_says(digits_run, digits, capsys):
    assert evaluate.main([f"--workdir={digits_run}"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    found = predict.Predictor(digits_run, batch_size=56)(digits.images)  # the last batch is not full
    assert [one.image for one in found] == list(range(360))
    accuracy = np.mean([int(one.label) == label for one, label in zip(found, digits.labels, strict=True)])
    assert accuracy == pytest.approx(wanted["test/label/accuracy"])


@pytest.mark.slow
def test_the_views_of_evaluation_are_taken(make_run, digits):
    folder = make_run(augment={"test_flip": True, "test_shift": 1})
    found = predict.Predictor(folder, batch_size=8)(digits.images[3])
    padded = np.pad(digits.images[3, ..., 0], 1, mode="reflect")
    views = [digits.images[3, ..., 0], *(padded[t : t + 8, x : x + 8] for t, x in ((0, 1), (1, 0), (1, 2), (2, 1)))]
    views = np.stack([*views, *(view[:, ::-1] for view in views)])[..., None]
    logits = logits_of(folder, views, 10)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares = (shares / shares.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found[0].logits["label"], np.log(shares), atol=1e-5)


def by_pillow(image):
    """An image as a grey one of 8x8, step by step: as docs/data.md has it."""
    factor = 8 / min(image.size)
    size = tuple(max(8, round(side * factor)) for side in image.size)
    resized = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - 8) // 2, (resized.shape[1] - 8) // 2
    return resized[top : top + 8, left : left + 8]


def test_files_of_every_kind(digits_run, digits, tmp_path):
    grey = digits.images[5, ..., 0]
    alpha = np.dstack([np.full_like(grey, 90)] * 3 + [grey])
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)).resize((500, 300))
    turned = Image.Exif()
    turned[274] = 6  # the camera was held upright: to be turned to the right by 90 degrees
    files = {
        "grey.png": (Image.fromarray(grey), {}, grey),
        "sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}, grey),
        "rgb.bmp": (Image.fromarray(np.dstack([grey] * 3)), {}, grey),
        "opaque.png": (Image.fromarray(np.dstack([grey] * 3 + [np.full_like(grey, 255)])), {}, grey),
        "alpha.png": (Image.fromarray(alpha), {}, np.rint((alpha[..., 0] * (grey / 255)) + 255 - grey)),
        "large.jpg": (large, {"quality": 100, "subsampling": 0}, None),
        "turned.png": (Image.fromarray(grey), {"exif": turned}, np.rot90(grey, -1)),
    }
    for name, (image, how, _) in files.items():
        image.save(tmp_path / name, **how)
    with Image.open(tmp_path / "large.jpg") as image:
        files["large.jpg"] = (*files["large.jpg"][:2], by_pillow(image))
    found = predict.Predictor(digits_run)([tmp_path / name for name in files])
    images = np.stack([wanted for _, _, wanted in files.values()])[..., None]
    wanted = logits_of(digits_run, images, HEADS)["label"]
    for one, row in zip(found, wanted, strict=True):
        # What is transparent is blended in 8 bits, by a rounding of its own.
        atol = 0.1 if "alpha.png" in one.image else 1e-5
        np.testing.assert_allclose(one.logits["label"], row, atol=atol, err_msg=one.image)


def broken(folder, digits):
    """Three files that are no images, one that is, and one that is not there."""
    Image.fromarray(digits.images[0, ..., 0]).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    return [str(folder / name) for name in ("text.png", "good.png", "cut.png", "missing.png", "empty.jpg")]


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(digits_run, digits, tmp_path, capsys):
    files = broken(tmp_path, digits)
    assert predict.main([f"--workdir={digits_run}", *files, "--json"]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["path"] for line in captured.out.splitlines()] == [files[1]]
    said = captured.err.splitlines()
    assert [line.split(": ")[0] for line in said[:4]] == [files[0], *files[2:]]
    assert said[2].endswith("there is no such file") and said[4] == "4 of 5 images could not be read"
    assert predict.main([f"--workdir={digits_run}", files[0], files[4]]) == 2
    with pytest.raises(UserError, match=r"text\.png cannot be read as an image: it is no image"):
        predict.Predictor(digits_run)(files)
    made = list(predict.Predictor(digits_run).stream([np.zeros((8, 8)), digits.images[0]]))
    assert made[0] == inference.Unreadable(0, "it is an array of float64; uint8 is needed")
    assert made[1].image == 1


def test_csv_and_json_say_the_same(digits_run, album, tmp_path, capsys):
    out = tmp_path / "found.csv"
    assert predict.main([f"--workdir={digits_run}", "--json", "--top=3", f"--csv={out}", str(album)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12 and list(lines[0]["predictions"]) == ["label", "parity"]
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "head", "rank", "class", "probability"] and len(rows) == 12 * (3 + 2)
    wanted = [
        (line["path"], kind, str(rank), guess["label"], pytest.approx(guess["probability"], rel=1e-5))
        for line in lines
        for kind, guesses in line["predictions"].items()
        for rank, guess in enumerate(guesses, 1)
    ]
    assert [(*list(row.values())[:4], float(row["probability"])) for row in rows] == wanted
    for line in lines:
        assert sum(guess["probability"] for guess in line["predictions"]["parity"]) == pytest.approx(1)


def test_of_one_head_there_is_a_plain_list(make_run, digits, tmp_path, capsys):
    folder, out = make_run(), tmp_path / "found.csv"
    Image.fromarray(digits.images[0, ..., 0]).save(tmp_path / "one.png")
    arguments = [f"--workdir={folder}", str(tmp_path / "one.png"), "--top=2"]
    assert predict.main([*arguments, "--json", f"--csv={out}"]) == 0
    guesses = json.loads(capsys.readouterr().out)["predictions"]
    assert [sorted(guess) for guess in guesses] == [["label", "probability"]] * 2
    assert out.read_text().splitlines()[0] == "path,rank,class,probability"
    assert predict.main(arguments) == 0
    words = ", ".join(f"{guess['label']} {100 * guess['probability']:.1f} %" for guess in guesses)
    assert capsys.readouterr().out == f"{tmp_path / 'one.png'}  {words}\n"


def test_the_data_set_is_not_needed_and_does_as_well(digits_run, digits, tmp_path, monkeypatch):
    other = tmp_path / "run"
    shutil.copytree(digits_run, other)
    (other / "data.json").unlink()
    by_data = predict.Predictor(other)(digits.images[0])[0]
    monkeypatch.setattr(sources, "load", lambda *_, **__: pytest.fail("the data set was opened"))
    by_record = predict.Predictor(digits_run)(digits.images[0])[0]
    np.testing.assert_array_equal(by_data.logits["label"], by_record.logits["label"])
    assert by_data.heads == by_record.heads


def test_a_file_of_weights(tmp_path, digits, monkeypatch, capsys):
    model = VisionTransformer(classes=3, patch_size=4, width=12, depth=1, heads=2, mlp_width=12)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    generator = np.random.default_rng(0)
    parameters = jax.tree.map(lambda leaf: generator.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
    weights.save(tmp_path / "model.npz", model, parameters)
    image = generator.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    wanted = model.apply({"params": parameters}, jnp.asarray(image[None] / 127.5 - 1, jnp.float32))[0]
    found = predict.Predictor(predict.of_file(tmp_path / "model.npz"))(image)[0]
    np.testing.assert_allclose(found.logits["label"], wanted, atol=1e-5)
    arguments = [f"--init={tmp_path / 'model.npz'}", str(tmp_path / "image.png"), "--json"]
    assert predict.main([*arguments, f"--classes={tmp_path / 'names.txt'}"]) == 0
    labels = [guess["label"] for guess in json.loads(capsys.readouterr().out)["predictions"]]
    assert labels == [("cat", "dog", "owl")[place] for place in np.argsort(-np.asarray(wanted))]
    (tmp_path / "names.txt").write_text("cat\n")
    assert predict.main([*arguments, f"--classes={tmp_path / 'names.txt'}"]) == 2
    assert "has 3 classes, and 1 names are given" in capsys.readouterr().err
    # As of the average of a run's checkpoints: that run's set, and so its mean and std, is not in the file.
    model, parameters, report = weights.load(tmp_path / "model.npz")
    by_set = dataclasses.replace(report, normalization="set")
    monkeypatch.setattr(weights, "load", lambda *_, **__: (model, parameters, by_set))
    assert predict.main(arguments) == 2
    assert "normalised by their data set, which is not here" in capsys.readouterr().err
    assert predict.main([*arguments, "--normalize=half"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workdir=RUN", "--step=7"], "has no checkpoint of step 7; there are: 0"),
        (["--workdir=RUN", "--best"], "has no checkpoint that was validated"),
        (["--workdir=RUN", "--top=0"], "--top is 0"),
        (["--workdir=RUN", "--batch_size=0"], "--batch_size is 0"),
        (["--workdir=RUN", "--classes=names.txt"], "--classes does not go with --workdir"),
        (["--workdir=RUN", "--csv=/nowhere/at/all.csv"], "is no file that can be written"),
        (["--workdir=EMPTY"], "holds no run"),
        (["--workdir=RUN", "EMPTY"], "there is no image below"),
        (["--init=RUN/none.npz"], "there is no such file"),
        (["--init=RUN/none.npz", "--best"], "--best does not go with --init"),
    ],
)
def test_what_is_wrong_is_said(arguments, said, digits_run, album, tmp_path, capsys):
    images = [str(tmp_path)] if "EMPTY" in arguments else [str(album)]
    typed = [one.replace("RUN", str(digits_run)).replace("EMPTY", str(tmp_path)) for one in arguments]
    assert predict.main([*(one for one in typed if one.startswith("--")), *images]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and len(error.splitlines()) <= 3


def test_a_run_that_has_saved_nothing_yet(digits_run, album, tmp_path, capsys):
    shutil.copy(digits_run / "config.json", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert predict.main([f"--workdir={tmp_path}", str(album)]) == 2
    assert "has no checkpoint; there are: none" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(digits_run, album):
    """Its --help does not wait for JAX, and a reader that has seen enough is no error of its own."""
    light = "import sys, vit_jax, vit_jax.predict; assert 'jax' not in sys.modules; vit_jax.predict.Predictor"
    subprocess.run([sys.executable, "-c", light], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "vit_jax.predict", f"--workdir={digits_run}", "--json", str(album)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [Path(json.loads(line)["path"]).name for line in done.stdout.splitlines()][:2] == ["00.png", "01.png"]
    piped = subprocess.run(["bash", "-c", '"$@" | true', "bash", *command], cwd=ROOT, capture_output=True, text=True)
    assert piped.stderr == ""
