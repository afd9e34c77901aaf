"""Going on: from any step, on other devices, with another config, on a disk that was full."""

import errno
import json
import os
import shutil

import chex
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import Checkpoints
from vit_jax.errors import UserError
from vit_jax.training import setup, tensorboard, train
from vit_jax.training.metrics import MetricsWriter

STEPS = 24
LOST = "20.png"
# With VIT_JAX_TEST_THOROUGH=1 all of them; in CI a part, for its time.
THOROUGH = bool(os.environ.get("VIT_JAX_TEST_THOROUGH"))


def everything_on(**sections):
    """A small run in which all that could carry over from step to step does."""
    config = options.default()
    config.model.update(variant="Ti/4", width=16, depth=1, heads=2, mlp_width=16, dropout=0.1, stochastic_depth=0.1)
    config.model.stochastic_depth_schedule = "constant"
    config.augment.update(rotation=5.0, mixup=0.3)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=5, average_decay=0.9, gradient_clip=1.0, weight_decay=0.1)
    config.data.update(train="train[:400]", validation="train[400:500]", test="test[:64]")
    config.train.update(batch_size=64, steps=STEPS, accumulation=2, evaluate_every=8, label_smoothing=0.1)
    config.checkpoint.update(every=1, keep=STEPS)
    config.log.update(every=3, tensorboard=False)
    config.mesh.devices = 1
    for section, values in sections.items():
        config[section].update(values)
    options.check(config)
    return config


def lines(folder):
    """metrics.jsonl without what the clock says."""
    found = [json.loads(line) for line in (folder / run_files.METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in found]


def state(folder, step=STEPS):
    return ocp.load_checkpointables(folder / "checkpoints" / str(step))["state"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train.train(everything_on(), folder)
    return folder


def as_if_killed_behind(whole, folder, step):
    """The folder of a run that has saved that step and has died some steps later."""
    shutil.copytree(whole, folder)
    (folder / run_files.SUMMARY).unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def goes_on_exactly(whole, folder, step):
    as_if_killed_behind(whole, folder, step)
    train.train(everything_on(), folder)
    chex.assert_trees_all_equal(state(folder), state(whole))
    assert lines(folder) == lines(whole)


@pytest.mark.parametrize("step", [7])
def test_it_goes_on_exactly(whole, tmp_path, step):
    goes_on_exactly(whole, tmp_path / "run", step)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 21) if THOROUGH else (1, 8, 13, 20))
def test_it_goes_on_exactly_from_every_step(whole, tmp_path, step):
    goes_on_exactly(whole, tmp_path / "run", step)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_goes_on_with_other_numbers_of_devices(tmp_path, dtype):
    """1 -> 2 -> 4 -> 1, eight steps each, beside one device all the way."""
    # No mixup, which takes its partner from the other end of each device's own order of work.
    common = {"model": {"dtype": dtype}, "optimizer": {"average_decay": 0.0}, "checkpoint": {"every": 6}}
    train.train(everything_on(**common), tmp_path / "one")
    for devices, minutes in ((1, 6), (2, 12), (4, 18), (1, STEPS)):
        config = everything_on(**common, mesh={"devices": devices})
        with pytest.MonkeyPatch.context() as patch:
            stop_behind(patch, minutes)
            train.train(config, tmp_path / "many")
    one, many = lines(tmp_path / "one"), lines(tmp_path / "many")
    assert [line["step"] for line in one] == [line["step"] for line in many]
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    losses = [[line["train/loss"] for line in found if "train/loss" in line] for found in (one, many)]
    assert len(losses[0]) == STEPS / 3
    np.testing.assert_allclose(*losses, atol=tolerance)


def stop_behind(patch, step):
    """The run is asked to stop once it has made so many steps."""
    from vit_jax.training.trainer import Trainer

    patch.setattr(Trainer, "_asked_to_stop", lambda self: self.step >= step < self.run.steps)


