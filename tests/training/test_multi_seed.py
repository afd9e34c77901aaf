"""Several seeds: which ones, mean and standard deviation, and that each run equals the run of its seed alone."""

import json

import chex
import numpy as np
import pytest
from helpers import read_metrics, saved_state, tiny_config

from vit_jax import checkpoints, evaluate
from vit_jax.checkpoint import run_files
from vit_jax.config.check import check_config
from vit_jax.errors import UserError
from vit_jax.objectives.base import PrimaryMetric
from vit_jax.training import multi_seed, train
from vit_jax.training.log import Log
from vit_jax.training.run import Run

STEPS = 12
ACCURACY, LOSS = PrimaryMetric("accuracy", True), PrimaryMetric("loss", False)
EVERYTHING_ON = {
    "model": {"dropout": 0.1, "stochastic_depth": 0.1, "stochastic_depth_schedule": "constant"},
    "augment": {"crop_padding": 1, "mixup": 0.3},
    "optimizer": {
        "learning_rate": 1e-2,
        "schedule": "constant",
        "average_decay": 0.9,
        "warmup_steps": 3,
        "gradient_clip": 1.0,
    },
    "data": {"train": "train[:400]", "validation": "train[400:500]", "test": "test[:64]"},
    "train": {"batch_size": 32, "steps": STEPS, "accumulation": 2, "evaluate_every": 6, "steps_per_dispatch": 4},
    "checkpoint": {"every": 3, "keep": STEPS},
    "log": {"every": 3},
}


def small(**sections):
    """The config of a small run in which all that is random or carries over from step to step is used."""
    config = tiny_config(EVERYTHING_ON, **sections)
    check_config(config)
    return config


def state(workdir, step=STEPS):
    return saved_state(workdir, step)


def ends_as(workdir, other):
    chex.assert_trees_all_equal(state(workdir), state(other))
    assert read_metrics(workdir) == read_metrics(other)


