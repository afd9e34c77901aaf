"""Non-finite losses and gradients: once, in a burst, and always."""

import json
import math

import chex
import jax
import numpy as np
import pytest
from helpers import read_json_lines, read_metrics, saved_state, tiny_config

from vit_jax import features
from vit_jax.checkpoint import integrity
from vit_jax.checkpoint.manager import CheckpointManager, SaveFailed
from vit_jax.config.check import check_config
from vit_jax.data import feature_store, order
from vit_jax.errors import UserError
from vit_jax.training import recovery, train
from vit_jax.training.step import BURST

BATCH, STEPS, EXAMPLES = 64, 40, 1437
SMALL = {
    "model": {"pooling": "mean"},
    "optimizer": {"learning_rate": 1e-2},
    "train": {"batch_size": BATCH, "steps": STEPS, "evaluation_batch_size": 120, "steps_per_dispatch": 7},
    "checkpoint": {"every": 10},
    "log": {"every": 5},
}


def small_config(**sections):
    config = tiny_config(SMALL, **sections)
    check_config(config)
    return config


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("backbone")
    train.train(small_config(), workdir)
    for split in ("train", "test"):
        assert features.main([f"--workdir={workdir}", f"--split={split}"]) == 0
    return workdir


def poisoned(backbone, directory, rows):
    """The config of a run on stored features, of which those of some examples overflow."""
    whole = feature_store.read(backbone / "features" / "train.npz")
    values = np.array(whole.features)
    values[rows] = 3e38
    feature_store.write(directory / "train.npz", values.shape, [values], whole.source(("label",)), dict(whole.about))
    (directory / "test.npz").write_bytes((backbone / "features" / "test.npz").read_bytes())
    return small_config(
        data={"features": str(directory)},
        optimizer={"trained": ("head/*",), "gradient_clip": 1.0, "average_decay": 0.9},
        checkpoint={"init_from": str(backbone)},
    )


def example_of(step):
    """An example of this step's batch, and of no other among the first 22, which are one pass."""
    return int(order.indices(0, step * BATCH, BATCH, EXAMPLES)[0])


def states(workdir):
    """The arrays of every checkpoint, by step."""
    return {step: saved_state(workdir, step) for step in CheckpointManager(workdir, read_only=True).steps()}


def rate_at(config):
    """Cosine decay without warm-up, written out."""
    return lambda updates: config.optimizer.learning_rate * (1 + math.cos(math.pi * updates / config.train.steps)) / 2


