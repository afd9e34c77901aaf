"""The configs as they are used: what they say, and a run of each on images that stand in for theirs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import commands, evaluate, optim, weights
from vit_jax import config as options
from vit_jax.checkpoint import manager
from vit_jax.errors import UserError
from vit_jax.models.variants import fields_of_options
from vit_jax.training import build_model, state, train

ROOT = Path(__file__).resolve().parents[1]


def saved_run(folder, classes=10, image_size=8, channels=1, **sections):
    """A workdir with a checkpoint of a tiny model at random, its head not zero."""
    config = options.default()
    config.model.update(variant="Ti/4", width=16, depth=2, heads=2, mlp_width=24, pre_logits=8)
    for section, values in sections.items():
        config[section].update(values)
    made = build_model.build(config.model, classes=classes, dtype="float32")
    parameters = state.initialize(made, (image_size, image_size, channels), 3)
    parameters["head"] = jax.tree.map(lambda leaf: leaf + 0.1, parameters["head"])
    one = state.create(parameters, optim.make(config.optimizer, 1), False, ("loss",))
    with manager.Checkpoints(folder) as checkpoints:
        checkpoints.save(one, {"config": config.to_dict(), "seconds": 0.0})
    return made, parameters


# --- what the configs say -------------------------------------------------------------------------------------------

TABLE_4 = {
    "cifar10": (10_000, 500),
    "cifar100": (10_000, 500),
    "oxford_iiit_pet": (500, 50),
    "oxford_flowers102": (500, 50),
    "imagenet2012": (20_000, 500),
    "folder": (500, 50),
}


@pytest.mark.parametrize("name", TABLE_4)
def test_fine_tuning_is_table_4(name):
    config = options.load(f"configs/finetune.py:{name}")
    rule = config.optimizer
    assert (config.train.steps, rule.warmup_steps) == TABLE_4[name]
    assert (rule.name, rule.momentum, rule.schedule, rule.final_learning_rate) == ("sgd", 0.9, "cosine", 0.0)
    assert (rule.weight_decay, rule.gradient_clip, rule.layer_decay) == (0.0, 1.0, 1.0)
    assert (config.train.batch_size, config.data.image_size, config.data.name) == (512, 384, name)
    assert config.checkpoint.init_head == "new" and rule.trained is None
    assert rule.average_decay == (0.9999 if name == "imagenet2012" else 0.0)


def test_words_behind_the_set_are_combined():
    config = options.load("configs/finetune.py:cifar100,probe,short")
    assert (config.train.steps, config.optimizer.warmup_steps, config.optimizer.trained) == (500, 50, "head/*")
    config = options.load("configs/finetune.py:cifar10,adamw,cpu")
    rule = config.optimizer
    assert (rule.name, rule.layer_decay, rule.gradient_clip, rule.weight_decay) == ("adamw", 0.75, None, 0.05)
    assert (config.data.image_size, config.train.batch_size, config.train.steps) == (48, 128, 500)


@pytest.mark.parametrize("argument", ["", "mnist", "cifar10,tiny", "short", "cifar10,short,short", "cifar10,"])
def test_other_words_are_refused(argument):
    with pytest.raises(UserError, match=r"no such argument\n  allowed: a set \(cifar10, .*\n.*short, cpu, probe"):
        options.load(f"configs/finetune.py:{argument}")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_sizes_and_lengths_of_cifar_are_combined(name):
    plain, long = (options.load(f"configs/{name}.py{rest}") for rest in ("", ":S,long"))
    assert options.differences(plain.to_dict(), long.to_dict()) == [
        "model.depth: 9 -> None",
        "model.heads: 12 -> None",
        "model.mlp_width: 384 -> None",
        "model.qkv_bias: False -> True",
        "model.variant: Ti/4 -> S/4",
        "train.epochs: 300.0 -> 1000.0",
    ]
    cpu, small = (options.load(f"configs/{name}.py:{rest}") for rest in ("cpu", "cpu,Ti"))
    sizes = {f"model.{key}: {value} -> None" for key, value in cpu.model.items() if small.model[key] != value}
    assert set(options.differences(cpu.to_dict(), small.to_dict())) == sizes
    assert fields_of_options(small.model.to_dict())["width"] == 192
    assert cpu.data.name == plain.data.name == name


def test_the_recipe_of_two_cores_is_the_one_that_was_measured():
    config = options.load("configs/cifar10.py:cpu")
    wanted = options.default()
    wanted.data.name = "cifar10"
    wanted.model.update(variant="Ti/4", width=128, depth=4, heads=2, mlp_width=256, pooling="mean")
    wanted.model.position = "sincos_2d"
    wanted.augment.update(crop_padding=2, flip=True)
    wanted.optimizer.update(learning_rate=2e-3, warmup_steps=200, weight_decay=0.05, gradient_clip=1.0)
    wanted.train.update(batch_size=128, steps=2000, evaluate_every=500, evaluation_batch_size=250)
    wanted.checkpoint.every = 500
    assert options.differences(wanted.to_dict(), config.to_dict()) == []


# --- starting from parameters that there are ------------------------------------------------------------------------


def test_without_parameters_to_start_from_it_says_so():
    with pytest.raises(UserError, match=r"config.checkpoint.init_from is None.*\n.*--config.checkpoint.init_from=PATH"):
        commands.make_config("configs/finetune.py:cifar10", [])
    with pytest.raises(UserError, match=r"none\.npz: there is no such file"):
        commands.make_config("configs/finetune.py:cifar10", ["checkpoint.init_from=none.npz"])


@pytest.mark.slow
def test_the_model_and_the_normalisation_are_those_of_the_run_to_start_from(tmp_path):
    fields = {"pooling": "mean", "gelu": "exact", "position": "sincos_2d", "qkv_bias": False}
    made, _ = saved_run(tmp_path, model=fields)
    given = [f"checkpoint.init_from={tmp_path}", "model.stochastic_depth=0.2"]
    config = commands.make_config("configs/finetune.py:cifar10", given)
    found = build_model.build(config.model, classes=10, dtype="float32")
    assert found == made.clone(stochastic_depth=0.2, pre_logits=None)
    assert config.data.normalization == "set"
    assert config.model.position_grid is None  # what images the run had, nothing says
    (tmp_path / "data.json").write_text('{"image_shape": [8, 8, 1]}')
    assert commands.make_config("configs/finetune.py:cifar10", given).model.position_grid == 8 // made.patch_size
    assert options.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_the_model_of_a_published_file(goldens):
    given = [f"checkpoint.init_from={goldens / 'params_token.npz'}"]
    config = commands.make_config("configs/finetune.py:cifar10", given)
    wanted = {"variant": "Ti/4", "width": 96, "depth": 2, "heads": None, "mlp_width": 192, "pooling": "token"}
    assert {name: config.model[name] for name in wanted} == wanted
    assert config.data.normalization == "half"


def fine_tuned(config, folder, **sections):
    """A short run on the digits, with most that is not of interest left out."""
    config.update({"data": {"name": "digits"}, "log": {"tensorboard": False}, "mesh": {"devices": 1}})
    for section, values in sections.items():
        config[section].update(values)
    options.check(config)
    return train.train(config, folder)


@pytest.mark.slow
def test_fine_tuning_begins_with_a_head_of_zeros_and_without_what_stood_before_it(tmp_path, capsys):
    """At a rate of 0, what is saved is what was loaded: all of the old model but its head, positions resampled."""
    _, before = saved_run(tmp_path / "old")
    config = commands.make_config("configs/finetune.py:cifar10", [f"checkpoint.init_from={tmp_path / 'old'}"])
    small = {"train": {"batch_size": 16, "steps": 1}, "data": {"image_size": 12}, "optimizer": {"learning_rate": 0.0}}
    summary = fine_tuned(config, tmp_path / "new", **small)
    shown = capsys.readouterr().out
    assert "grid 2x2 -> 3x3" in shown and "a new head is asked for" in shown and "head/pre_logits/kernel" in shown
    _, after, _ = weights.load(tmp_path / "new")
    assert set(after["head"]) == {"logits"} and not any(leaf.any() for leaf in jax.tree.leaves(after["head"]))
    jax.tree.map(np.testing.assert_array_equal, after["encoder"], jax.device_get(before["encoder"]))
    assert after["positions"]["table"].shape == (1, 10, 16)
    assert summary["test/loss"] == pytest.approx(np.log(10), abs=1e-5)  # equal logits


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Digits at 8 pixels, learned in some hundred steps: the folder, and the test accuracy.

    Its patches are pixels, which are the same at any resolution: what resampling leaves is seen by itself.
    """
    folder = tmp_path_factory.mktemp("learned")
    config = options.load("configs/digits.py")
    config.model.update(variant="Ti/1", width=32, depth=2, heads=2, mlp_width=64, position="learned", dropout=0.0)
    config.augment.update(mixup=0.0, rotation=0.0, scaling=0.0)
    config.augment.update(resized_crop=True, min_crop_area=0.5, crop_ratio=1.1)
    config.optimizer.update(learning_rate=4e-3, warmup_steps=50, weight_decay=0.1, average_decay=0.0)
    config.train.update(epochs=None, steps=600, evaluate_every=0, label_smoothing=0.0)
    return folder, fine_tuned(config, folder)["test/accuracy"]


