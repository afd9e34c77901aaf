"""Numbers that are not finite: once, in a burst, for ever."""

import json
import math

import chex
import jax
import numpy as np
import pytest

from vit_jax import config as options
from vit_jax import features
from vit_jax.checkpoint import integrity
from vit_jax.checkpoint.manager import Checkpoints, SaveFailed
from vit_jax.data import feature_store, order
from vit_jax.errors import UserError
from vit_jax.training import nonfinite, train
from vit_jax.training.step import BURST

BATCH, STEPS, EXAMPLES = 64, 40, 1437


def small_config(**sections):
    config = options.default()
    config.model.update(variant="Ti/4", width=16, depth=1, heads=2, mlp_width=16, pooling="mean")
    config.optimizer.update(learning_rate=1e-2)
    config.train.update(batch_size=BATCH, steps=STEPS, evaluation_batch_size=120, steps_per_dispatch=7)
    config.checkpoint.every, config.log.every = 10, 5
    config.mesh.devices, config.log.tensorboard = 1, False
    for section, values in sections.items():
        config[section].update(values)
    options.check(config)
    return config


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    train.train(small_config(), folder)
    for split in ("train", "test"):
        assert features.main([f"--workdir={folder}", f"--split={split}"]) == 0
    return folder


def poisoned(backbone, folder, rows):
    """A run on stored features, of which those of some examples are not numbers."""
    whole = feature_store.read(backbone / "features" / "train.npz")
    values = np.array(whole.features)
    values[rows] = np.nan
    feature_store.write(folder / "train.npz", values.shape, [values], whole.source(("label",)), dict(whole.about))
    (folder / "test.npz").write_bytes((backbone / "features" / "test.npz").read_bytes())
    return small_config(
        data={"features": str(folder)},
        optimizer={"trained": "head/*", "gradient_clip": 1.0, "average_decay": 0.9},
        checkpoint={"init_from": str(backbone)},
    )


def example_of(step):
    """An example of this step's batch, and of no other among the first 22, which are one pass."""
    return int(order.indices(0, step * BATCH, BATCH, EXAMPLES)[0])


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def states(folder, run_config):
    """Every checkpoint's arrays."""
    from orbax.checkpoint import v1 as ocp

    paths = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return {int(path.name): ocp.load_checkpointables(path)["state"] for path in paths}


def rate_at(config):
    """Cosine decay without warm-up, written out."""
    return lambda updates: config.optimizer.learning_rate * (1 + math.cos(math.pi * updates / config.train.steps)) / 2


@pytest.mark.slow
def test_a_bad_step_is_left_out_and_counted(backbone, tmp_path):
    config = poisoned(backbone, tmp_path / "data", [example_of(12)])
    config.train.steps = 20
    train.train(config, tmp_path / "run")
    skipped = {line["step"]: line.get("train/skipped", 0) for line in lines(tmp_path / "run")}
    assert skipped == {5: 0, 10: 0, 15: 1, 20: 0}
    # The rate of the last update that was made, by the updates before it: one fewer behind the step that was left out.
    rates, schedule = {line["step"]: line["train/learning_rate"] for line in lines(tmp_path / "run")}, rate_at(config)
    assert rates == pytest.approx({5: schedule(4), 10: schedule(9), 15: schedule(13), 20: schedule(18)}, rel=1e-6)
    assert all(math.isfinite(value) for line in lines(tmp_path / "run") for value in line.values())
    assert not any(integrity.not_finite(state) for state in states(tmp_path / "run", config).values())


def test_a_left_out_step_changes_nothing_but_the_counts(toy, make_config, monkeypatch):
    run = toy(make_config(train={"steps_per_dispatch": 1}, optimizer={"average_decay": 0.9}))
    state, _ = run.run(run.start(), 1)
    broken = state.parameters["encoder"]["norm"]["scale"] * np.nan
    parameters = {
        **state.parameters,
        "encoder": {**state.parameters["encoder"], "norm": {"scale": broken, "bias": broken}},
    }
    before = jax.device_get(state.replace(parameters=parameters))
    after, sums = run.update(jax.device_put(before), run.feed(1, 1), np.int32(1))
    after = jax.device_get(after)
    chex.assert_trees_all_equal(after.optimizer, before.optimizer)
    chex.assert_trees_all_equal(after.averaged, before.averaged)
    chex.assert_trees_all_equal(after.parameters["head"], before.parameters["head"])
    assert (int(after.step), int(after.streak), float(sums["skipped"])) == (2, 1, 1.0)
    assert int(sums["updates"]) == 1
    assert float(sums["count"]) == 1.0 and np.isfinite(float(sums["loss"]))  # of step 1 alone


