"""The learning-rate sweep: its runs and their examples, the choice, and resuming."""

import json

import pytest

from vit_jax import atomic, chart, sweep
from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.config.check import check_config
from vit_jax.errors import UserError
from vit_jax.training import lr_sweep, recovery, setup

# Final validation accuracy and loss by learning rate.
SCORES = {0.001: (0.3, 1.9), 0.003: (0.5, 1.5), 0.01: (0.5, 1.2), 0.03: (0.4, 1.3), 0.1: (0.5, 1.2)}


def digits(**data):
    config = options.load("configs/digits.py")
    config.data.update(data)
    check_config(config)
    return config


@pytest.fixture
def trainer(monkeypatch):
    """Replaces training: writes the summary of SCORES and keeps the configs; can stop or diverge."""

    class Trainer:
        def __init__(self):
            self.configs, self.stop_at, self.diverging = [], None, ()

        def __call__(self, config, workdir, shown):
            workdir.mkdir(parents=True, exist_ok=True)
            self.configs.append((workdir.name, config))
            if workdir.name == self.stop_at:
                return None
            if config.optimizer.learning_rate in self.diverging:
                atomic.write_json(workdir / recovery.REPORT, {})
                raise UserError("non-finite loss")
            accuracy, loss = SCORES[config.optimizer.learning_rate]
            role = "validation" if config.data.test is None else "test"
            summary = {f"{role}/accuracy": accuracy} if config.train.objective == "classify" else {}
            summary |= {f"{role}/loss": loss, f"{role}/examples": 100}
            summary |= {"steps": 10, "seconds": 1.0, "parameters": 5}
            atomic.write_json(workdir / run_files.SUMMARY, summary)
            return summary

    stub = Trainer()
    monkeypatch.setattr("vit_jax.training.train.train", stub)
    return stub


def run_sweep(workdir, config=None, rates=(0.001, 0.003, 0.01, 0.03), held_out=10.0):
    return lr_sweep.sweep(lr_sweep.plan(config or digits(), rates, held_out), workdir, lambda _: None)


def test_trials_train_on_a_part_and_the_final_run_on_everything(trainer, tmp_path):
    content = run_sweep(tmp_path)
    *trials, (name, final) = trainer.configs
    assert [name for name, _ in trials] == ["rate-0.001", "rate-0.003", "rate-0.01", "rate-0.03"]
    for (_, config), rate in zip(trials, (0.001, 0.003, 0.01, 0.03), strict=True):
        assert config.optimizer.learning_rate == rate
        assert (config.data.train, config.data.validation, config.data.test) == ("train[:90%]", "train[90%:]", None)
    assert name == "final-0.01" and content["best"] == 0.01  # as good as 0.003, with a lower loss
    assert (final.data.train, final.data.validation, final.data.test) == ("train", None, "test")
    assert final.train.evaluate_every == 0  # the test split is not watched
    assert json.loads(json.dumps(content)) == json.loads((tmp_path / "sweep.json").read_text())
    assert "test/accuracy" in content["final"]
    text = sweep.table(content)
    assert "| **0.01** | 50.00 % | 1.2000 | 10 | 0:01 |" in text
    assert "on train: test accuracy 50.00 % (50 of 100)" in text


@pytest.mark.parametrize("objective", ["masked_autoencoder", "masked_patches"])
def test_without_accuracy_the_lowest_loss_is_chosen(trainer, tmp_path, objective):
    config = options.load("configs/digits.py")
    config.train.update(objective=objective, label_smoothing=0.0)
    config.model.position = "sincos_2d"
    check_config(config)
    content = run_sweep(tmp_path, config, rates=(0.001, 0.03, 0.01))
    assert content["best"] == 0.01  # the lowest loss
    text = sweep.table(content)
    assert "| learning rate | validation loss | steps | training |" in text
    assert "| **0.01** | 1.2000 | 10 | 0:01 |" in text and "test loss 1.2000 on all 100 images" in text
    sweep._write_report(tmp_path, content)
    assert (tmp_path / "sweep.md").read_text() == text + "\n" and (tmp_path / "sweep.png").stat().st_size > 0