@pytest.mark.slow
def test_at_a_higher_resolution_it_is_as_good_at_once_and_better_in_the_end(learned, tmp_path):
    """8 -> 12 pixels: no worse than two points below before the first step, above behind the last."""
    folder, lower = learned
    assert lower > 0.4

    def at_12(name, head, steps, rate):
        config = commands.make_config("configs/finetune.py:cifar10", [f"checkpoint.init_from={folder}"])
        sections = {
            "data": {"image_size": 12},
            "checkpoint": {"init_head": head, "every": 0},
            "optimizer": {"learning_rate": rate, "warmup_steps": 20},
            "train": {"batch_size": 64, "steps": steps},
            "augment": {"min_crop_area": 0.8, "flip": False},
        }
        return fine_tuned(config, tmp_path / name, **sections)["test/accuracy"]

    assert at_12("before", "keep", 1, 0.0) >= lower - 0.02
    assert at_12("after", "keep", 300, 0.01) > lower


@pytest.mark.slow
def test_an_average_is_scored_and_started_from(learned, tmp_path, capsys):
    """The mean of one checkpoint is that checkpoint; a head of other classes is not taken for the run's."""
    from vit_jax import checkpoints

    folder, accuracy = learned
    file = tmp_path / "mean.safetensors"
    assert checkpoints.main(["average", str(folder), "--last=1", f"--out={file}"]) == 0
    capsys.readouterr()
    assert evaluate.main([f"--workdir={folder}", f"--weights={file}"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert (scored["test/accuracy"], scored["weights"], scored["test/examples"]) == (accuracy, str(file), 360)
    config = commands.make_config("configs/finetune.py:cifar10", [f"checkpoint.init_from={file}"])
    kept = {"checkpoint": {"init_head": "keep"}, "optimizer": {"learning_rate": 0.0}}
    same = fine_tuned(config, tmp_path / "run", data={"image_size": 8}, train={"steps": 1, "batch_size": 8}, **kept)
    assert same["test/accuracy"] == accuracy
    saved_run(tmp_path / "other", classes=2, model={"variant": "Ti/2", "width": 32, "heads": 2, "mlp_width": 64})
    assert evaluate.main([f"--workdir={folder}", f"--weights={tmp_path / 'other'}"]) == 2
    error = capsys.readouterr().err
    assert "head/logits" in error or "another than" in error


# --- every config, on images that stand in for its own --------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Noise of 32x32 in colour, of which each of ten classes has its own mean; and a tiny model for it, untrained."""
    folder = tmp_path_factory.mktemp("stand-in")
    generator = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 40)):
        labels = np.arange(count) % 10
        images = generator.integers(0, 120, (count, 32, 32, 3)) + 12 * labels[:, None, None, None]
        np.savez(folder / f"{split}.npz", images=images.astype(np.uint8), labels=labels)
    saved_run(folder / "model", image_size=32, channels=3, model={"variant": "Ti/16"})
    return folder