def test_a_burst_goes_back_to_the_checkpoint_and_on_behind_it(backbone, tmp_path, capsys):
    config = poisoned(backbone, tmp_path / "data", [example_of(step) for step in range(12, 12 + BURST)])
    summary = train.train(config, tmp_path / "run")
    assert "back to step 10, and on with the batches behind them" in capsys.readouterr().out
    steps = [line["step"] for line in lines(tmp_path / "run")]
    assert steps == list(range(5, STEPS + 1, 5))
    assert [line["step"] for line in lines(tmp_path / "run") if "train/rolled_back_from" in line] == [15]
    assert summary["steps"] == STEPS
    kept = states(tmp_path / "run", config)
    assert int(kept[STEPS]["shift"]) == 12 + BURST - 10
    assert not any(integrity.not_finite(state) for state in kept.values())


@pytest.mark.slow
def test_how_a_run_is_cut_changes_nothing_about_a_burst(backbone, tmp_path):
    ends = []
    for rows in (1, 50):
        config = poisoned(backbone, tmp_path / f"data{rows}", [example_of(step) for step in range(12, 12 + BURST)])
        config.train.steps_per_dispatch = rows
        train.train(config, tmp_path / f"run{rows}")
        ends.append(states(tmp_path / f"run{rows}", config)[STEPS])
    chex.assert_trees_all_equal(*ends)


@pytest.mark.slow
def test_bad_numbers_for_ever_end_with_a_report(backbone, tmp_path):
    config = poisoned(backbone, tmp_path / "data", slice(None))
    with pytest.raises(UserError) as caught:
        train.train(config, tmp_path / "run")
    said = str(caught.value)
    assert "not finite at step" in said and "first in inputs, learning rate" in said and nonfinite.REPORT in said
    report = json.loads((tmp_path / "run" / nonfinite.REPORT).read_text())
    last = order.indices(0, (4 * BURST - 1) * BATCH, BATCH, EXAMPLES)  # the first attempt and three after it
    assert report["batch"] == list(last)
    assert not (tmp_path / "run" / "checkpoints").exists() or not states(tmp_path / "run", config)


@pytest.mark.slow
def test_the_report_names_the_module_where_numbers_go_bad_first(tmp_path):
    config = small_config(optimizer={"learning_rate": 1e38}, train={"steps": 10})
    with pytest.raises(UserError, match=r"first in (embedding|encoder|head)"):
        train.train(config, tmp_path)
    report = json.loads((tmp_path / nonfinite.REPORT).read_text())
    assert report["learning_rate"] > 1e37 and len(report["batch"]) == BATCH


@pytest.mark.slow
def test_bad_from_the_first_step_on_with_frequent_saves_it_gives_up_all_the_same(tmp_path):
    """Saves that fall into bursts must not count as good ones, and a record without a good step has no loss."""
    config = small_config(optimizer={"learning_rate": 1e38}, log={"every": 1}, checkpoint={"every": 3})
    with pytest.raises(UserError, match="numbers are not finite at step"):
        train.train(config, tmp_path)


def test_what_is_not_finite_is_not_saved(toy, make_config, tmp_path):
    run = toy(make_config())
    state = run.start()
    broken = state.replace(parameters={**state.parameters, "class_token": state.parameters["class_token"] * np.inf})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(broken, {})
        with pytest.raises(SaveFailed, match="not finite: parameters/class_token"):
            checkpoints.wait()
        assert checkpoints.steps() == []
        checkpoints.save(state, {})  # and costs the next one nothing
        checkpoints.wait()
        assert checkpoints.steps() == [0]
