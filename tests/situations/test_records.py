"""What a run directory records is what was trained: a walk over runs and options, resumed runs, and kills."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import kill, mostly_slow, num_records, run_command, start_command, tiny_config, wait_until

from vit_jax import atomic, checkpoints
from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config.check import check_config
from vit_jax.config.option import CHANGEABLE, FIXED, FREE, NAMES, SEEDS, STATISTICS, STEPS, WEIGHTS
from vit_jax.errors import UserError
from vit_jax.training import lr_sweep, multi_seed, run_directory, train
from vit_jax.training.run import Run
from vit_jax.training.run_record import RunRecord

LAST, STOPPED = 20, 10
RESULT = {"test/accuracy": 0.5, "test/examples": 360, "test/loss": 1.5, "steps": LAST, "seconds": 1.0, "parameters": 5}
OTHERS = {NAMES: ("a", "b"), WEIGHTS: (("label", 0.25),), SEEDS: (3, 1), STEPS: (1, 2)}
OTHERS |= {STATISTICS: "0.5,0.5,0.5/0.25,0.25,0.25"}
LENGTHS = ("train.steps", "train.epochs")


def option(name):
    section, _, key = name.partition(".")
    return options.OPTIONS[section][key]


def with_policy(policy):
    return [name for name in options.names() if option(name).resume == policy]


def another_value(name, value):
    """A value that the option allows by itself, and that differs from `value`."""
    one = option(name)
    by_kind = {bool: [not value], str: ["other"], int: [3, 7], float: [0.25, 0.125, 2.0, 1e-9]}
    tried = [*one.choices, OTHERS[one.kind]] if one.kind in OTHERS else [*one.choices, *by_kind[one.kind]]
    for candidate in tried:
        try:
            one.check(name, candidate)
        except UserError:
            continue
        if candidate != value:
            return candidate
    raise AssertionError(f"no other value of {name}")


def changed(config, *names, **values):
    """A copy of a config with other values of the named options, and values by 'section__key'."""
    made = copy.deepcopy(config)
    for name in names:
        section, _, key = name.partition(".")
        made[section][key] = another_value(name, made[section][key])
    for name, value in values.items():
        section, _, key = name.partition("__")
        made[section][key] = value
    return made


def contents(workdir):
    """Every file but the lock's, with its bytes and the time of its last change."""
    files = [path for path in workdir.rglob("*") if path.is_file() and not path.name.startswith(".lock.json")]
    return {path.relative_to(workdir): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def recorded(workdir):
    """The config in config.json, the lines of changes.jsonl without their time, and summary.json."""
    changes = [{k: v for k, v in line.items() if k != "time"} for line in run_files.read_changes(workdir)]
    return run_files.read_config(workdir), changes, run_files.read_summary(workdir)


def as_json(config):
    return json.loads(json.dumps(config.to_dict()))


def make_run(workdir, config, step, summary=None, changes=(), seed=0):
    """A run directory with records and a checkpoint of `step`, as a run with this config writes it."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / run_files.METRICS).write_text(f'{{"step": {step}, "train/loss": 1.0}}\n')
    run_files.write_config(workdir, config.to_dict(), list(changes))
    with CheckpointManager(workdir) as manager:
        manager.save({"step": np.int32(step)}, {"config": config.to_dict(), "changes": list(changes)})
        manager.wait()
    if summary is not None:
        atomic.write_json(workdir / run_files.SUMMARY, summary)
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, one that is trained to the end but not finished, a stopped one, and an empty directory."""
    base, config = tmp_path_factory.mktemp("runs"), tiny_config(train={"steps": LAST})
    make_run(base / "finished", config, LAST, RESULT)
    make_run(base / "trained", config, LAST)
    make_run(base / "stopped", config, STOPPED)
    (base / "fresh").mkdir()
    return base


def is_message(error):
    return len(str(error).splitlines()) == 3 and "--workdir" in str(error)


# --- every option, for runs in each state: what may change is decided from the directory and the config alone --------


@pytest.mark.parametrize("name", mostly_slow(with_policy(FIXED), 20))
def test_a_fixed_option_is_refused_once_a_run_has_begun(runs, name):
    config = changed(tiny_config(train={"steps": LAST}), name)
    for run in ("finished", "trained", "stopped"):
        before = contents(runs / run)
        with pytest.raises(UserError, match=rf"holds a run with another config\n  differs: {name}: ") as refused:
            run_directory.finished(runs / run, config)
            run_directory.changes(runs / run, config)
        assert is_message(refused.value) and contents(runs / run) == before
    assert run_directory.finished(runs / "fresh", config) is None and not run_directory.changes(runs / "fresh", config)


@pytest.mark.parametrize("name", mostly_slow(with_policy(FREE), 10))
def test_a_free_option_differs_silently(runs, name):
    config = changed(tiny_config(train={"steps": LAST}), name)
    before = contents(runs)
    assert run_directory.finished(runs / "finished", config) == RESULT
    for run in ("trained", "stopped", "fresh"):
        assert run_directory.finished(runs / run, config) is None and run_directory.changes(runs / run, config) == []
    assert contents(runs) == before


@pytest.mark.parametrize("name", mostly_slow(with_policy(CHANGEABLE), 20))
def test_a_changed_option_is_refused_where_no_step_is_left(runs, name):
    config = changed(tiny_config(train={"steps": LAST}), name)
    before, row = contents(runs), rf"  differs: {name}: .* -> "
    with pytest.raises(UserError, match=rf"is finished: test accuracy 50.00 % \(180 of 360\).*\n{row}") as refused:
        run_directory.finished(runs / "finished", config)
    assert is_message(refused.value)
    assert run_directory.finished(runs / "trained", config) is None
    with pytest.raises(UserError, match=rf"was trained to step 20, and no step is left .*\n{row}") as refused:
        run_directory.check_steps_left(runs / "trained", config, LAST)
    assert is_message(refused.value)
    for run in ("trained", "stopped"):
        (only,) = run_directory.changes(runs / run, config)
        assert only.startswith(f"{name}: ")
    run_directory.check_steps_left(runs / "stopped", config, LAST)
    assert run_directory.changes(runs / "fresh", config) == []
    assert contents(runs) == before


@pytest.mark.parametrize("name", ["model.dropout", "data.test"])
def test_a_changed_option_is_accepted_with_more_steps(runs, name):
    config = changed(tiny_config(train={"steps": LAST}), name, train__steps=LAST + 1)
    before = contents(runs / "finished")
    assert run_directory.finished(runs / "finished", config) is None
    rows = run_directory.changes(runs / "finished", config)
    assert len(rows) == 2 and any(row.startswith(f"{name}: ") for row in rows)
    run_directory.check_steps_left(runs / "finished", config, LAST + 1)
    assert contents(runs / "finished") == before


def test_every_option_has_another_value():
    config = options.default()
    for name in options.names():
        section, _, key = name.partition(".")
        assert another_value(name, config[section][key]) != config[section][key]


def test_epochs_decide_once_the_data_are_loaded(runs, tmp_path):
    """The number of steps per epoch is not known before; the same number of epochs leaves no step."""
    config = tiny_config(train={"steps": None, "epochs": 2.0})
    make_run(tmp_path / "run", config, LAST, RESULT)
    assert run_directory.finished(tmp_path / "run", config) == RESULT
    assert run_directory.finished(tmp_path / "run", changed(config, train__epochs=3.0)) is None
    with pytest.raises(UserError, match=r"differs: model.dropout: 0.0 -> 0.5\n"):
        run_directory.finished(tmp_path / "run", changed(config, model__dropout=0.5))


def test_the_message_says_what_to_type(runs):
    config = tiny_config(train={"steps": LAST}, optimizer={"learning_rate": 0.5})
    with pytest.raises(UserError) as refused:
        run_directory.finished(runs / "finished", config)
    assert str(refused.value).splitlines() == [
        f"{runs / 'finished'} is finished: test accuracy 50.00 % (180 of 360) after 20 steps, 0:01 of training",
        "  differs: optimizer.learning_rate: 0.001 -> 0.5",
        "  for another experiment use another --workdir; to train on, set more than 20 steps: --config.train.steps=N",
    ]
    config = tiny_config(train={"steps": LAST}, data={"test": "test[:100]"})
    with pytest.raises(UserError) as refused:
        run_directory.finished(runs / "finished", config)
    way_out = f"  to score it on that split: python -m vit_jax.evaluate --workdir={runs / 'finished'} "
    assert str(refused.value).splitlines()[2] == f"{way_out}--split='test[:100]'"


def test_a_summary_without_checkpoints_is_not_that_of_another_config(tmp_path):
    """Checkpoints and metrics were removed to save space."""
    config = tiny_config(train={"steps": LAST})
    atomic.write_json(tmp_path / run_files.CONFIG, config.to_dict())
    atomic.write_json(tmp_path / run_files.SUMMARY, RESULT)
    assert run_directory.finished(tmp_path, config) == RESULT
    for name in ("train.seed", "optimizer.learning_rate"):
        with pytest.raises(UserError, match=f"differs: {name}: "):
            run_directory.finished(tmp_path, changed(config, name))


def test_the_summary_of_fewer_steps_is_not_the_result_of_more(tmp_path):
    """The process was killed after it had saved, and before it removed summary.json."""
    config = tiny_config(train={"steps": 2 * LAST})
    make_run(tmp_path / "run", config, 2 * LAST, RESULT)
    assert run_directory.finished(tmp_path / "run", config) is None


def test_the_newest_checkpoint_decides_and_not_an_edited_config(runs, tmp_path):
    """config.json has a value that was never trained, as earlier versions wrote it."""
    workdir, config = shutil.copytree(runs / "finished", tmp_path / "run"), tiny_config(train={"steps": LAST})
    other = changed(config, "optimizer.learning_rate")
    atomic.write_json(workdir / run_files.CONFIG, other.to_dict())
    assert run_directory.finished(workdir, config) == RESULT
    with pytest.raises(UserError, match=r"differs: optimizer.learning_rate: "):
        run_directory.finished(workdir, other)


# --- what is written, and when ---------------------------------------------------------------------------------------


def make_record(config, workdir, on_save=None):
    return RunRecord(config, workdir, {"command": "test"}, None, on_save)


@pytest.fixture
def stopped(runs, tmp_path):
    return shutil.copytree(runs / "stopped", tmp_path / "run")


def newest(workdir):
    return run_directory.newest_metadata(workdir)


@pytest.mark.parametrize("name", mostly_slow(with_policy(CHANGEABLE), 20))
def test_a_change_is_recorded_with_the_first_checkpoint_of_its_steps(stopped, name):
    old = tiny_config(train={"steps": LAST})
    config = changed(old, name)
    before, record = contents(stopped), make_record(config, stopped)
    (row,) = record.resume(*newest(stopped))
    record.write()
    after = contents(stopped)
    assert {path: after[path] for path in before} == before
    assert record.at(STOPPED)["config"] == as_json(old) and record.at(STOPPED)["changes"] == []
    record.saved(STOPPED + 1, record.at(STOPPED + 1))
    change = {"step": STOPPED, "changes": [row]}
    assert recorded(stopped) == (as_json(config), [change], None)


def test_free_options_are_recorded_with_the_steps_as_well_but_are_no_changes(stopped):
    old, config = tiny_config(train={"steps": LAST}), tiny_config(train={"steps": LAST}, log={"every": 7})
    record = make_record(config, stopped)
    assert record.resume(*newest(stopped)) == []
    record.write()
    assert recorded(stopped)[0] == as_json(old)
    record.saved(STOPPED + 1, record.at(STOPPED + 1))
    assert recorded(stopped) == (as_json(config), [], None)


def test_changes_add_up(stopped):
    """One at step 10 and another at step 15; a third, before whose first checkpoint the run ended, leaves no trace."""
    config, expected = tiny_config(train={"steps": LAST}), []
    for step, rate in ((STOPPED, 0.5), (15, 0.25), (18, 0.125)):
        config = changed(config, optimizer__learning_rate=rate)
        record = make_record(config, stopped)
        (row,) = record.resume(*newest(stopped))
        record.write()
        if step < 18:
            expected.append({"step": step, "changes": [row]})
            make_run(stopped, config, step + {10: 5, 15: 3}[step], changes=record.at(step + 1)["changes"])
            record.saved(*newest(stopped))
    assert recorded(stopped)[1] == expected
    assert recorded(stopped)[0]["optimizer"]["learning_rate"] == 0.25


def test_records_follow_an_older_checkpoint(stopped):
    """The newest one is lost: config.json, changes.jsonl and summary.json had been those of its steps."""
    old, change = tiny_config(train={"steps": LAST}), {"step": STOPPED, "time": "then", "changes": ["a.b: 1 -> 2"]}
    make_run(stopped, changed(old, "optimizer.learning_rate"), LAST, RESULT, [change])
    shutil.rmtree(stopped / run_files.CHECKPOINTS / str(LAST))
    record = make_record(old, stopped)
    assert record.resume(*newest(stopped)) == []
    record.write()
    assert recorded(stopped) == (as_json(old), [], None)


def test_a_rollback_within_the_run_moves_the_step_of_the_change(stopped):
    old = tiny_config(train={"steps": LAST})
    make_run(stopped, old, 15)
    config = changed(old, "optimizer.learning_rate")
    record = make_record(config, stopped)
    (row,) = record.resume(*newest(stopped))
    assert record.at(16)["changes"][0]["step"] == 15
    shutil.rmtree(stopped / run_files.CHECKPOINTS / "15")
    assert record.resume(*newest(stopped)) == [row]
    assert record.at(STOPPED + 1)["changes"][0]["step"] == STOPPED
    assert record.resume(0, {}) == [] and record.at(1) == {"config": config.to_dict(), "changes": []}


def test_a_run_without_a_step_has_no_changes(tmp_path):
    """It was stopped before its first step, and a checkpoint of step 0 was saved."""
    old = tiny_config(train={"steps": LAST})
    workdir, config = make_run(tmp_path / "run", old, 0), changed(old, "optimizer.learning_rate")
    record = make_record(config, workdir)
    assert record.resume(*newest(workdir))
    record.write()
    assert recorded(workdir)[0] == as_json(old)
    record.saved(5, record.at(5))
    assert recorded(workdir) == (as_json(config), [], None)


def test_the_first_config_is_written_at_the_start(tmp_path):
    config = tiny_config()
    make_record(config, tmp_path).write()
    assert recorded(tmp_path) == (as_json(config), [], None) and (tmp_path / run_files.ENVIRONMENT).exists()
    assert not (tmp_path / run_files.CHANGES).exists()


def test_changes_of_older_versions_stay_readable(stopped, capsys):
    """Their lines have no step, and their checkpoints have no changes."""
    old = tiny_config(train={"steps": LAST})
    with CheckpointManager(stopped) as manager:
        manager.save({"step": np.int32(12)}, {"config": old.to_dict()})
        manager.wait()
    lines = [
        {"time": "then", "changes": ["train.steps: 1 -> 20"]},
        {"step": 12, "time": "now", "changes": ["a: 1 -> 2"]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (stopped / run_files.CHANGES).write_text(f"{text}not JSON\n")
    assert run_files.read_changes(stopped) == lines
    assert checkpoints.main(["list", str(stopped)]) == 0
    assert "changed at an unknown step: train.steps: 1 -> 20  (then)" in capsys.readouterr().out
    record = make_record(changed(old, "optimizer.learning_rate"), stopped)
    record.resume(*newest(stopped))
    record.write()
    assert run_files.read_changes(stopped) == lines[:1]  # the second one is of a checkpoint that is lost
    record.saved(13, record.at(13))
    assert [line.get("step") for line in run_files.read_changes(stopped)] == [None, 12]


def test_the_command_for_checkpoints_shows_and_restores_what_was_trained(tmp_path, capsys):
    config, change = tiny_config(), {"step": 10, "time": "then", "changes": ["optimizer.learning_rate: 0.1 -> 0.001"]}
    workdir = make_run(tmp_path / "run", config, LAST, changes=[change])
    assert checkpoints.main(["list", str(workdir)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "changed from step 10 on: optimizer.learning_rate: 0.1 -> 0.001  (then)"
    atomic.write_json(workdir / run_files.CONFIG, changed(config, optimizer__learning_rate=0.5).to_dict())
    (workdir / run_files.CHANGES).unlink()
    assert checkpoints.main(["list", str(workdir)]) == 0
    shown = capsys.readouterr().out
    assert "config.json differs from what was trained: optimizer.learning_rate: 0.5 -> 0.001\n" in shown
    assert checkpoints.main(["restore-config", str(workdir)]) == 0
    assert recorded(workdir)[:2] == (as_json(config), [{key: change[key] for key in ("step", "changes")}])


def test_a_checkpoint_counts_as_saved_once_its_config_is_written(tmp_path):
    """The disk is full after the checkpoint: the save has failed, and is retried."""
    config, full = tiny_config(), [True]

    def on_save(step, metadata):
        if full:
            raise OSError(28, "No space left on device")
        run_files.write_config(tmp_path, metadata["config"], metadata["changes"])

    metadata = {"config": config.to_dict(), "changes": []}
    with CheckpointManager(tmp_path, on_save=on_save) as manager:
        for _ in range(2):
            manager.save({"step": np.int32(1)}, metadata)
            manager._join()
            assert manager.has(1) == (not full) and (tmp_path / run_files.CONFIG).exists() == (not full)
            manager._error = None
            full.clear()


# --- several seeds ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """The directory of two seeds, one of them finished."""
    workdir, config = tmp_path_factory.mktemp("seeds"), tiny_config(train={"steps": LAST, "seeds": (3, 0)})
    run_files.write_config(workdir, config.to_dict(), [])
    for seed, step, summary in ((3, LAST, RESULT), (0, STOPPED, None)):
        alone = tiny_config(train={"steps": LAST, "seed": seed})
        make_run(workdir / f"seed-{seed}", alone, step, summary)
    return workdir


@pytest.fixture
def seeds(two_seeds, tmp_path):
    return shutil.copytree(two_seeds, tmp_path / "seeds")


@pytest.mark.parametrize("chosen", [(3, 0), (0, 3, 7), (7,), 9], ids=str)
def test_a_set_of_seeds_is_of_one_config(seeds, chosen):
    """Also the seeds that are not chosen: the config.json of the directory is that of all."""
    before = contents(seeds)
    for name in ("optimizer.learning_rate", "data.test"):
        config = changed(tiny_config(train={"steps": LAST, "seeds": chosen}), name)
        with pytest.raises(UserError, match=rf"seed-3 is finished: .*\n  differs: {name}: ") as refused:
            multi_seed.train(config, seeds)
        assert is_message(refused.value) and contents(seeds) == before


def test_a_set_of_seeds_is_refused_before_any_is_trained(seeds):
    """Seed 3 was trained to the end but not finished, which is known once the data are loaded."""
    (seeds / "seed-3" / run_files.SUMMARY).unlink()
    config = tiny_config(train={"steps": LAST, "seeds": (0, 3)}, optimizer={"learning_rate": 0.5})
    before = contents(seeds)
    with pytest.raises(UserError, match=r"seed-3 was trained to step 20, and no step is left"):
        multi_seed.train(config, seeds)
    assert contents(seeds) == before


def test_a_sweep_is_of_one_config(tmp_path):
    """It was killed in its first trial, before it has written sweep.json."""
    splits = ("train[:90%]", "train[90%:]", "train")
    plan = lr_sweep.Plan(tiny_config(train={"steps": LAST}), (0.5, 0.25), *splits)
    make_run(tmp_path / "rate-0.5", plan.trial(0.5), STOPPED)
    lr_sweep._check_workdir(plan, tmp_path)
    for name in ("optimizer.weight_decay", "augment.flip"):
        other = lr_sweep.Plan(changed(plan.config, name), (0.25, 0.5), *splits)
        with pytest.raises(UserError, match=rf"holds a sweep of another config\n  differs: {name}: "):
            lr_sweep._check_workdir(other, tmp_path)


# --- real runs -------------------------------------------------------------------------------------------------------

SMALL = {
    "data": {"train": "train[:256]", "test": "test[:64]"},
    "train": {"steps": LAST, "batch_size": 32, "steps_per_dispatch": 2},
    "checkpoint": {"every": 5, "keep": LAST},
    "log": {"every": 5},
}
OTHER_RATE = {"optimizer": {"learning_rate": 0.005}}


def small(**sections):
    config = tiny_config(SMALL, **sections)
    check_config(config)
    return config


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train.train(small(), workdir)
    return workdir


@pytest.fixture
def finished_copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def remove_steps(workdir, *steps):
    for step in steps:
        shutil.rmtree(workdir / run_files.CHECKPOINTS / str(step))


def saved_config(workdir, step):
    with CheckpointManager(workdir, read_only=True) as manager:
        return manager.metadata(step)["config"]


RECORDS = (run_files.CONFIG, run_files.CHANGES, run_files.SUMMARY, run_files.ENVIRONMENT)


def records(workdir):
    return {name: (workdir / name).read_bytes() if (workdir / name).exists() else None for name in RECORDS}


@pytest.mark.slow
def test_a_run_that_was_not_evaluated_finishes_with_its_config_only(finished_copy):
    """The process was killed after the last checkpoint."""
    summary = (finished_copy / run_files.SUMMARY).read_bytes()
    (finished_copy / run_files.SUMMARY).unlink()
    before = contents(finished_copy)
    with pytest.raises(
        UserError, match=r"was trained to step 20, and no step is left .*\n.*\n  the same config finishes"
    ):
        train.train(small(**OTHER_RATE), finished_copy)
    assert contents(finished_copy) == before
    found = train.train(small(log={"every": 7}), finished_copy)
    expected = json.loads(summary)
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert records(finished_copy)[run_files.CONFIG] == before[Path(run_files.CONFIG)][0]  # a free option differed


@pytest.mark.slow
def test_more_steps_with_another_option_are_recorded(finished_copy):
    longer = small(**OTHER_RATE, train={"steps": 30})
    assert train.train(longer, finished_copy)["steps"] == 30
    rows = ["optimizer.learning_rate: 0.001 -> 0.005", "train.steps: 20 -> 30"]
    config, changes, summary = recorded(finished_copy)
    assert (config, changes, summary["steps"]) == (as_json(longer), [{"step": LAST, "changes": rows}], 30)
    for step in (15, 20, 25, 30):
        assert saved_config(finished_copy, step) == as_json(small() if step <= LAST else longer)
    # The newest checkpoints are lost: the records are again those of the steps before the change.
    remove_steps(finished_copy, 20, 25, 30)
    with pytest.raises(UserError, match=r"is finished: .*\n  differs: optimizer.learning_rate: 0.005 -> 0.001; "):
        train.train(small(), finished_copy)
    (finished_copy / run_files.SUMMARY).unlink()
    assert train.train(small(), finished_copy)["steps"] == LAST
    assert recorded(finished_copy)[:2] == (as_json(small()), [])


@pytest.mark.slow
def test_a_run_that_stops_before_its_first_checkpoint_leaves_its_records(finished_copy):
    before, longer = records(finished_copy), small(**OTHER_RATE, train={"steps": 30, "max_minutes": 0.0})
    assert train.train(longer, finished_copy) is None
    assert records(finished_copy) == before
    assert train.train(small(), finished_copy)["steps"] == LAST


@pytest.mark.slow
def test_a_run_that_fails_before_its_first_checkpoint_leaves_its_records(finished_copy):
    """With such a learning rate, the losses are not finite; batches of other checkpoints must not be skipped."""
    remove_steps(finished_copy, 5, 10, 15)
    before = records(finished_copy)
    diverging = small(optimizer={"learning_rate": 1e30}, train={"steps": 60}, checkpoint={"every": 0})
    with pytest.raises(UserError, match="is not finite"):
        train.train(diverging, finished_copy)
    assert records(finished_copy) == before


@pytest.mark.slow
def test_a_damaged_last_checkpoint_leaves_steps_to_train_with_another_option(finished_copy):
    """Which is known only when its arrays are read."""
    (finished_copy / run_files.SUMMARY).unlink()
    (file,) = sorted((finished_copy / run_files.CHECKPOINTS / str(LAST) / "state" / "d").iterdir())[:1]
    file.write_bytes(bytes(len(file.read_bytes())))
    config = small(**OTHER_RATE)
    assert train.train(config, finished_copy)["steps"] == LAST
    (change,) = recorded(finished_copy)[1]
    assert change == {"step": 15, "changes": ["optimizer.learning_rate: 0.001 -> 0.005"]}
    assert recorded(finished_copy)[0] == as_json(config) == saved_config(finished_copy, LAST)


@pytest.mark.slow
def test_a_crash_after_a_checkpoint_and_before_its_records_is_made_good(finished_copy):
    """config.json, changes.jsonl and summary.json are still those of step 20."""
    before, longer = records(finished_copy), small(**OTHER_RATE, train={"steps": 30})
    train.train(longer, finished_copy)
    remove_steps(finished_copy, 30)
    for name, content in before.items():
        if content is None:
            (finished_copy / name).unlink(missing_ok=True)
        else:
            (finished_copy / name).write_bytes(content)
    assert train.train(longer, finished_copy)["steps"] == 30
    config, changes, summary = recorded(finished_copy)
    assert config == as_json(longer) and [change["step"] for change in changes] == [LAST] and summary["steps"] == 30


@pytest.mark.slow
def test_an_evaluation_that_was_interrupted_does_not_change_the_config_of_its_step(tmp_path, monkeypatch):
    """The checkpoint of step 8 is saved again once its evaluation is complete, by a run with another config."""
    sections = {"data": {"validation": "train[256:320]"}, "train": {"evaluate_every": 8}}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_requested", lambda run: run.step >= 8)
        assert train.train(small(**sections), tmp_path) is None
    config = small(**sections, **OTHER_RATE)
    assert train.train(config, tmp_path)["steps"] == LAST
    assert saved_config(tmp_path, 8) == as_json(small(**sections)) and saved_config(tmp_path, 10) == as_json(config)
    assert [change["step"] for change in recorded(tmp_path)[1]] == [8]


@pytest.mark.slow
def test_the_set_of_seeds_follows_its_runs(tmp_path, monkeypatch):
    several = {"train": {"seeds": (3, 0)}}
    multi_seed.train(small(**several), tmp_path)
    before, longer = records(tmp_path), small(**OTHER_RATE, train={"seeds": (3, 0), "steps": 30})
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_requested", lambda run: True)
        assert multi_seed.train(longer, tmp_path) is None
    assert records(tmp_path) == before  # stopped before any step
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_requested", lambda run: run.step >= 25)
        assert multi_seed.train(longer, tmp_path) is None
    assert recorded(tmp_path)[0]["optimizer"]["learning_rate"] == 0.005
    assert not (tmp_path / run_files.SUMMARY).exists()
    assert multi_seed.train(longer, tmp_path)["steps"] == 30
    assert multi_seed.train(small(**OTHER_RATE, train={"seeds": (0,), "steps": 30}, log={"every": 7}), tmp_path)
    config, _, summary = recorded(tmp_path)
    assert config["train"]["seeds"] == [0] and config["log"]["every"] == 5 and summary["seeds"] == [0]
    for seed in (3, 0):
        assert [change["step"] for change in recorded(tmp_path / f"seed-{seed}")[1]] == [LAST]


@pytest.mark.slow
def test_kills_leave_the_records_of_what_was_trained(finished_copy):
    """SIGKILL after steps that are not saved, and after the first new checkpoint."""
    before = records(finished_copy)
    arguments = ["--config=configs/digits.py", f"--workdir={finished_copy}"]
    sections = small(**OTHER_RATE, train={"steps": 100000, "epochs": None}, checkpoint={"every": 5000}).to_dict()
    arguments += [
        f"--config.{section}.{key}={options.OPTIONS[section][key].text(value)}"
        for section, keys in sections.items()
        for key, value in keys.items()
        if value != options.load("configs/digits.py")[section][key]
    ]
    process = start_command("vit_jax.main", *arguments)
    num_before = num_records(finished_copy)
    wait_until(process, lambda: num_records(finished_copy) > num_before + 2)
    kill(process)
    assert records(finished_copy) == before
    process = start_command("vit_jax.main", *arguments, "--config.checkpoint.every=25")
    wait_until(process, lambda: not (finished_copy / run_files.SUMMARY).exists())
    wait_until(process, lambda: (finished_copy / run_files.CHANGES).exists())
    kill(process)
    shown = run_command("vit_jax.main", *arguments, "--config.train.steps=200", "--config.optimizer.learning_rate=0.01")
    step = int(re.search(r"changed from step (\d+) on: optimizer.learning_rate: 0.005 -> 0.01", shown)[1])
    first, second = run_files.read_changes(finished_copy)
    assert first["step"] == LAST and "optimizer.learning_rate: 0.001 -> 0.005" in first["changes"]
    assert second["step"] == step > LAST and recorded(finished_copy)[2]["steps"] == 200
