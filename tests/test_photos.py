"""From a folder of photos to a model, its results per class, predictions and their picture."""

import hashlib
import json

import numpy as np
import pytest
from helpers import TINY, flags, read_metrics, run_command
from PIL import Image

from vit_jax import inference, prediction_sheet
from vit_jax.errors import UserError
from vit_jax.evaluation.per_class import Predictions
from vit_jax.inference import Guess, Prediction
from vit_jax.training import describe

COLORS = {"röt rot": (200, 30, 30), "grün": (30, 180, 40), "blau": (20, 40, 200)}
SMALL = flags(
    model={**TINY, "variant": "Ti/8"},
    train={"steps": 20},
    log={"tensorboard": False},
    optimizer={"learning_rate": 0.01},
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders as people have them: 10 photos per class of different sizes, a broken one and files of a system."""
    root, draw = tmp_path_factory.mktemp("photos") / "my photos", np.random.default_rng(0)
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for k in range(10):
            size = (80 + 5 * k, 120 - 4 * k, 3)
            pixels = np.clip(np.array(color) + draw.normal(0, 25, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"IMG {k}.jpg")
        (root / name / ".DS_Store").write_bytes(b"\0")
    (root / "grün" / "scan.pdf").write_bytes(b"%PDF-1.4")
    return root


@pytest.mark.slow
def test_a_folder_of_photos_becomes_a_model_with_predictions_and_their_picture(photos, tmp_path):
    run, cache = tmp_path / "run", f"--config.data.cache_dir={tmp_path / 'cache'}"
    command = ["--config=configs/photos.py", f"--config.data.dir={photos}", f"--workdir={run}", cache, *SMALL]
    output = run_command("vit_jax.main", *command)
    assert "20 % of each class" in output and "blau 2 of 10, grün 2 of 10, röt rot 2 of 10" in output
    assert "scan.pdf" in output and "24 train, 6 test" in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test/examples"] == 6 and summary["test/accuracy"] == read_metrics(run)[-1]["test/accuracy"]
    for name in COLORS:
        assert f"    {name:<7}  " in output
    assert "is finished" in run_command("vit_jax.main", *command)  # the same split, size and length

    picture = tmp_path / "picture.png"
    output = run_command("vit_jax.predict", f"--workdir={run}", f"--picture={picture}", "--json", photos)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    held_out = [row for row in rows if row["path"] in expected_test(photos)]
    right = [row["predictions"][0]["label"] in row["path"] for row in held_out]
    assert len(rows) == 30 and len(right) == 6 and np.mean(right) == pytest.approx(summary["test/accuracy"])
    assert Image.open(picture).size[0] > 1000


def expected_test(photos):
    """The two files of each class whose paths have the smallest hashes, among those that are images."""
    held_out = []
    for name in COLORS:
        paths = [f"{name}/IMG {k}.jpg" for k in range(10)]
        held_out += sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())[:2]
    return {str(photos / path) for path in held_out}


def predictions_of(labels, predicted, names):
    """Predictions without probabilities."""
    none = np.ones(len(labels), np.float32)
    return Predictions(labels, predicted, none, names, true_probability=none, rank=np.ones_like(labels), nll=none)


def test_the_lines_per_class_are_those_of_counting_by_hand():
    names = tuple(f"class {k}" for k in range(4))
    labels = np.array([0, 0, 0, 0, 1, 1, 3], np.int32)  # no example of class 2
    predicted = np.array([0, 0, 0, 1, 1, 0, 3], np.int32)
    text = describe.classes(predictions_of(labels, predicted, names))
    assert "balanced accuracy 75.00 %" in text and "3 classes" in text  # (3/4 + 1/2 + 1/1) / 3
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["class", "0", "75.00", "%", "3", "of", "4"],
        ["class", "1", "50.00", "%", "1", "of", "2"],
        ["class", "3", "100.00", "%", "1", "of", "1"],
    ]


def test_of_many_classes_the_lowest_are_listed():
    labels = np.repeat(np.arange(50, dtype=np.int32), 2)
    predicted = labels.copy()
    predicted[:6] = 49  # classes 0 to 2 are never right
    lines = describe.classes(predictions_of(labels, predicted, tuple(map(str, range(50)))))
    listed = [line.split()[0] for line in lines.splitlines()[1:]]
    assert len(listed) == 10 and listed[:3] == ["0", "1", "2"]


@pytest.fixture
def predictions(tmp_path):
    """Predictions for a wide and a tall picture, each of one color."""
    guesses = (Guess("cat", 0.75), Guess("kühe\n", 0.25), Guess("owl", 0.0), Guess("yak", 0.0))
    for name, size in (("wide.png", (400, 100)), ("tall.png", (50, 300))):
        Image.new("RGB", size, (10, 200, 30)).save(tmp_path / name)
    return [Prediction(str(tmp_path / name), {"label": guesses}, {}) for name in ("wide.png", "tall.png")]


def test_the_picture_shows_whole_images_and_bars_of_the_probabilities(predictions):
    pixels = np.asarray(prediction_sheet.draw(predictions)).astype(int)
    green = (np.abs(pixels - (10, 200, 30)).sum(-1) < 8).sum()
    assert green == pytest.approx(192 * 48 + 32 * 192, rel=0.02)  # scaled to a side of 192, not cropped
    blue = (np.abs(pixels - (0x9E, 0xCA, 0xE1)).sum(-1) == 0).any(1)
    widths = [(np.abs(row - (0x9E, 0xCA, 0xE1)).sum(-1) == 0).nonzero()[0] for row in pixels[blue]]
    assert max(row.max() for row in widths) == 8 + 192 + 8 + round(0.75 * 192)


def test_the_picture_is_written_or_the_flag_is_named(predictions, tmp_path):
    line = prediction_sheet.write(predictions * 40, tmp_path / "sheet.png", "--picture=sheet.png")
    assert "the first 60 of 80 images" in line and (tmp_path / "sheet.png").exists()
    with pytest.raises(UserError, match=r"--picture=sheet\.xyz cannot be written"):
        prediction_sheet.write(predictions, tmp_path / "sheet.xyz", "--picture=sheet.xyz")
    assert inference.TOP >= prediction_sheet.TOP