def test_held_out_examples_are_not_trained_on():
    plan = lr_sweep.plan(digits(), (0.1,), 10.0)
    source = {role: setup.load(plan.config, split, ["label"]) for role, split in plan.splits().items()}
    trained, held_out = set(source["train"].ids()), set(source["validation"].ids())
    assert not trained & held_out and trained | held_out == set(source["everything"].ids())
    assert len(held_out) == 144 and len(trained) == 1293


@pytest.mark.parametrize(
    "split, trained, held_out",
    [
        ("train[:1000]", "train[0:900]", "train[900:1000]"),
        ("train[200:300]+test[:100]", "train[200:300]+test[0:80]", "test[80:100]"),
        ("test[:10]+train[200:300]", "test[0:10]+train[200:289]", "train[289:300]"),
        ("all", "train[0:1437]+test[0:180]", "test[180:360]"),
    ],
)
def test_a_part_of_a_slice_is_held_out(split, trained, held_out):
    """Its last examples, in the order of the expression."""
    plan = lr_sweep.plan(digits(train=split), (0.1,), 10.0)
    assert (plan.train, plan.validation, plan.everything) == (trained, held_out, split)
    first, last, whole = (setup.load(plan.config, each, ["label"]).ids() for each in plan.splits().values())
    assert [*first, *last] == [*whole]


def test_a_validation_split_of_the_config_is_used_and_finally_trained_on(trainer, tmp_path):
    run_sweep(tmp_path, digits(train="train[:1000]", validation="train[1000:1200]"), (0.001, 0.003))
    (_, trial), *_, (_, final) = trainer.configs
    assert (trial.data.train, trial.data.validation) == ("train[:1000]", "train[1000:1200]")
    assert final.data.train == "train[:1000]+train[1000:1200]" and final.data.validation is None


@pytest.mark.parametrize("stop_at", ["rate-0.003", "final-0.01"])
def test_a_stopped_sweep_resumes_without_repeating_runs(trainer, tmp_path, stop_at):
    trainer.stop_at = stop_at
    assert run_sweep(tmp_path) is None
    before, trainer.configs, trainer.stop_at = [name for name, _ in trainer.configs], [], None
    assert before[-1] == stop_at
    content = run_sweep(tmp_path)
    after = [name for name, _ in trainer.configs]
    assert before[:-1] + after == ["rate-0.001", "rate-0.003", "rate-0.01", "rate-0.03", "final-0.01"]
    trainer.configs = []
    assert run_sweep(tmp_path) == content and trainer.configs == []


def test_rates_can_be_added(trainer, tmp_path):
    run_sweep(tmp_path, rates=(0.001, 0.003))
    trainer.configs = []
    run_sweep(tmp_path)
    assert [name for name, _ in trainer.configs] == ["rate-0.01", "rate-0.03", "final-0.01"]


def test_a_diverging_rate_is_reported_and_not_chosen(trainer, tmp_path):
    trainer.diverging = (0.01, 0.03)
    content = run_sweep(tmp_path)
    assert content["best"] == 0.003
    assert "| 0.01 | non-finite loss or gradients | | | |" in sweep.table(content)
    trainer.configs = []
    assert run_sweep(tmp_path) == content and trainer.configs == []
    trainer.diverging = (0.1,)
    with pytest.raises(UserError, match="every learning rate"):
        run_sweep(tmp_path / "other", rates=(0.1,))


def test_other_errors_end_the_sweep(monkeypatch, tmp_path):
    def broken(*_, shown):
        raise UserError("the disk is full")

    monkeypatch.setattr("vit_jax.training.train.train", broken)
    with pytest.raises(UserError, match="the disk is full"):
        run_sweep(tmp_path)


def test_ties_go_to_the_lower_loss_then_to_the_lower_rate():
    names = ("learning_rate", "validation/accuracy", "validation/loss")
    trials = [dict(zip(names, (rate, *score), strict=True)) for rate, score in SCORES.items()]
    assert lr_sweep.choose(trials, "accuracy", True) == 0.01
    trials[2]["validation/loss"] = float("nan")
    assert lr_sweep.choose(trials, "accuracy", True) == 0.1


