"""Resuming: from any step, on other devices, with another config, after the disk was full."""

import contextlib
import errno
import json
import os
import shutil

import chex
import numpy as np
import pytest
from helpers import THOROUGH, read_metrics, saved_state, tiny_config
from orbax.checkpoint import v1 as ocp
from PIL import Image

from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config.check import check_config
from vit_jax.errors import UserError
from vit_jax.training import records, setup, tensorboard, train
from vit_jax.training.log import Log
from vit_jax.training.metrics import MetricsWriter

STEPS = 24
LOST = "20.png"
EVERYTHING_ON = {
    "model": {"dropout": 0.1, "stochastic_depth": 0.1, "stochastic_depth_schedule": "constant"},
    "augment": {"rotation": 5.0, "mixup": 0.3},
    "optimizer": {
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "average_decay": 0.9,
        "gradient_clip": 1.0,
        "weight_decay": 0.1,
    },
    "data": {"train": "train[:400]", "validation": "train[400:500]", "test": "test[:64]"},
    "train": {"steps": STEPS, "accumulation": 2, "evaluate_every": 8, "label_smoothing": 0.1},
    "checkpoint": {"every": 1, "keep": STEPS},
    "log": {"every": 3},
}


def everything_on(**sections):
    """The config of a small run in which all that can carry over from step to step is used."""
    config = tiny_config(EVERYTHING_ON, **sections)
    check_config(config)
    return config


def state(workdir, step=STEPS):
    return saved_state(workdir, step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train.train(everything_on(), workdir)
    return workdir


def as_if_killed_after(whole, workdir, step):
    """The workdir of a run that has saved that step and has died some steps later."""
    shutil.copytree(whole, workdir)
    (workdir / run_files.SUMMARY).unlink()
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def resumes_exactly(whole, workdir, step):
    as_if_killed_after(whole, workdir, step)
    train.train(everything_on(), workdir)
    chex.assert_trees_all_equal(state(workdir), state(whole))
    assert read_metrics(workdir) == read_metrics(whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [7])
def test_a_run_resumes_exactly(whole, tmp_path, step):
    resumes_exactly(whole, tmp_path / "run", step)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 21) if THOROUGH else (1, 8, 13, 20))
def test_a_run_resumes_exactly_from_every_step(whole, tmp_path, step):
    resumes_exactly(whole, tmp_path / "run", step)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_resumes_on_other_numbers_of_devices(tmp_path, dtype):
    """On 1, 2, 4 and again 1 device, six steps each, compared with a run on one device."""
    common = {"model": {"dtype": dtype}, "optimizer": {"average_decay": 0.0}, "checkpoint": {"every": 6}}
    train.train(everything_on(**common), tmp_path / "one")
    for devices, minutes in ((1, 6), (2, 12), (4, 18), (1, STEPS)):
        config = everything_on(**common, mesh={"devices": devices})
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, minutes)
            train.train(config, tmp_path / "many")
    one, many = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "many")
    assert [line["step"] for line in one] == [line["step"] for line in many]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    losses = [[line["train/loss"] for line in found if "train/loss" in line] for found in (one, many)]
    assert len(losses[0]) == STEPS / 3
    np.testing.assert_allclose(*losses, atol=tolerance)


def stop_after(patch, step):
    """A stop is requested after so many steps."""
    from vit_jax.training.run import Run

    patch.setattr(Run, "stop_requested", lambda run: run.step >= step < run.experiment.num_steps)


