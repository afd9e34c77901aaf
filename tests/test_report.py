"""The report of a run: valid HTML that needs nothing else, and the numbers of the run's files."""

import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import scipy.stats
from helpers import ROOT, TINY, flags, tiny_config
from helpers_html import Page
from matplotlib.figure import Figure
from PIL import Image
from sklearn import metrics

from vit_jax import api, atomic, inference, main, report, report_evaluation
from vit_jax.checkpoint import run_files
from vit_jax.data import sources
from vit_jax.evaluation.per_class import Predictions
from vit_jax.reporting import charts, evaluated, html, images, pages, records
from vit_jax.reporting.charts import Point, Series
from vit_jax.sharding import multihost

HOSTILE = "<script>alert('1')</script> & \"x\" \x07\n\udcff"
STEPS = range(10, 60, 10)


def record(step, seed=0):
    """A line of metrics.jsonl; steps 30 and 50 have an evaluation, and the loss of step 20 is not finite."""
    found = {"step": step, "train/loss": None if step == 20 else 2.0 / (step + seed), "train/accuracy": step / 70}
    found |= {"train/learning_rate": 1e-3 / step, "train/gradient_norm": 1.5 + seed, "images_per_second": 900.5 + seed}
    if step in (30, 50):
        found |= {"test/loss": 1 / (step + seed), "test/accuracy": min((step + seed) / 60, 1), "test/top5": 0.9}
        found["test/examples"] = 360
    return found


def fake_run(workdir, seed=0, **train):
    """Writes the files of a finished run that has no checkpoint, and returns its summary."""
    config = tiny_config(train={"seed": seed, **train}, data={"dir": "/moved"})
    workdir.mkdir(parents=True)
    history = [record(step, seed) for step in STEPS]
    summary = {name: value for name, value in history[-1].items() if name.startswith("test/")}
    summary |= {"steps": 50, "seconds": 12.5, "parameters": 134_986}
    lines = [*map(atomic.to_json, history), '{"step": 60, "tra']  # the last one is not complete
    (workdir / run_files.METRICS).write_text("\n".join(lines))
    environment = {"command": f"python -m vit_jax.main --config=digits --x={HOSTILE}", "packages": {"jax": "0.10.2"}}
    for name, content in ((run_files.CONFIG, config.to_dict()), (run_files.SUMMARY, summary)):
        atomic.write_json(workdir / name, content)
    (workdir / run_files.ENVIRONMENT).write_text(json.dumps(environment))
    return summary


def written(*directories, out=None):
    """The page that the command writes."""
    arguments = [*map(str, directories), *([] if out is None else [f"--out={out}"])]
    assert report.main(arguments) == 0
    return Page((out or directories[0] / records.REPORT).read_text())


def values_of(cells):
    return [math.nan if cell == "–" else float(cell.replace(",", "")) for cell in cells]


# --- the files of a run ---------------------------------------------------------------------------------------------


def test_the_values_of_the_curves_and_the_results_are_those_of_the_files(tmp_path):
    summary = fake_run(tmp_path / "a <b>&")
    page = written(tmp_path / "a <b>&")
    every = [record(step) for step in STEPS]
    for title, name, factor in (("Loss", "loss", 1), ("Accuracy, %", "accuracy", 100)):
        table = f"Values of {title}"
        expected = [factor * (one[f"train/{name}"] or math.nan) for one in every]
        np.testing.assert_allclose(values_of(page.column(table, "train")), expected, rtol=1e-5)
        shown = [cell for cell in page.column(table, "test") if cell]
        expected = [factor * one[f"test/{name}"] for one in every if f"test/{name}" in one]
        np.testing.assert_allclose(values_of(shown), expected, rtol=1e-5)
    for title, name in (
        ("Learning rate", "train/learning_rate"),
        ("Gradient norm", "train/gradient_norm"),
        ("Images per second", "images_per_second"),
    ):
        column = page.tables[f"Values of {title}"][0][1]
        shown = values_of(page.column(f"Values of {title}", column))
        np.testing.assert_allclose(shown, [one[name] for one in every], rtol=1e-5)
    assert [float(one) for one in page.column("Values of Loss", "step")] == [*STEPS]
    assert "step 30\ntrain: 0.0666667\ntest: 0.0333333" in page.tooltips
    results = dict(zip(page.column("Results", "metric"), page.column("Results", "value"), strict=True))
    assert results["accuracy"] == f"{100 * summary['test/accuracy']:.2f} %" and results["top-5 accuracy"] == "90.00 %"
    assert float(results["loss"]) == summary["test/loss"]
    assert (1, "a <b>&") in page.headings
    assert "test accuracy 83.33 % (300 of 360) after 50 steps" in page.text