SCRATCH = [f"{name}.py{rest}" for name in ("cifar10", "cifar100") for rest in ("", ":cpu", ":lite,short", ":S,long")]
TUNED = [*(f"finetune.py:{name}" for name in TABLE_4), *(f"finetune.py:cifar10,{w}" for w in ("short", "cpu"))]
TUNED += ["finetune.py:cifar100,probe", "finetune.py:oxford_iiit_pet,adamw"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*SCRATCH, *TUNED])
def test_every_config_trains_and_scores(spec, stand_in, tmp_path):
    """A hundredth of its steps, or less: with a tiny model, on few small images, but else as it is."""
    given = [f"data.dir={stand_in}", "data.name=arrays", "data.test=test", f"data.cache_dir={tmp_path / 'cache'}"]
    given += ["mesh.devices=1", "log.tensorboard=False", "train.epochs=None", "train.batch_size=8"]
    given += ["train.evaluation_batch_size=8", "train.evaluate_every=0"]
    if spec in TUNED:
        given += [f"checkpoint.init_from={stand_in / 'model'}"]
        given += [] if "cpu" in spec else ["data.image_size=64"]
    else:
        given += ["model.width=16", "model.depth=1", "model.heads=2", "model.mlp_width=16"]
    steps = options.load(f"configs/{spec}").train.steps or 300
    config = commands.make_config(f"configs/{spec}", [*given, f"train.steps={min(steps // 100, 5)}"])
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
    summary = train.train(config, tmp_path / "run")
    assert summary["test/examples"] == 40 and np.isfinite(summary["test/loss"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == config.train.steps and np.isfinite(lines[-1]["train/loss"])


# --- a sweep as a user runs it --------------------------------------------------------------------------------------

SWEEP = [
    *("--config=configs/digits.py", "--rates=.0001,.01", "--held_out=10", "--config.model.width=16"),
    *("--config.model.depth=1", "--config.model.heads=2", "--config.model.mlp_width=16"),
    *("--config.train.epochs=None", "--config.train.steps=120", "--config.optimizer.warmup_steps=10"),
    *("--config.train.evaluate_every=0", "--config.checkpoint.every=20", "--config.log.every=10"),
]


@pytest.mark.slow
def test_a_sweep_is_stopped_by_a_signal_and_goes_on(tmp_path):
    """Stopped in its second run: exit status 0; the same command ends it, and repeats nothing."""
    command = [sys.executable, "-u", "-m", "vit_jax.sweep", *SWEEP, f"--workdir={tmp_path}"]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": environment}
    process, metrics = subprocess.Popen(command, **pipes), tmp_path / "rate-0.01" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first = (tmp_path / "rate-0.0001" / "metrics.jsonl").read_bytes()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "rate-0.0001" / "metrics.jsonl").read_bytes() == first
    content = json.loads((tmp_path / "sweep.json").read_text())
    accuracies = [trial["validation/accuracy"] for trial in content["trials"]]
    assert content["best"] == 0.01 and accuracies[1] > accuracies[0]
    assert [trial["validation/examples"] for trial in content["trials"]] == [144, 144]
    assert content["final"]["test/examples"] == 360
    for folder in ("rate-0.0001", "rate-0.01"):
        assert "test/" not in (tmp_path / folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in (tmp_path / "final-0.01" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "test/accuracy" in line] == [120]
    assert (tmp_path / "sweep.md").read_text() in done.stdout
    assert (tmp_path / "sweep.png").stat().st_size > 1000