@pytest.mark.slow
def test_a_nonfinite_step_makes_no_update_and_is_counted(backbone, tmp_path):
    config = poisoned(backbone, tmp_path / "data", [example_of(12)])
    config.train.steps = 20
    train.train(config, tmp_path / "run")
    skipped = {line["step"]: line.get("train/skipped", 0) for line in read_metrics(tmp_path / "run")}
    assert skipped == {5: 0, 10: 0, 15: 1, 20: 0}
    # The rate of the last update that was made, by the updates before it: one fewer after the non-finite step.
    rates = {line["step"]: line["train/learning_rate"] for line in read_metrics(tmp_path / "run")}
    schedule = rate_at(config)
    assert rates == pytest.approx({5: schedule(4), 10: schedule(9), 15: schedule(13), 20: schedule(18)}, rel=1e-6)
    metrics = read_json_lines((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics and all(math.isfinite(value) for line in metrics for value in line.values())
    assert not any(integrity.not_finite(state) for state in states(tmp_path / "run").values())


@pytest.mark.slow
def test_a_nonfinite_step_changes_nothing_but_the_counters(toy, make_config, monkeypatch):
    run = toy(make_config(train={"steps_per_dispatch": 1}, optimizer={"average_decay": 0.9}))
    state, _ = run.run(run.start(), 1)
    broken = state.parameters["encoder"]["norm"]["scale"] * np.nan
    parameters = {
        **state.parameters,
        "encoder": {**state.parameters["encoder"], "norm": {"scale": broken, "bias": broken}},
    }
    before = jax.device_get(state.replace(parameters=parameters))
    after, sums = run.update(jax.device_put(before), run.feed(1, 1), np.int32(1), run.seed)
    after = jax.device_get(after)
    chex.assert_trees_all_equal(after.optimizer, before.optimizer)
    chex.assert_trees_all_equal(after.averaged, before.averaged)
    chex.assert_trees_all_equal(after.parameters["head"], before.parameters["head"])
    assert (int(after.step), int(after.nonfinite_streak), float(sums["skipped"])) == (2, 1, 1.0)
    assert int(sums["updates"]) == 1
    assert float(sums["count"]) == 1.0 and np.isfinite(float(sums["loss"]))  # of step 1 alone


@pytest.mark.slow
def test_after_a_burst_the_run_returns_to_the_checkpoint_and_skips_the_batches(backbone, tmp_path, capsys):
    config = poisoned(backbone, tmp_path / "data", [example_of(step) for step in range(12, 12 + BURST)])
    summary = train.train(config, tmp_path / "run")
    assert "back to step 10, skipping their batches" in capsys.readouterr().out
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == list(range(5, STEPS + 1, 5))
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "train/rolled_back_from" in line] == [15]
    assert summary["steps"] == STEPS
    kept = states(tmp_path / "run")
    assert int(kept[STEPS]["shift"]) == 12 + BURST - 10
    assert not any(integrity.not_finite(state) for state in kept.values())


@pytest.mark.slow
def test_how_a_run_is_cut_changes_nothing_about_a_burst(backbone, tmp_path):
    ends = []
    for rows in (1, 50):
        config = poisoned(backbone, tmp_path / f"data{rows}", [example_of(step) for step in range(12, 12 + BURST)])
        config.train.steps_per_dispatch = rows
        train.train(config, tmp_path / f"run{rows}")
        ends.append(states(tmp_path / f"run{rows}")[STEPS])
    chex.assert_trees_all_equal(*ends)


@pytest.mark.slow
def test_a_run_that_stays_nonfinite_ends_with_a_report(backbone, tmp_path):
    config = poisoned(backbone, tmp_path / "data", slice(None))
    with pytest.raises(UserError) as caught:
        train.train(config, tmp_path / "run")
    message = str(caught.value)
    assert all(
        part in message
        for part in ("is not finite at step", "first in the squared gradient norm, learning rate", recovery.REPORT)
    )
    report = json.loads((tmp_path / "run" / recovery.REPORT).read_text())
    last = order.indices(0, (4 * BURST - 1) * BATCH, BATCH, EXAMPLES)  # the first attempt and three after it
    assert report["batch"] == list(last)
    assert not (tmp_path / "run" / "checkpoints").exists() or not states(tmp_path / "run")


@pytest.mark.slow
def test_the_report_names_the_first_nonfinite_module(tmp_path):
    config = small_config(optimizer={"learning_rate": 1e38}, train={"steps": 10})
    with pytest.raises(UserError, match=r"first in (embedding|encoder|head)"):
        train.train(config, tmp_path)
    report = json.loads((tmp_path / recovery.REPORT).read_text())
    assert report["learning_rate"] > 1e37 and len(report["batch"]) == BATCH


@pytest.mark.slow
def test_a_run_that_is_never_finite_fails_also_with_frequent_saves(tmp_path):
    """Saves within bursts do not reset the count of returns, and a line without a finite step has no loss."""
    config = small_config(optimizer={"learning_rate": 1e38}, log={"every": 1}, checkpoint={"every": 3})
    with pytest.raises(UserError, match="the loss or gradient is not finite at step"):
        train.train(config, tmp_path)


def test_a_nonfinite_state_is_not_saved(toy, make_config, tmp_path):
    run = toy(make_config())
    state = run.start()
    broken = state.replace(parameters={**state.parameters, "class_token": state.parameters["class_token"] * np.inf})
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(broken.to_arrays(), {})
        with pytest.raises(SaveFailed, match="non-finite values in parameters/class_token"):
            checkpoints.wait()
        assert checkpoints.steps() == []
        checkpoints.save(state.to_arrays(), {})  # and costs the next one nothing
        checkpoints.wait()
        assert checkpoints.steps() == [0]