def written(workdir):
    """When each file of a run was written."""
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of `train.seed` 3 and 0."""
    workdir = tmp_path_factory.mktemp("alone")
    for seed in (3, 0):
        train.train(small(train={"seed": seed}), workdir / f"seed-{seed}")
    return workdir


class Disturbed:
    """A run of seed 3; then of seeds 3 and 0, stopped in the middle of seed 0; then the same again."""

    def __init__(self, workdir):
        self.workdir = workdir
        self.first = multi_seed.train(small(train={"seeds": (3,)}), workdir)
        self.times = [written(workdir / "seed-3")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "stop_requested", lambda run: run.seed == 0 and run.step >= 7)
            self.stopped = multi_seed.train(small(train={"seeds": (3, 0)}), workdir)
        self.summary_there = (workdir / run_files.SUMMARY).exists()
        self.summary = multi_seed.train(small(train={"seeds": (3, 0)}), workdir)
        self.times.append(written(workdir / "seed-3"))


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    return Disturbed(tmp_path_factory.mktemp("one_after_another"))


@pytest.fixture(scope="module")
def one_after_another(disturbed):
    return disturbed.workdir, disturbed.summary


@pytest.mark.parametrize(
    "seeds, seed, expected", [(5, 0, [0, 1, 2, 3, 4]), (2, 7, [7, 8]), ((0, 3, 7), 0, [0, 3, 7]), ((7,), 0, [7])]
)
def test_the_seeds_are_so_many_or_those_listed(seeds, seed, expected):
    config = small(train={"seeds": seeds, "seed": seed})
    assert multi_seed.seeds_of(config) == expected
    assert multi_seed.seeds_of(multi_seed._config_of_all(config)) == expected
    assert multi_seed.seeds_of(small()) is None


def test_mean_and_spread_equal_numpys():
    chance = np.random.default_rng(0)
    each = chance.random((5, 2))
    made = [
        {"test/accuracy": a, "test/loss": b, "test/examples": 360, "steps": 9, "seconds": 10.0 + k, "parameters": 4}
        for k, (a, b) in enumerate(each.tolist())
    ]
    summary = multi_seed.summarize(range(5), made)
    for column, name in enumerate(("test/accuracy", "test/loss")):
        assert summary[name] == pytest.approx(np.mean(each[:, column]), rel=1e-14)
        assert summary[f"{name}/std"] == pytest.approx(np.std(each[:, column], ddof=1), rel=1e-14)
        assert summary[f"{name}/each"] == each[:, column].tolist()
    assert (summary["test/examples"], summary["steps"], summary["parameters"]) == (360, 9, 4)
    assert summary["seconds"] == 10 + 11 + 12 + 13 + 14
    assert summary["seeds"] == [0, 1, 2, 3, 4]
    one = multi_seed.summarize([8], made[:1])
    assert one["test/accuracy"] == each[0, 0] and one["test/accuracy/std"] is None
    assert "for one seed, 8" in multi_seed.describe_all(one, ACCURACY)


def test_the_printed_summary():
    summary = {"seeds": [0, 1, 2], "test/accuracy": 0.98, "test/accuracy/std": 0.01}
    summary["test/accuracy/each"] = [0.97, 0.99, 0.98]
    assert multi_seed.describe_all(summary, ACCURACY) == "test accuracy 98.00 +- 1.00 % over 3 seeds (97.00 ... 99.00)"
    assert multi_seed.describe_each(summary, ACCURACY)[1] == "seed 1: test accuracy 99.00 %"
    summary = {"seeds": [0, 1], "validation/loss": 0.5, "validation/loss/std": 0.25, "validation/loss/each": [0.4, 0.6]}
    assert multi_seed.describe_all(summary, LOSS) == "validation loss 0.5000 +- 0.2500 over 2 seeds (0.4000 ... 0.6000)"


@pytest.mark.slow
def test_each_run_equals_the_run_of_its_seed_alone(alone, one_after_another):
    workdir, summary = one_after_another
    for name in ("seed-3", "seed-0"):
        ends_as(workdir / name, alone / name)
        assert run_files.read_config(workdir / name) == run_files.read_config(alone / name)
    each = [run_files.read_summary(alone / name)["test/accuracy"] for name in ("seed-3", "seed-0")]
    assert summary["test/accuracy/each"] == each and summary["seeds"] == [3, 0]
    assert summary["test/accuracy"] == np.mean(each)
    assert run_files.read_summary(workdir) == summary
    assert state(workdir / "seed-3")["parameters"]["head"]["logits"]["kernel"].any()
    parameters = [state(workdir / name)["parameters"] for name in ("seed-3", "seed-0")]
    assert not np.allclose(*(tree["embedding"]["projection"]["kernel"] for tree in parameters))


@pytest.mark.slow
def test_evaluate_gives_the_mean_and_spread_of_all_seeds(one_after_another, capsys):
    workdir, summary = one_after_another
    assert evaluate.main([f"--workdir={workdir}"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    names = [name for name in summary if name.startswith("test/") and not name.endswith("/examples")]
    assert {name: found[name] for name in names} == {name: summary[name] for name in names}
    assert found["seeds"] == [3, 0] and "over 2 seeds" in printed.err


@pytest.mark.slow
def test_commands_work_on_the_directory_of_one_seed(one_after_another, capsys):
    workdir, summary = one_after_another
    assert evaluate.main([f"--workdir={workdir / 'seed-0'}"]) == 0
    assert json.loads(capsys.readouterr().out)["test/accuracy"] == summary["test/accuracy/each"][1]
    assert checkpoints.main(["verify", str(workdir / "seed-3")]) == 0


@pytest.mark.slow
def test_finished_seeds_are_not_touched_when_others_are_added_stopped_and_resumed(disturbed):
    assert disturbed.times[0] == disturbed.times[1]
    assert disturbed.stopped is None and not disturbed.summary_there
    first = disturbed.first
    assert first["seeds"] == [3] and first["test/accuracy/each"] == disturbed.summary["test/accuracy/each"][:1]


@pytest.mark.slow
def test_finished_seeds_are_shown_and_summarized_again_for_another_list(one_after_another, capsys):
    workdir, summary = one_after_another
    before = written(workdir / "seed-3")
    assert multi_seed.train(small(train={"seeds": (3, 0)}), workdir) == summary
    assert "is finished: test accuracy" in capsys.readouterr().out
    swapped = multi_seed.train(small(train={"seeds": (0, 3)}), workdir)
    assert (swapped["seeds"], swapped["test/loss/each"]) == ([0, 3], summary["test/loss/each"][::-1])
    assert multi_seed.train(small(train={"seeds": (3, 0)}), workdir) == summary
    assert written(workdir / "seed-3") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections, words",
    [
        ({"train": {"seeds": (3, 0, 1), "batch_size": 16}}, "train.batch_size: 32 -> 16"),
        ({"train": {"seed": 3}}, "train.seeds: 3,0 -> None"),
    ],
)
def test_another_config_is_refused_in_the_directory_of_seeds(one_after_another, sections, words):
    workdir, _ = one_after_another
    before, config = written(workdir), small(**sections)
    with pytest.raises(UserError, match=words):
        (train if config.train.seeds is None else multi_seed).train(config, workdir)
    assert written(workdir) == before


@pytest.mark.slow
def test_several_seeds_are_refused_in_the_directory_of_one_run(alone):
    with pytest.raises(UserError, match=r"train\.seeds: None -> "):
        multi_seed.train(small(train={"seeds": 2, "seed": 3}), alone / "seed-3")


@pytest.mark.slow
def test_a_seed_that_fails_does_not_stop_the_others(alone, tmp_path, monkeypatch):
    real = Log.show

    def show(self, chunk, sums):
        if (tmp_path / "seed-3").exists() and not (tmp_path / "seed-0").exists() and chunk.end > 6:
            raise UserError("the disk is gone")
        return real(self, chunk, sums)

    config = small(train={"seeds": (3, 0)})
    with monkeypatch.context() as patch:
        patch.setattr(Log, "show", show)
        with pytest.raises(UserError, match=r"^seed 3: the disk is gone"):
            multi_seed.train(config, tmp_path)
    assert run_files.read_summary(tmp_path) is None and run_files.read_summary(tmp_path / "seed-0") is not None
    assert multi_seed.train(config, tmp_path)["seeds"] == [3, 0]
    ends_as(tmp_path / "seed-3", alone / "seed-3")


@pytest.mark.slow
def test_one_program_is_compiled_for_all_seeds(tmp_path, capsys):
    multi_seed.train(small(train={"seeds": (3, 0), "steps": 4}, checkpoint={"every": 0}), tmp_path)
    assert capsys.readouterr().out.count("compiling the training step") == 1