@pytest.mark.slow
def test_an_interrupted_evaluation_is_repeated(whole, tmp_path):
    """A stop in the middle of the evaluation at step 8: the line of step 8 is written when the run resumes."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 8)
        assert train.train(everything_on(), tmp_path) is None
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 6]
    train.train(everything_on(), tmp_path)
    assert read_metrics(tmp_path) == read_metrics(whole)
    chex.assert_trees_all_equal(state(tmp_path), state(whole))
    with CheckpointManager(tmp_path, read_only=True) as mine, CheckpointManager(whole, read_only=True) as theirs:
        assert mine.score(8) == theirs.score(8) is not None
        assert mine.best() == theirs.best()


@pytest.mark.slow
def test_a_run_stops_after_max_minutes(tmp_path, capsys):
    assert train.train(everything_on(train={"max_minutes": 0.0}), tmp_path) is None
    assert "stopped at step 0 of 24 (train.max_minutes is 0); saved in" in capsys.readouterr().out
    assert train.train(everything_on(), tmp_path)["steps"] == STEPS


@pytest.mark.slow
def test_another_length_and_learning_rate_are_printed_and_recorded(whole, tmp_path, capsys):
    as_if_killed_after(whole, tmp_path / "run", 10)
    train.train(everything_on(optimizer={"learning_rate": 5e-3}, train={"steps": 30}), tmp_path / "run")
    shown = capsys.readouterr().out
    assert "optimizer.learning_rate: 0.01 -> 0.005; train.steps: 24 -> 30" in shown
    (change,) = (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    assert json.loads(change)["step"] == 10
    assert json.loads(change)["changes"] == ["optimizer.learning_rate: 0.01 -> 0.005", "train.steps: 24 -> 30"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 30
    assert [line["step"] for line in read_metrics(tmp_path / "run")][-1] == 30


@pytest.mark.slow
def test_a_finished_run_is_lengthened_but_not_shortened(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match=r"is finished: .* after 24 steps, .*\n  differs: train.steps: 24 -> 20\n"):
        train.train(everything_on(train={"steps": 20}), tmp_path / "run")
    assert train.train(everything_on(train={"steps": 26}), tmp_path / "run")["steps"] == 26


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "row"),
    [
        ({"model": {"width": 32}}, "model.width: 16 -> 32"),
        ({"model": {"depth": 3}}, "model.depth: 1 -> 3"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name: adamw -> sgd"),
        ({"train": {"seed": 1}}, "train.seed: 0 -> 1"),
        ({"train": {"batch_size": 32}}, "train.batch_size: 64 -> 32"),
        ({"data": {"train": "train"}}, r"data.train: train\[:400\] -> train"),
    ],
)
def test_another_config_is_refused_with_what_differs(whole, sections, row):
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file())
    with pytest.raises(UserError, match=f"differs: {row}"):
        train.train(everything_on(**sections), whole)
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file()) == before


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("first, count", [(2, 3), *((n, 5) for n in (range(1, 20) if THOROUGH else (1, 19)))])
def test_a_full_disk_prevents_only_the_saves_while_it_is_full(whole, tmp_path, capsys, monkeypatch, first, count):
    """Save number `first` and the `count - 1` after it fail; later ones succeed."""
    full_disk(monkeypatch, range(first, first + count))
    train.train(everything_on(), tmp_path)
    shown = capsys.readouterr().out
    assert "warning: checkpoint save failed, will retry: " in shown and "No space left on device" in shown
    assert read_metrics(tmp_path) == read_metrics(whole)
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept >= set(range(first + count, STEPS + 1)) and len(set(range(1, STEPS + 1)) - kept) <= count
    chex.assert_trees_all_equal(state(tmp_path), state(whole))


def full_disk(monkeypatch, failing_calls):
    save, calls = ocp.save_checkpointables, []

    def failing(path, *arguments, **keywords):
        calls.append(path)
        if len(calls) in failing_calls:
            path.mkdir(parents=True, exist_ok=True)  # an incomplete checkpoint
            (path / "half").write_text("x")
            raise FULL
        return save(path, *arguments, **keywords)

    monkeypatch.setattr(ocp, "save_checkpointables", failing)


@pytest.mark.slow
def test_a_run_whose_last_save_fails_is_not_finished(tmp_path, monkeypatch):
    full_disk(monkeypatch, range(20, 1000))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(UserError, match=r"the last checkpoint, of step 24, could not be saved: .*No space left"):
        train.train(everything_on(), tmp_path)
    assert not (tmp_path / run_files.SUMMARY).exists()
    monkeypatch.undo()
    train.train(everything_on(), tmp_path)  # there is space again
    assert json.loads((tmp_path / run_files.SUMMARY).read_text())["steps"] == STEPS


def directory_of_images(directory):
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 8)):
        for index in range(count):
            path = directory / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return directory


@pytest.mark.slow
def test_an_image_that_is_lost_during_training_loses_no_step(tmp_path, capsys, monkeypatch):
    """The steps until then are saved; with the image restored the run ends as an undisturbed one does."""
    images = directory_of_images(tmp_path / "images")
    config = everything_on(
        data={"name": "folder", "dir": str(images), "image_size": 8, "validation": None},
        augment={"rotation": 0.0},
        train={"batch_size": 8, "steps": 12, "steps_per_dispatch": 2, "evaluate_every": 0},
        checkpoint={"every": 100},
    )
    config.data.update(train="train", test="test", normalization="half")
    config.data.update(decoded=False, resident="never", workers=1, ahead=1)
    train.train(config, tmp_path / "whole")
    path, assemble = images / "train" / "a" / LOST, setup.assemble

    def assemble_and_lose(*arguments, **options):  # every image has been checked before
        experiment = assemble(*arguments, **options)
        path.rename(tmp_path / LOST)
        return experiment

    monkeypatch.setattr(setup, "assemble", assemble_and_lose)
    with pytest.raises(UserError, match=LOST):
        train.train(config, tmp_path / "run")
    (step,) = CheckpointManager(tmp_path / "run", read_only=True).steps()
    assert 0 < step < 6 and f"step {step} is saved" in capsys.readouterr().out
    monkeypatch.undo()
    (tmp_path / LOST).rename(path)
    train.train(config, tmp_path / "run")
    chex.assert_trees_all_equal(state(tmp_path / "run", 12), state(tmp_path / "whole", 12))


@contextlib.contextmanager
def no_space(monkeypatch):
    """What is appended to files of records cannot be written, after a part of it was."""

    def write_half(file):
        with open(file._path, "ab") as half:
            half.write(file._backlog[:7])
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(records.RecordFile, "_reopen", write_half)
        yield


def test_lines_that_failed_on_a_full_disk_are_written_later(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path, 0, tensorboard=False) as log:
        log.write(1, {"a": 1.0})
        with no_space(monkeypatch):
            assert log.write(2, {"a": 2.0}) == log.write(3, {"a": 3.0}) == log.flush() == os.strerror(errno.ENOSPC)
        assert log.write(4, {"a": 4.0}) is None and log.flush() is None
    assert [(line["step"], line["a"]) for line in read_metrics(tmp_path)] == [(k, float(k)) for k in (1, 2, 3, 4)]


def test_events_that_failed_on_a_full_disk_are_written_later(tmp_path, monkeypatch):
    log = tensorboard.EventFile(tmp_path)
    log.add(1, {"a": 1.0})
    with no_space(monkeypatch):
        for step in range(2, 30):
            with pytest.raises(OSError, match="No space left"):
                log.add(step, {"a": 1.0 * step})
    log.add(30, {"a": 30.0})
    log.close()
    assert shown_steps(tmp_path) == list(range(1, 31))


@pytest.mark.slow
def test_nothing_is_saved_before_its_records(whole, tmp_path, monkeypatch, capsys):
    """A checkpoint of a step whose records are not on the disk would lose them if the run were then killed."""
    fails = iter([None, None, "metrics.jsonl cannot be written: no space"] + [None] * 100)
    monkeypatch.setattr(Log, "flush", lambda log: next(fails))
    train.train(everything_on(), tmp_path)
    assert "warning: checkpoint save failed, will retry: metrics.jsonl cannot be written" in capsys.readouterr().out
    saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == set(range(1, STEPS + 1)) - {3}


def shown_steps(workdir):
    from tensorboardX.proto.event_pb2 import Event

    content = b"".join(path.read_bytes() for path in sorted(workdir.glob("events.out.tfevents.*")))
    found = [Event.FromString(record[12:-4]) for record in tensorboard.records(content)]
    return [event.step for event in found if event.HasField("summary")]


@pytest.mark.parametrize("between", [b"", b"\n", b"\r\n", b"# a note\n", b"\0\0\n", b"[]\n", b"null\n"])
def test_no_record_is_lost_for_a_line_that_is_none(tmp_path, between):
    records = [b'{"step": 10, "train/loss": 1.5}\n', b'{"step": 20, "train/loss": 0.5}\n']
    (tmp_path / "metrics.jsonl").write_bytes(between + records[0] + between + records[1] + b'{"step": 30}\n{"st')
    with MetricsWriter(tmp_path, 20, tensorboard=False):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(records)


def test_tensorboard_events_are_truncated_with_the_lines(tmp_path):
    with MetricsWriter(tmp_path, 0, tensorboard=True) as log:
        for step in (10, 20, 30):
            log.write(step, {"train/loss": 1 / step})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    path.write_bytes(path.read_bytes()[:-3])  # killed in the middle of the last one
    os.rename(path, path.with_name("events.out.tfevents.1.host"))
    with MetricsWriter(tmp_path, 10, tensorboard=True) as log:
        log.write(20, {"train/loss": 0.5})
    assert shown_steps(tmp_path) == [10, 20]


@pytest.mark.slow
def test_the_remains_of_a_killed_save_are_removed(whole, tmp_path):
    as_if_killed_after(whole, tmp_path / "run", 5)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (checkpoints / "removing-4").mkdir()
    (checkpoints / "my notes").mkdir()
    with CheckpointManager(tmp_path / "run") as opened:
        assert opened.steps() == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2", "3", "4", "5", "my notes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ünïcödé 工作", "~"])
def test_run_directories_of_any_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train(everything_on(train={"steps": 1}), type(tmp_path)(name))  # relative
    assert (tmp_path / name / run_files.SUMMARY).exists()
    assert np.isfinite(state(tmp_path / name, 1)["parameters"]["class_token"]).all()


@pytest.mark.slow
def test_a_signal_in_a_repeated_last_evaluation_is_a_request(tmp_path, monkeypatch):
    """A run that was stopped in its last evaluation has something to save again: a signal must not end it at once."""
    from vit_jax.training.run import Run

    config = everything_on(train={"steps": 6})
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_requested", lambda run: run.step == 6)
        assert train.train(config, tmp_path) is None
    evaluate, seen = Run.evaluate, []

    def evaluate_and_look(run, role):
        seen.append(run.stop.exit_on_signal)
        return evaluate(run, role)

    monkeypatch.setattr(Run, "evaluate", evaluate_and_look)
    assert train.train(config, tmp_path)["steps"] == 6
    assert seen and not any(seen)