def test_a_run_without_its_checkpoint_has_a_report_that_says_what_is_missing(tmp_path):
    fake_run(tmp_path / "run")
    page = written(tmp_path / "run")
    assert "Sections on predictions are left out:" in page.text
    assert [text for level, text in page.headings if level == 2] == [
        "Results",
        "Curves",
        "Configuration",
        "Environment",
    ]


def test_an_unfinished_run_has_a_report(tmp_path):
    fake_run(tmp_path / "run")
    (tmp_path / "run" / run_files.SUMMARY).unlink()
    page = written(tmp_path / "run")
    assert "not finished: step 50" in page.text and "83.33 %" in page.column("Results", "value")
    (tmp_path / "run" / run_files.METRICS).unlink()
    assert "Curves" not in dict(map(reversed, written(tmp_path / "run").headings))


def test_options_are_compared_with_the_defaults_and_the_config_file_and_changes_are_listed(tmp_path):
    fake_run(tmp_path / "run", batch_size=32)
    change = {"step": 20, "time": "2026-01-02 03:04:05", "changes": ["train.steps: 20 -> 50", f"data.dir: {HOSTILE}"]}
    (tmp_path / "run" / run_files.CHANGES).write_text(json.dumps(change))
    page = written(tmp_path / "run")
    header, *rows = page.tables["Configuration"]
    assert header == ["option", "default", "config file (digits)", "this run"]
    found = {name: values for name, *values in rows}
    assert found["train.batch_size"] == ["128", "64", "32"] and found["model.width"] == ["None", "64", "16"]
    assert "train.seed" not in found
    assert page.tables["Changes during the run"][1] == ["20", "2026-01-02 03:04:05", "train.steps: 20 -> 50"]


def test_several_seeds_have_their_mean_and_sample_standard_deviation(tmp_path):
    summaries = [fake_run(tmp_path / "run" / f"seed-{seed}", seed) for seed in (0, 3, 5)]
    atomic.write_json(tmp_path / "run" / run_files.CONFIG, tiny_config(train={"seeds": (0, 3, 5)}).to_dict())
    accuracies, losses = ([summary[f"test/{name}"] for summary in summaries] for name in ("accuracy", "loss"))
    total = {"seeds": [0, 3, 5], "test/accuracy": np.mean(accuracies), "test/accuracy/each": accuracies}
    total |= {"test/accuracy/std": np.std(accuracies, ddof=1), "test/loss": np.mean(losses)}
    total |= {
        "test/examples": 360,
        "test/loss/std": np.std(losses, ddof=1),
        "steps": 50,
        "seconds": 37.5,
        "parameters": 134_986,
    }
    atomic.write_json(tmp_path / "run" / run_files.SUMMARY, total)
    page = written(tmp_path / "run")
    mean, std = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    shown = page.column("Results of the seeds", "test accuracy")
    assert shown == [*(f"{100 * one:.2f} %" for one in accuracies), f"{mean:.2f} % ± {std:.2f} %"]
    of_step = dict(zip(page.column("Values of Loss", "step"), page.column("Values of Loss", "train"), strict=True))
    values = [2.0 / (50 + seed) for seed in (0, 3, 5)]
    np.testing.assert_allclose(
        values_of(of_step["50"].split(" ± ")), [np.mean(values), np.std(values, ddof=1)], rtol=1e-5
    )
    assert of_step["20"] == "–"