@pytest.mark.slow
def test_an_evaluation_that_was_interrupted_is_made_up_for(whole, tmp_path):
    """Asked to stop at step 8 in the middle of its evaluation: the line of step 8 is written when the run goes on."""
    with pytest.MonkeyPatch.context() as patch:
        stop_behind(patch, 8)
        assert train.train(everything_on(), tmp_path) is None
    assert [line["step"] for line in lines(tmp_path)] == [3, 6]
    train.train(everything_on(), tmp_path)
    assert lines(tmp_path) == lines(whole)
    chex.assert_trees_all_equal(state(tmp_path), state(whole))
    with Checkpoints(tmp_path, read_only=True) as mine, Checkpoints(whole, read_only=True) as theirs:
        assert mine.score(8) == theirs.score(8) is not None
        assert mine.best() == theirs.best()


@pytest.mark.slow
def test_a_run_stops_after_the_minutes_it_was_given(tmp_path, capsys):
    assert train.train(everything_on(train={"max_minutes": 0.0}), tmp_path) is None
    assert "stopped at step 0 of 24 (train.max_minutes is 0); saved in" in capsys.readouterr().out
    assert train.train(everything_on(), tmp_path)["steps"] == STEPS


@pytest.mark.slow
def test_another_length_and_rate_are_taken_told_of_and_recorded(whole, tmp_path, capsys):
    as_if_killed_behind(whole, tmp_path / "run", 10)
    train.train(everything_on(optimizer={"learning_rate": 5e-3}, train={"steps": 30}), tmp_path / "run")
    shown = capsys.readouterr().out
    assert "optimizer.learning_rate: 0.01 -> 0.005; train.steps: 24 -> 30" in shown
    (change,) = (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    assert json.loads(change)["changes"] == ["optimizer.learning_rate: 0.01 -> 0.005", "train.steps: 24 -> 30"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 30
    assert [line["step"] for line in lines(tmp_path / "run")][-1] == 30


@pytest.mark.slow
def test_a_finished_run_is_lengthened_but_not_shortened(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match=r"has made 24 steps, and config\.train asks for 20"):
        train.train(everything_on(train={"steps": 20}), tmp_path / "run")
    assert train.train(everything_on(train={"steps": 26}), tmp_path / "run")["steps"] == 26


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
def test_another_model_is_refused_with_what_differs(whole, sections, row):
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file())
    with pytest.raises(UserError, match=f"differs: {row}"):
        train.train(everything_on(**sections), whole)
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.rglob("*") if path.is_file()) == before


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("first, count", [(2, 3), *((n, 5) for n in (range(1, 20) if THOROUGH else (1, 19)))])
def test_a_full_disk_costs_no_more_than_the_saves_it_interrupts(whole, tmp_path, capsys, monkeypatch, first, count):
    """Saves number `first` and those behind it fail; later ones work."""
    full_disk(monkeypatch, range(first, first + count))
    train.train(everything_on(), tmp_path)
    shown = capsys.readouterr().out
    assert "warning: a save did not land: " in shown and "No space left on device" in shown
    assert lines(tmp_path) == lines(whole)
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept >= set(range(first + count, STEPS + 1)) and len(set(range(1, STEPS + 1)) - kept) <= count
    chex.assert_trees_all_equal(state(tmp_path), state(whole))


def full_disk(monkeypatch, numbers):
    save, calls = ocp.save_checkpointables, []

    def failing(path, *arguments, **keywords):
        calls.append(path)
        if len(calls) in numbers:
            path.mkdir(parents=True, exist_ok=True)  # what is there of a half-written one
            (path / "half").write_text("x")
            raise FULL
        return save(path, *arguments, **keywords)

    monkeypatch.setattr(ocp, "save_checkpointables", failing)


@pytest.mark.slow
def test_a_last_save_that_never_lands_is_no_success(tmp_path, monkeypatch):
    full_disk(monkeypatch, range(20, 1000))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(UserError, match=r"the last save, of step 24, did not land: .*No space left on device"):
        train.train(everything_on(), tmp_path)
    assert not (tmp_path / run_files.SUMMARY).exists()
    monkeypatch.undo()
    train.train(everything_on(), tmp_path)  # there is room again
    assert json.loads((tmp_path / run_files.SUMMARY).read_text())["steps"] == STEPS


def folder_of_images(folder):
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 8)):
        for number in range(count):
            path = folder / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return folder