def test_the_directory_of_another_sweep_is_refused(trainer, tmp_path):
    run_sweep(tmp_path)
    other = digits()
    other.train.label_smoothing = 0.2
    with pytest.raises(UserError, match=r"differs: train.label_smoothing: 0.1 -> 0.2"):
        run_sweep(tmp_path, other)
    with pytest.raises(UserError, match=r"differs: splits.train: train\[:90%\] -> train\[:80%\]"):
        run_sweep(tmp_path, held_out=20.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a single run, not a sweep"):
        run_sweep(tmp_path / "run")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rates=a"], "--rates=a"),
        (["--rates="], "--rates="),
        (["--rates=.1,,.2"], "separated by commas"),
        (["--rates=0"], "positive numbers"),
        (["--rates=inf"], "positive numbers"),
        (["--rates=.1,0.1"], "different numbers"),
        (["--rates=.1", "--held_out=0"], "--held_out=0"),
        (["--rates=.1", "--held_out=100"], "--held_out=100"),
        (["--rates=.1", "--config.data.train=train[:1]"], "config.data.train is 'train[:1]'"),
        (["--rates=.1", "--config.data.test=None"], "config.data.test"),
        (["--rates=.1", "--config.trian.steps=5"], "config.train.steps"),
        (["--rates=.1", "--held_out=0.01"], "use at least --held_out=1"),
    ],
)
def test_mistakes_are_reported_before_training(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vit_jax.runtime.compilation_cache.cache_compilations", lambda: None)
    monkeypatch.setattr("vit_jax.training.train.train", lambda *_: pytest.fail("something was trained"))
    assert sweep.main(["--config=configs/digits.py", f"--workdir={tmp_path / 'new'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 3
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "low, high, expected",
    [(20.8, 34.0, [20, 25, 30, 35]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (61.2, 61.9, [61.2, 61.4, 61.6, 61.8, 62])],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert chart.ticks(low, high) == pytest.approx(expected)


def test_ticks_of_one_value():
    found = chart.ticks(50.0, 50.0)
    assert found[0] <= 50 <= found[-1] and len(found) >= 2


def test_the_value_of_the_best_point_is_not_drawn_over_the_title():
    """The best point at the top left: no red pixel is in the rows of the title."""
    image = chart.draw([(0.001, 40.0), (0.01, 20.0)], "rate", "validation accuracy, %", 0.001).convert("RGB")
    blank = chart.draw([(0.001, 40.0), (0.01, 20.0)], "rate", "", 0.01).convert("RGB")
    with_title = chart.draw([(0.001, 40.0), (0.01, 20.0)], "rate", "validation accuracy, %", 0.01).convert("RGB")
    pixels = [(x, y) for x in range(image.width) for y in range(image.height)]
    title = max(y for x, y in pixels if blank.getpixel((x, y)) != with_title.getpixel((x, y)))
    assert min(y for x, y in pixels if image.getpixel((x, y)) == chart.MARK) > title > 10


def test_small_differences_are_drawn_small():
    """With a minimum span of 2, a difference of 0.1 is less than a tenth of the height of the axes."""
    points = [(0.001, 33.1), (0.01, 33.0)]
    rows = []
    for marked, _ in points:
        image = chart.draw(points, "rate", "accuracy", marked, 2.0).convert("RGB")
        around = [y for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == chart.MARK]
        rows.append(max(around))
    assert 0 < rows[1] - rows[0] < (chart.HEIGHT - chart.TOP - chart.BOTTOM) / 10


def test_the_chart_marks_the_best_point():
    """The red mark is the highest point, at the middle of the logarithmic axis."""
    image = chart.draw([(0.001, 10.0), (0.01, 30.0), (0.1, 20.0)], "rate", "accuracy", 0.01).convert("RGB")
    marks = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == chart.MARK]
    column = [x for x, y in marks if y == max(y for _, y in marks)]
    assert sum(column) / len(column) == pytest.approx((chart.LEFT + image.width - chart.RIGHT) / 2, abs=2)
    assert chart.TOP - 8 <= max(y for _, y in marks) <= chart.TOP + 8