def test_runs_are_compared_by_what_differs_between_their_configs(tmp_path):
    for name, seed, size in (("one", 0, 32), ("two", 7, 64)):
        fake_run(tmp_path / name / "run", seed, batch_size=size)
    (tmp_path / "one" / "run" / records.REPORT).write_text("")
    page = written(tmp_path / "one" / "run", tmp_path / "two" / "run", out=tmp_path / "all.html")
    header = page.tables["Runs"][0]
    assert header[:4] == ["run", "train.seed", "train.batch_size", "test accuracy"]
    assert page.column("Runs", "run") == ["one/run", "two/runbest"]
    assert page.column("Runs", "test accuracy") == ["83.33 %", "95.00 %"]
    assert page.column("Values of Loss (test)", "two/run") == ["0.027027", "0.0175439"]
    assert 'href="one/run/report.html"' in (tmp_path / "all.html").read_text()


@pytest.mark.slow
def test_many_long_runs_have_a_page_of_limited_size(tmp_path):
    directories = [tmp_path / f"run-{index}" for index in range(12)]
    for index, directory in enumerate(directories):
        fake_run(directory, index)
        history = [record(step, index) for step in range(1, 1001)]
        (directory / run_files.METRICS).write_text("\n".join(map(json.dumps, history)))
    page = written(*directories, out=tmp_path / "all.html")
    assert (tmp_path / "all.html").stat().st_size < 1.5e6
    assert float(page.column("Values of Loss (train)", "run-3")[-1]) == pytest.approx(2 / 1003, rel=1e-5)