@pytest.mark.slow
def test_an_image_that_is_lost_on_the_way_costs_no_step(tmp_path, capsys, monkeypatch):
    """What was trained until then is saved; with the image back the run ends as if it had never been gone."""
    images = folder_of_images(tmp_path / "images")
    config = everything_on(
        data={"name": "folder", "dir": str(images), "image_size": 8, "validation": None},
        augment={"rotation": 0.0},
        train={"batch_size": 8, "steps": 12, "steps_per_dispatch": 2, "evaluate_every": 0},
        checkpoint={"every": 100},
    )
    config.data.update(train="train", test="test", normalization="half")
    config.data.update(decoded=False, resident="never", workers=1, ahead=1)
    train.train(config, tmp_path / "whole")
    path, build = images / "train" / "a" / LOST, setup.build

    def built(*arguments, **named):  # every image was looked at by now
        made = build(*arguments, **named)
        path.rename(tmp_path / LOST)
        return made

    monkeypatch.setattr(setup, "build", built)
    with pytest.raises(UserError, match=LOST):
        train.train(config, tmp_path / "run")
    (step,) = Checkpoints(tmp_path / "run", read_only=True).steps()
    assert 0 < step < 6 and f"step {step} is saved" in capsys.readouterr().out
    monkeypatch.undo()
    (tmp_path / LOST).rename(path)
    train.train(config, tmp_path / "run")
    chex.assert_trees_all_equal(state(tmp_path / "run", 12), state(tmp_path / "whole", 12))


def test_lines_that_met_a_full_disk_are_written_later(tmp_path):
    with MetricsWriter(tmp_path, 0, tensorboard=False) as log:
        log.write(1, {"a": 1.0})
        log._file.close()
        log._file = open("/dev/full", "a")  # noqa: SIM115
        assert log.write(2, {"a": 2.0}) is not None
        assert log.write(3, {"a": 3.0}) is None
    assert [(line["step"], line["a"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0)]


class FullFile:
    """A file on a disk that is full."""

    def truncate(self, size):
        pass

    seek = truncate

    def write(self, content):
        raise FULL


def test_events_that_met_a_full_disk_are_written_later(tmp_path):
    log = tensorboard.EventFile(tmp_path)
    log.add(1, {"a": 1.0})
    good, log._file = log._file, FullFile()
    for step in range(2, 30):
        with pytest.raises(OSError, match="No space left"):
            log.add(step, {"a": 1.0 * step})
    log._file = good
    log.add(30, {"a": 30.0})
    log.close()
    assert shown_steps(tmp_path) == list(range(1, 31))


def shown_steps(folder):
    from tensorboardX.proto.event_pb2 import Event

    content = b"".join(path.read_bytes() for path in sorted(folder.glob("events.out.tfevents.*")))
    found = [Event.FromString(record[12:-4]) for record in tensorboard.records(content)]
    return [event.step for event in found if event.HasField("summary")]


def test_tensorboard_events_are_cut_back_with_the_lines(tmp_path):
    with MetricsWriter(tmp_path, 0, tensorboard=True) as log:
        for step in (10, 20, 30):
            log.write(step, {"train/loss": 1 / step})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    path.write_bytes(path.read_bytes()[:-3])  # killed in the middle of the last one
    os.rename(path, path.with_name("events.out.tfevents.1.host"))
    with MetricsWriter(tmp_path, 10, tensorboard=True) as log:
        log.write(20, {"train/loss": 0.5})
    assert shown_steps(tmp_path) == [10, 20]


def test_leftovers_of_a_kill_inside_a_save_are_swept(whole, tmp_path):
    as_if_killed_behind(whole, tmp_path / "run", 5)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (checkpoints / "removing-4").mkdir()
    (checkpoints / "my notes").mkdir()
    with Checkpoints(tmp_path / "run") as opened:
        assert opened.steps() == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2", "3", "4", "5", "my notes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ünïcödé 工作", "~"])
def test_workdirs_of_any_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train(everything_on(train={"steps": 1}), type(tmp_path)(name))  # relative
    assert (tmp_path / name / run_files.SUMMARY).exists()
    assert np.isfinite(state(tmp_path / name, 1)["parameters"]["class_token"]).all()
