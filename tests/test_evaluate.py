"""The command `evaluate`: the files of --out, several seeds, and what it refuses."""

import csv
import json
import shutil
import types

import numpy as np
import pytest
import scipy.special
from PIL import Image
from sklearn import metrics

from vit_jax import atomic, commands, evaluate, inference
from vit_jax.checkpoint import run_files
from vit_jax.data import sources
from vit_jax.objectives.masked import PatchPrediction

pytestmark = pytest.mark.slow  # each compiles an evaluation


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def strict(path):
    """The content of a JSON file without NaN and infinity, which are no JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def run(capsys, workdir, *arguments):
    """The metrics that the command prints, and the lines of standard error."""
    assert evaluate.main([f"--workdir={workdir}", *arguments]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err.splitlines()


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", "test", labels=("label", "parity"))


def test_the_files_of_each_head_agree_with_the_logits_of_every_image(digits_run, digits, tmp_path, capsys):
    printed, _ = run(capsys, digits_run, f"--out={tmp_path / 'out'}")
    predictor = inference.Predictor(digits_run, batch_size=64)
    every = predictor(digits.images)
    for head, labels in (("label", digits.labels), ("parity", digits.others["parity"].labels)):
        directory, names = tmp_path / "out" / head, predictor.inputs.classes[head]
        logits = np.stack([one.logits[head] for one in every])
        predicted = logits.argmax(axis=1)
        rows = table(directory / "predictions.csv")
        assert [row["index"] for row in rows] == [str(index) for index in range(360)]
        assert [row["true"] for row in rows] == [names[label] for label in labels]
        assert [row["predicted"] for row in rows] == [names[index] for index in predicted]
        probabilities = [one.heads[head][0].probability for one in every]
        np.testing.assert_allclose([float(row["probability"]) for row in rows], probabilities, atol=1e-5)
        every_class = range(len(names))
        assert [int(row["rank"]) <= 2 for row in rows] == [
            label in np.argsort(-one, kind="stable")[:2] for label, one in zip(labels, logits, strict=True)
        ]
        softmax = scipy.special.softmax(logits.astype(np.float64), axis=1)
        own = softmax[np.arange(len(labels)), labels]
        np.testing.assert_allclose([float(row["true_probability"]) for row in rows], own, atol=1e-5)
        counts = metrics.confusion_matrix(labels, predicted, labels=range(len(names)))
        matrix = table(directory / "confusion.csv")
        assert [[int(row[name]) for name in names] for row in matrix] == counts.tolist()
        assert [row["images"] for row in table(directory / "classes.csv")] == [str(n) for n in counts.sum(axis=1)]
        found = strict(directory / "metrics.json")
        assert found["accuracy"] == printed[f"test/{head}/accuracy"] == (predicted == labels).mean()
        assert found["balanced_accuracy"] == printed[f"test/{head}/balanced_accuracy"]
        assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
        assert found["nll"] == printed[f"test/{head}/nll"] == pytest.approx(found["loss"], rel=1e-5)
        assert found["nll"] == pytest.approx(metrics.log_loss(labels, softmax, labels=every_class), rel=1e-4)
        top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=every_class) if len(names) > 5 else 1
        assert found["top5"] == printed[f"test/{head}/top5"] == top5
        bins = [row for row in table(directory / "reliability.csv") if int(row["examples"])]
        weighted = [int(row["examples"]) * abs(float(row["probability"]) - float(row["accuracy"])) for row in bins]
        assert sum(int(row["examples"]) for row in bins) == found["examples"] == 360
        assert found["calibration_error"] == pytest.approx(sum(weighted) / 360, rel=1e-4)
        assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
        with Image.open(directory / "confusion.png") as picture:
            assert picture.format == "PNG"


@pytest.mark.parametrize("batch_size", [7, 64])
def test_every_image_is_listed_once_for_any_batch_size_and_split(mirrored, tmp_path, capsys, batch_size):
    workdir, every = mirrored
    run(capsys, workdir, "--split=test[10:45]", f"--batch_size={batch_size}", f"--out={tmp_path}")
    rows = table(tmp_path / "predictions.csv")
    assert [row["predicted"] for row in rows] == [one.label for one in every[10:45]]
    expected = [one.guesses[0].probability for one in every[10:45]]
    np.testing.assert_allclose([float(row["probability"]) for row in rows], expected, atol=1e-5)
    assert strict(tmp_path / "metrics.json")["examples"] == 35


@pytest.fixture(scope="module")
def mirrored(make_run, digits):
    """A run that is evaluated on each image and its mirror image, and its predictions."""
    workdir = make_run(augment={"test_flip": True})
    return workdir, inference.Predictor(workdir)(digits.images)


def test_the_metrics_of_one_view_and_of_several_are_those_of_runs_with_such_views(make_run, mirrored, tmp_path, capsys):
    workdir, _ = mirrored
    averaged, plain = run(capsys, workdir)[0], run(capsys, workdir, "--views=off")[0]
    both, lines = run(capsys, workdir, "--views=both", f"--out={tmp_path}")
    expected = {f"{name}/one_view": value for name, value in plain.items() if name.startswith("test/")}
    del expected["test/examples/one_view"]
    assert both == averaged | expected and (averaged["views"], plain["views"]) == (2, 1)
    assert averaged["test/loss"] != plain["test/loss"]
    percent = [f"{100 * one['test/accuracy']:.2f} %" for one in (averaged, plain)]
    assert f"accuracy {percent[0]} averaged over 2 views, {percent[1]} on one view" in lines
    written = strict(tmp_path / "metrics.json")
    assert written["nll/one_view"] == plain["test/nll"] and written["views"] == 2
    # A run of the same parameters that was trained without views.
    alone = make_run()
    assert run(capsys, alone)[0] == plain
    assert run(capsys, alone, "--test_flip")[0] == averaged
    shifted = run(capsys, alone, "--test_shift=1", "--views=both")[0]
    assert shifted["views"] == 5 and shifted["test/loss/one_view"] == plain["test/loss"] != shifted["test/loss"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--views=both"], "--views=both: this model is scored on one view"),
        (["--test_shift=8"], "--test_shift is 8\n  allowed: an integer from 0 to 7"),
    ],
)
def test_views_that_a_run_cannot_have_are_refused(make_run, arguments, words, capsys):
    assert evaluate.main([f"--workdir={make_run()}", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_views_of_a_run_without_classes_are_refused(tmp_path, capsys, monkeypatch):
    opened = types.SimpleNamespace(run=types.SimpleNamespace(objective=PatchPrediction), state=None)
    monkeypatch.setattr(commands, "open_run", lambda flags: opened)
    for flag in ("--views=both", "--test_flip", "--test_shift=1", f"--out={tmp_path}"):
        assert evaluate.main([f"--workdir={tmp_path}", flag]) == 2
        assert f"omit {flag.partition('=')[0]}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    """Image files of three classes: 12 of 'three', 4 of 'eight' and 4 of 'nine'."""
    root = tmp_path_factory.mktemp("photos")
    for name, digit, count in (("three", 3, 12), ("eight", 8, 4), ("nine", 9, 4)):
        for split in ("train", "test"):
            (root / split / name).mkdir(parents=True)
            for index in np.flatnonzero(digits.labels == digit)[:count]:
                Image.fromarray(digits.images[index, ..., 0]).save(root / split / name / f"{index}.png")
    return root


def test_images_of_a_folder_are_listed_by_path_and_unbalanced_classes_are_named(make_run, folder, tmp_path, capsys):
    data = {"name": "folder", "dir": str(folder), "train": "train", "test": "test", "image_size": 8}
    workdir = make_run(data={**data, "cache_dir": str(tmp_path / "cache")})
    printed, errors = run(capsys, workdir, f"--out={tmp_path / 'out'}")
    rows = table(tmp_path / "out" / "predictions.csv")
    assert sorted(row["path"] for row in rows) == sorted(map(str, folder.glob("test/*/*.png")))
    assert all(f"/test/{row['true']}/" in row["path"] for row in rows)
    recalls = {row["class"]: float(row["recall"]) for row in table(tmp_path / "out" / "classes.csv")}
    right = {name: np.mean([r["predicted"] == name for r in rows if r["true"] == name]) for name in recalls}
    assert recalls == pytest.approx(right, rel=1e-5)
    balanced = f"balanced accuracy {100 * np.mean(list(right.values())):.2f} %"
    assert any(line.startswith(balanced) and "4 to 12 images per class" in line for line in errors)
    (worst, *_) = [line for line in errors if line.startswith("  ")]
    assert worst.startswith(f"  {min(right, key=right.get)}: {100 * min(right.values()):.1f} %")
    assert printed["test/balanced_accuracy"] == pytest.approx(np.mean(list(right.values())))


@pytest.fixture(scope="module")
def seeds(make_run, tmp_path_factory):
    """The directory of the seeds 0, 3 and 5; the last one has no checkpoint yet."""
    workdir, config = tmp_path_factory.mktemp("seeds"), None
    for seed in (0, 3):
        shutil.copytree(made := make_run(train={"seed": seed}, model={"depth": 1 + seed % 2}), workdir / f"seed-{seed}")
        config = json.loads((made / run_files.CONFIG).read_text())
    config["train"].update(seed=0, seeds=[0, 3, 5])
    atomic.write_json(workdir / run_files.CONFIG, config)
    return workdir


def test_several_seeds_give_each_result_and_mean_and_spread(seeds, tmp_path, capsys):
    alone = run(capsys, seeds / "seed-3")[0]
    printed, errors = run(capsys, seeds, f"--out={tmp_path}")
    losses = [strict(tmp_path / name / "metrics.json")["loss"] for name in ("seed-0", "seed-3")]
    assert printed["seeds"] == [0, 3] and printed["step"] == 0 and printed["test/examples"] == 360
    assert printed["test/loss/each"] == losses and losses[1] == alone["test/loss"] != losses[0]
    assert printed["test/loss"] == pytest.approx(np.mean(losses))
    assert printed["test/loss/std"] == pytest.approx(np.std(losses, ddof=1))
    assert "without a checkpoint, left out: seed 5" in errors and "over 2 seeds" in errors[-1]
    assert {path.name for path in (tmp_path / "seed-3").iterdir()} == {
        *("metrics.json", "classes.csv", "predictions.csv", "reliability.csv", "confusion.csv", "confusion.png")
    }


def test_weights_are_not_those_of_several_seeds(seeds, capsys):
    assert evaluate.main([f"--workdir={seeds}", "--weights=average.safetensors"]) == 2
    assert "use the directory of one of them: seed-0" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused_before_the_run_is_opened(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert evaluate.main([f"--workdir={tmp_path / 'no-run'}", f"--out={tmp_path / 'file'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out={tmp_path / 'file'} cannot be used")
    assert (tmp_path / "file").read_text() == "kept"