def test_a_sweep_is_a_comparison_of_its_runs(tmp_path):
    for name, seed in (("rate-0.1", 1), ("rate-0.2", 2), ("final-0.2", 2)):
        fake_run(tmp_path / "sweep" / name, seed)
    trials = [{"learning_rate": 0.1, "folder": "rate-0.1"}, {"learning_rate": 0.2, "folder": "rate-0.2"}]
    content = {"trials": [*trials, {"folder": "missing"}], "final": {"folder": "final-0.2"}}
    atomic.write_json(tmp_path / "sweep" / "sweep.json", content)
    page = written(tmp_path / "sweep")
    assert [name.removesuffix("best") for name in page.column("Runs", "run")] == ["rate-0.1", "rate-0.2", "final-0.2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "the run directory is missing"),
        (("empty",), "holds no run"),
        (("run", "--out=empty"), "cannot be written"),
        (("run", "--out=no/x.html"), "cannot be written"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    fake_run(tmp_path / "run")
    try:
        status = report.main([*arguments])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and len(error.splitlines()) <= 3


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct, total", [(0, 10), (353, 360), (10, 10), (1, 3), (5_000, 10_000)])
def test_the_interval_is_that_of_scipy(correct, total):
    expected = scipy.stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(evaluated.wilson(correct, total), [expected.low, expected.high], atol=1e-12)


def test_text_is_escaped_and_html_is_not_escaped_twice():
    shown = html.element("p", HOSTILE, html.element("b", "<"), None, title='"', hidden=True, lang=None)
    assert shown == (
        '<p title="&quot;" hidden>&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; &amp; &quot;x&quot; \\x07\n\\xff'
        "<b>&lt;</b></p>"
    )


def test_lines_are_interrupted_where_a_value_is_not_finite_and_drawn_to_scale():
    points = [Point(0, 0.0), Point(50, 1.0), Point(60, math.nan), Point(100, 1.0)]
    drawn = charts.lines("x", "title", [Series("a", 0, tuple(points))])
    (first, second) = re.findall(r'<path d="(M[^"]*)" class="line s1">', drawn)
    (x0, y0), (x1, y1) = (map(float, corner.split()) for corner in first.removeprefix("M").split("L"))
    assert (x0, y0) == (charts.LEFT, charts.HEIGHT - charts.BOTTOM) and y1 == charts.TOP
    assert x1 == pytest.approx((charts.LEFT + charts.WIDTH - charts.RIGHT) / 2)
    assert second == f"M{charts.WIDTH - charts.RIGHT:.1f} {charts.TOP:.1f}"


def test_long_curves_are_thinned_and_keep_their_last_point():
    kept = charts.thin(range(1000), 300)
    assert kept[-1] == 999 and len(kept) == 250 and {b - a for a, b in itertools.pairwise(kept)} == {4}
    assert charts.thin([], 3) == [] and charts.thin([1, 2], 3) == [1, 2]


def predictions(count=200, classes=4, names=None):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, count).astype(np.int32)
    predicted = np.where(generator.random(count) < 0.8, labels, generator.integers(0, classes, count)).astype(np.int32)
    known = {"labels": labels, "predicted": predicted, "class_names": names or tuple(map(str, range(classes)))}
    known["probability"] = generator.uniform(0.2, 1, count).astype(np.float32)
    zeros = {name: np.zeros(count, np.float32) for name in ("true_probability", "nll")}
    return Predictions(**known, **zeros, rank=np.ones(count, np.int32))


@pytest.fixture
def page_of(tmp_path):
    """A function that gives the page of a run with these predictions."""
    fake_run(tmp_path / "run")

    def make(heads, **more):
        found = evaluated.Evaluated("test", 50, {}, heads, **more)
        return Page(pages.of_run(records.read(tmp_path / "run"), found, None))

    return make


def test_classes_and_calibration_are_those_of_scikit_learn(page_of):
    names = (HOSTILE, "b", "c", "d")
    found = predictions(names=names)
    page = page_of({"label": found})
    matrix = [[int(cell) for cell in row[1:]] for row in page.tables["Confusion matrix"][1:]]
    assert matrix == metrics.confusion_matrix(found.labels, found.predicted).tolist()
    recall = 100 * metrics.recall_score(found.labels, found.predicted, average=None)
    np.testing.assert_allclose(values_of(page.column("Accuracy per class", "accuracy, %")), recall, atol=0.0051)
    precision = 100 * metrics.precision_score(found.labels, found.predicted, average=None)
    np.testing.assert_allclose(values_of(page.column("Accuracy per class", "precision, %")), precision, atol=0.0051)
    edges, correct = np.linspace(0, 1, 16), found.labels == found.predicted
    error = 0.0
    for row, low, high in zip(page.tables["Calibration of label"][1:], edges, edges[1:], strict=False):
        inside = (found.probability >= low) & (found.probability < high)
        assert int(row[1]) == inside.sum()
        if inside.any():
            means = [100 * found.probability[inside].mean(dtype=np.float64), 100 * correct[inside].mean()]
            np.testing.assert_allclose([float(cell.removesuffix(" %")) for cell in row[2:]], means, atol=0.0051)
            error += abs(means[0] - means[1]) * inside.mean()
    results = dict(zip(page.column("Results", "metric"), page.column("Results", "value"), strict=True))
    assert float(results["calibration error (ECE)"].removesuffix(" %")) == pytest.approx(error, abs=0.0051)
    balanced = 100 * metrics.balanced_accuracy_score(found.labels, found.predicted)
    assert float(results["balanced accuracy"].removesuffix(" %")) == pytest.approx(balanced, abs=0.0051)


def test_several_heads_and_many_classes_give_a_valid_page(page_of):
    many, few = predictions(2000, 300), predictions()
    tile = html_tile(np.zeros((8, 8, 1), np.uint8))
    samples = [tile, html_tile(np.zeros((300, 200, 3), np.uint8)), html_tile(np.zeros((9, 9, 2), np.uint8))]
    heads = {"label": many, HOSTILE: few}
    page = page_of(heads, mistakes={"label": [tile], HOSTILE: []}, samples=samples, matrices={})
    assert len(page.images) == 4 and page.images[2][1].startswith("data:image/jpeg")
    assert len(page.tables["Accuracy per class of label"]) == evaluated.MAX_ROWS + 1
    counts = metrics.confusion_matrix(many.labels, many.predicted)
    np.fill_diagonal(counts, 0)
    assert int(page.tables["Most frequent confusions"][1][2]) == counts.max()


def html_tile(image):
    return evaluated.Tile(image, (HOSTILE,), HOSTILE)


def test_a_report_that_fails_is_a_warning_and_a_run_that_is_finished_already_has_none(
    tmp_path, reports, monkeypatch, capsys
):
    def fail(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(pages, "of_run", fail)
    config = tiny_config(log={"report": True})
    with report.at_end(config, tmp_path / "a run"):
        fake_run(tmp_path / "a run")
    error = capsys.readouterr().err.splitlines()[-1]
    later = f"vit-jax report '{tmp_path / 'a run'}'"
    assert error == f"warning: no report was written: out of order; to try again: {later}"
    with report.at_end(config, tmp_path / "a run"):
        pass
    with report.at_end(tiny_config(), tmp_path / "off"):
        fake_run(tmp_path / "off")
    with pytest.raises(KeyboardInterrupt), report.at_end(config, tmp_path / "interrupted"):
        fake_run(tmp_path / "interrupted")
        raise KeyboardInterrupt
    assert not capsys.readouterr().err and not [*tmp_path.glob(f"*/{records.REPORT}")]


def test_figures_with_photos_have_a_limited_size():
    figure = Figure(figsize=(11, 5))
    figure.add_axes((0, 0, 1, 1)).imshow(np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8))
    content = images.file_of(figure)
    assert len(content) <= images.MAX_BYTES and content.startswith(b"\xff\xd8")  # a JPEG file
    assert 'class="white wide"' in images.picture(content, "noise", 1.6)
    assert images.file_of(Figure(figsize=(2, 3))).startswith(b"\x89PNG")


def test_only_rank_0_writes_a_report_and_it_evaluates_nothing_alone(tmp_path, reports, monkeypatch):
    monkeypatch.setattr(multihost, "is_alone", lambda: False)
    for index in (1, 0):
        monkeypatch.setattr(multihost, "is_rank_0", lambda index=index: index == 0)
        workdir = tmp_path / f"run-{index}"
        with report.at_end(tiny_config(log={"report": True}), workdir):
            fake_run(workdir)
        assert (workdir / records.REPORT).exists() == (index == 0)
    assert "the run used several processes" in Page((workdir / records.REPORT).read_text()).text


def test_an_evaluation_that_takes_long_is_left_out_after_training(tmp_path):
    fake_run(tmp_path / "run")
    run = records.read(tmp_path / "run")
    assert report_evaluation.too_long(run, "test") is None
    run.summary["test/examples"] = 100_000
    assert report_evaluation.too_long(run, "test") == pytest.approx(100_000 / (3 * 900.5))
    assert "would take about 37 s" in report_evaluation.evaluate(run, None, limited=True)[1]
    run.summary["seconds"] = 10_000
    assert report_evaluation.too_long(run, "test") is None


# --- runs -----------------------------------------------------------------------------------------------------------

DIGITS = [
    "--config=digits",
    *flags(
        model=TINY,
        train={"steps": 40, "epochs": None, "evaluate_every": 20},
        log={"every": 10, "tensorboard": False},
        mesh={"devices": 1},
    ),
    "--config.optimizer.warmup_steps=4",
]


@pytest.fixture
def finished(tmp_path, reports):
    """The directory of a tiny run, which has written its report."""
    assert main.main([*DIGITS, f"--workdir={tmp_path / 'run'}"]) == 0
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_writes_its_report_with_the_numbers_of_its_files_and_predictions(finished, monkeypatch):
    text = (finished / records.REPORT).read_text()
    page, summary = Page(text), json.loads((finished / run_files.SUMMARY).read_text())
    assert len(text) < 2e6
    results = dict(zip(page.column("Results", "metric"), page.column("Results", "value"), strict=True))
    assert results["accuracy"] == f"{100 * summary['test/accuracy']:.2f} %"
    assert float(results["loss"]) == pytest.approx(summary["test/loss"], rel=1e-5)
    digits = sources.load("digits", "test", labels=("label",))
    guesses = [one.guesses[0] for one in inference.Predictor(finished)(digits.images)]
    predicted = np.array([int(one.label) for one in guesses])
    counts = [[int(cell) for cell in row[1:]] for row in page.tables["Confusion matrix"][1:]]
    assert counts == metrics.confusion_matrix(digits.labels, predicted, labels=range(10)).tolist()
    wrong = [i for i in np.argsort([-one.probability for one in guesses]) if predicted[i] != digits.labels[i]]
    shown = [alt for alt, _ in page.images if ": predicted" in alt]
    assert len(shown) == min(24, len(wrong))
    assert shown[0].startswith(f"image {wrong[0]}: predicted {predicted[wrong[0]]}")
    titles = [title for level, title in page.headings if level == 3]
    assert {"Patch embedding", "Position embeddings", "Attention distance", "Attention rollout"} <= {*titles}
    assert "left out" not in page.text
    seen = []
    monkeypatch.setattr(report, "write", lambda workdirs, out, **_: seen.append(out))
    assert main.main([f"--workdir={finished}"]) == 0  # it is finished already
    api.train(f"{finished}/config.json", finished)
    assert not seen
    monkeypatch.setattr(api.training, "train", lambda *_: (finished / run_files.SUMMARY).touch())
    api.train(f"{finished}/config.json", finished)
    assert seen == [finished / records.REPORT]


@pytest.mark.slow
def test_a_run_without_labels_has_no_sections_on_classes(tmp_path):
    shutil.copytree(ROOT / "tests" / "fixtures" / "version_0.1" / "masked", tmp_path / "masked")
    page = written(tmp_path / "masked")
    titles = [title for level, title in page.headings if level == 2]
    assert "Curves" in titles and not {"Classes", "Calibration", "Most confident mistakes"} & {*titles}
    assert "What the model learned" in titles


@pytest.mark.slow
def test_names_of_classes_and_files_are_escaped_and_moved_images_are_named(tmp_path, make_run):
    digits = sources.load("digits", "test", labels=("label",))
    for name, digit in (("<b>one", 1), ('two & "co"', 2)):
        for split in ("train", "test"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in np.flatnonzero(digits.labels == digit)[:6]:
                Image.fromarray(digits.images[index, ..., 0]).save(
                    tmp_path / "photos" / split / name / f"<i>{index}.png"
                )
    data = {"name": "folder", "dir": str(tmp_path / "photos"), "train": "train", "test": "test", "image_size": 8}
    workdir = make_run(data={**data, "cache_dir": str(tmp_path / "cache")}, train={"batch_size": 8})
    page = written(workdir)
    assert page.column("Accuracy per class", "class") == ["<b>one", 'two & "co"']
    assert any(alt.startswith("<i>") for alt, _ in page.images)
    (tmp_path / "photos").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "cache")
    assert "Sections on predictions are left out" in written(workdir).text
    assert report.main([str(workdir), f"--data_dir={tmp_path / 'moved'}"]) == 0
    assert "Classes" in [title for _, title in Page((workdir / records.REPORT).read_text()).headings]
