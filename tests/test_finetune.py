"""The config files: their options, and a short run of each on synthetic images instead of its dataset."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from helpers import (
    THOROUGH,
    finish,
    flags,
    num_records,
    read_metrics,
    run_command,
    start_command,
    tiny_config,
    wait_until,
)

from vit_jax import commands, convert, evaluate, inference, weights
from vit_jax import config as options
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config.check import check_config
from vit_jax.data import normalization
from vit_jax.errors import UserError
from vit_jax.models.variants import fields_of_options
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import build_model, setup, train


def saved_run(workdir, classes=10, image_size=8, channels=1, model=None):
    """A run directory with a checkpoint of a tiny model with random parameters, its head not zero."""
    config = tiny_config(model={"depth": 2, "mlp_width": 24, "pre_logits": 8} | (model or {}))
    built = build_model.build(config.model, classes=classes, dtype="float32")
    parameters = setup.init_parameters(built, (image_size, image_size, channels), 3)
    parameters["head"] = jax.tree.map(lambda leaf: leaf + 0.1, parameters["head"])
    with CheckpointManager(workdir) as checkpoints:
        arrays = {"step": np.int32(0), "parameters": parameters}
        checkpoints.save(arrays, {"config": config.to_dict(), "seconds": 0.0})
    return built, parameters


# --- options of the config files -------------------------------------------------------------------------------------

TABLE_4 = {
    "cifar10": (10_000, 500),
    "cifar100": (10_000, 500),
    "oxford_iiit_pet": (500, 50),
    "oxford_flowers102": (500, 50),
    "imagenet2012": (20_000, 500),
    "folder": (500, 50),
}


@pytest.mark.parametrize("name", TABLE_4)
def test_fine_tuning_uses_the_values_of_table_4(name):
    config = options.load(f"configs/finetune.py:{name}")
    optimizer = config.optimizer
    assert (config.train.steps, optimizer.warmup_steps) == TABLE_4[name]
    assert (optimizer.name, optimizer.momentum) == ("sgd", 0.9)
    assert (optimizer.schedule, optimizer.final_learning_rate) == ("cosine", 0.0)
    assert (optimizer.weight_decay, optimizer.gradient_clip, optimizer.layer_decay) == (0.0, 1.0, 1.0)
    assert (config.train.batch_size, config.data.image_size, config.data.name) == (512, 384, name)
    assert config.checkpoint.init_head == "new" and optimizer.trained is None
    assert optimizer.average_decay == (0.9999 if name == "imagenet2012" else 0.0)


def test_arguments_after_the_data_set_are_combined():
    config = options.load("configs/finetune.py:cifar100,probe,short")
    assert (config.train.steps, config.optimizer.warmup_steps, config.optimizer.trained) == (500, 50, ("head/*",))
    config = options.load("configs/finetune.py:cifar10,adamw,cpu")
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.layer_decay) == ("adamw", 0.75)
    assert (optimizer.gradient_clip, optimizer.weight_decay) == (None, 0.05)
    assert (config.data.image_size, config.train.batch_size, config.train.steps) == (48, 128, 500)


@pytest.mark.parametrize("argument", ["", "mnist", "cifar10,tiny", "short", "cifar10,short,short", "cifar10,"])
def test_unknown_arguments_are_refused(argument):
    with pytest.raises(UserError, match=r"unknown argument\n  allowed: a dataset \(cifar10, .*\n.*short, cpu, probe"):
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


def test_the_recipe_for_two_cores_is_the_measured_one():
    config = options.load("configs/cifar10.py:cpu")
    expected = options.default()
    expected.data.name = "cifar10"
    expected.model.update(variant="Ti/4", width=128, depth=4, heads=2, mlp_width=256, pooling="mean")
    expected.model.position = "sincos_2d"
    expected.augment.update(crop_padding=2, flip=True)
    expected.optimizer.update(learning_rate=2e-3, warmup_steps=200, weight_decay=0.05, gradient_clip=1.0)
    expected.train.update(batch_size=128, steps=2000, evaluate_every=500, evaluation_batch_size=250)
    expected.checkpoint.every = 500
    assert options.differences(expected.to_dict(), config.to_dict()) == []


# --- starting from existing parameters -------------------------------------------------------------------------------


def test_fine_tuning_needs_parameters_to_start_from():
    with pytest.raises(UserError, match=r"config.checkpoint.init_from is None.*\n.*--config.checkpoint.init_from=PATH"):
        commands.make_config("configs/finetune.py:cifar10", [])
    with pytest.raises(UserError, match=r"none\.npz: there is no such file"):
        commands.make_config("configs/finetune.py:cifar10", ["checkpoint.init_from=none.npz"])


@pytest.mark.slow
def test_model_and_normalization_come_from_the_run_to_start_from(tmp_path):
    fields = {"pooling": "mean", "gelu": "exact", "position": "sincos_2d", "qkv_bias": False}
    built, _ = saved_run(tmp_path, model=fields)
    overrides = [f"checkpoint.init_from={tmp_path}", "model.stochastic_depth=0.2"]
    config = commands.make_config("configs/finetune.py:cifar10", overrides)
    found = build_model.build(config.model, classes=10, dtype="float32")
    assert found == built.clone(stochastic_depth=0.2, pre_logits=None)
    assert config.data.normalization == "set"
    assert config.model.position_grid is None  # the image size of the run is not known yet
    (tmp_path / "data.json").write_text(
        '{"set": "digits", "image_shape": [8, 8, 1], "mean": [0.5], "std": [0.5], "classes": {}}'
    )
    assert commands.make_config("configs/finetune.py:cifar10", overrides).model.position_grid == 8 // built.patch_size
    assert options.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_the_model_of_a_published_file(goldens):
    overrides = [f"checkpoint.init_from={goldens / 'params_token.npz'}"]
    config = commands.make_config("configs/finetune.py:cifar10", overrides)
    expected = {"variant": "Ti/4", "width": 96, "depth": 2, "heads": None, "mlp_width": 192, "pooling": "token"}
    assert {name: config.model[name] for name in expected} == expected
    assert config.data.normalization == "half"


def file_with(path, statistics, channels=1):
    """A weights file of a tiny model that records the mean and std of its images; the path."""
    fields = {"classes": 3, "patch_size": 4, "width": 12, "depth": 1, "heads": 3, "mlp_width": 24}
    model = VisionTransformer(**fields)
    parameters = setup.init_parameters(model, (8, 8, channels), 0)
    weights.save(path, model, parameters, 8, channels, statistics=statistics)
    return path


@pytest.mark.slow
def test_any_mean_and_std_of_a_file_is_taken(tmp_path):
    """Those of CLIP by their name, others as numbers, which config.json keeps."""
    clip, others = normalization.RED_GREEN_BLUE["clip"], ((0.1, 0.2, 0.25), (0.3, 0.2, 1.0))
    file = file_with(tmp_path / "model.safetensors", others, channels=3)
    record = json.loads((tmp_path / "config.json").read_text())
    for name, statistics in {"0.1,0.2,0.25/0.3,0.2,1.0": others, "clip": clip}.items():
        record["pretrained_cfg"] |= {"mean": statistics[0], "std": statistics[1]}
        (tmp_path / "config.json").write_text(json.dumps(record))
        config = commands.make_config("configs/finetune.py:cifar10", [f"checkpoint.init_from={file}"])
        assert config.data.normalization == name
        again = options.from_dict(json.loads(json.dumps(config.to_dict())))
        assert normalization.constants(again.data.normalization, 3) == statistics


def fine_tuned(config, workdir, **sections):
    """The summary of a short run on the digits."""
    config.update({"data": {"name": "digits"}, "log": {"tensorboard": False}, "mesh": {"devices": 1}})
    for section, values in sections.items():
        config[section].update(values)
    check_config(config)
    return train.train(config, workdir)


@pytest.mark.slow
def test_fine_tuning_begins_with_a_head_of_zeros_and_without_the_pre_logits(tmp_path, capsys):
    """With learning rate 0, a run saves what it loaded: the old model without its head, positions resampled."""
    _, before = saved_run(tmp_path / "old")
    config = commands.make_config("configs/finetune.py:cifar10", [f"checkpoint.init_from={tmp_path / 'old'}"])
    small = {"train": {"batch_size": 16, "steps": 1}, "data": {"image_size": 12}, "optimizer": {"learning_rate": 0.0}}
    summary = fine_tuned(config, tmp_path / "new", **small)
    shown = capsys.readouterr().out
    assert "grid 2x2 -> 3x3" in shown and "a new head was requested" in shown and "head/pre_logits/bias" in shown
    _, after, _ = weights.load(tmp_path / "new")
    assert set(after["head"]) == {"logits"} and not any(leaf.any() for leaf in jax.tree.leaves(after["head"]))
    jax.tree.map(np.testing.assert_array_equal, after["encoder"], jax.device_get(before["encoder"]))
    assert after["positions"]["table"].shape == (1, 10, 16)
    assert summary["test/loss"] == pytest.approx(np.log(10), abs=1e-5)  # equal logits


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run directory of digits at 8 pixels, trained for a few hundred steps, and its test accuracy.

    Its patches are single pixels, which look the same at any resolution: the effect of resampling is seen alone.
    """
    workdir = tmp_path_factory.mktemp("learned")
    config = options.load("configs/digits.py")
    config.model.update(variant="Ti/1", width=32, depth=2, heads=2, mlp_width=64, position="learned", dropout=0.0)
    config.augment.update(mixup=0.0, rotation=0.0, scaling=0.0)
    config.augment.update(resized_crop=True, min_crop_area=0.5, crop_ratio=1.1)
    config.optimizer.update(learning_rate=4e-3, warmup_steps=50, weight_decay=0.1, average_decay=0.0)
    config.train.update(epochs=None, steps=600, evaluate_every=0, label_smoothing=0.0)
    return workdir, fine_tuned(config, workdir)["test/accuracy"]


@pytest.mark.slow
def test_a_higher_resolution_keeps_the_accuracy_and_raises_it_in_training(learned, tmp_path):
    """8 -> 12 pixels: at most two points lower before the first step, higher after the last."""
    workdir, lower = learned
    assert lower > 0.4

    def at_12(name, head, steps, rate):
        config = commands.make_config("configs/finetune.py:cifar10", [f"checkpoint.init_from={workdir}"])
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
def test_an_average_of_checkpoints_is_evaluated_and_started_from(learned, tmp_path, capsys):
    """The mean of one checkpoint is that checkpoint; a head for other classes is refused."""
    from vit_jax import checkpoints

    workdir, accuracy = learned
    file = tmp_path / "mean.safetensors"
    assert checkpoints.main(["average", str(workdir), "--last=1", f"--out={file}"]) == 0
    capsys.readouterr()
    assert evaluate.main([f"--workdir={workdir}", f"--weights={file}"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert (scored["test/accuracy"], scored["weights"], scored["test/examples"]) == (accuracy, str(file), 360)
    config = commands.make_config("configs/finetune.py:cifar10", [f"checkpoint.init_from={file}"])
    kept = {"checkpoint": {"init_head": "keep"}, "optimizer": {"learning_rate": 0.0}}
    same = fine_tuned(config, tmp_path / "run", data={"image_size": 8}, train={"steps": 1, "batch_size": 8}, **kept)
    assert same["test/accuracy"] == accuracy
    saved_run(tmp_path / "other", classes=2, model={"variant": "Ti/2", "width": 32, "heads": 2, "mlp_width": 64})
    assert evaluate.main([f"--workdir={workdir}", f"--weights={tmp_path / 'other'}"]) == 2
    error = capsys.readouterr().err
    assert "head/logits" in error or "its model differs" in error


@pytest.mark.slow
def test_a_run_needs_the_file_with_its_mean_and_std_only_once(tmp_path):
    """The numbers are in the run: it resumes, predicts and is exported without the file that it started from."""
    file, workdir, recorded = tmp_path / "init" / "model.safetensors", tmp_path / "run", ((0.3,), (0.7,))
    file_with(file, recorded)
    start = [f"checkpoint.init_from={file}", "train.batch_size=8", "data.name=digits", "data.image_size=8"]
    steps = {"train": {"steps": 1}, "checkpoint": {"every": 1}, "data": {"image_size": 8}}
    config = commands.make_config("configs/finetune.py:cifar10", start, workdir)
    fine_tuned(config, workdir, **steps)
    shutil.rmtree(file.parent)
    resumed = commands.make_config("configs/finetune.py:cifar10", start, workdir)
    assert resumed.data.normalization == config.data.normalization == "0.3/0.7"
    assert fine_tuned(resumed, workdir, **(steps | {"train": {"steps": 2}}))["steps"] == 2
    inputs = inference.Predictor(workdir).inputs
    assert (inputs.mean, inputs.std) == recorded
    (workdir / "data.json").unlink()  # config.json has them too
    assert inference.of_run(workdir).augment.mean == recorded[0]
    assert convert.main([str(workdir), str(tmp_path / "export.safetensors")]) == 0
    assert weights.recognise(tmp_path / "export.safetensors").statistics == recorded


# --- every config file, on synthetic images --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A directory with 32x32 colour noise, whose mean depends on the class, and with a run of a tiny model for it."""
    directory = tmp_path_factory.mktemp("synthetic")
    generator = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 40)):
        labels = np.arange(count) % 10
        images = generator.integers(0, 120, (count, 32, 32, 3)) + 12 * labels[:, None, None, None]
        np.savez(directory / f"{split}.npz", images=images.astype(np.uint8), labels=labels)
    saved_run(directory / "model", image_size=32, channels=3, model={"variant": "Ti/16"})
    return directory


SCRATCH = [f"{name}.py{rest}" for name in ("cifar10", "cifar100") for rest in ("", ":cpu", ":lite,short", ":S,long")]
TUNED = [*(f"finetune.py:{name}" for name in TABLE_4), *(f"finetune.py:cifar10,{w}" for w in ("short", "cpu"))]
TUNED += ["finetune.py:cifar100,probe", "finetune.py:oxford_iiit_pet,adamw"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [*SCRATCH, *TUNED][:: 1 if THOROUGH else 2])
def test_every_config_trains_and_evaluates(spec, synthetic, tmp_path):
    """With a tiny model, few small images and a hundredth of its steps; everything else as in the file."""
    overrides = [f"data.dir={synthetic}", "data.name=arrays", "data.test=test", f"data.cache_dir={tmp_path / 'cache'}"]
    overrides += ["mesh.devices=1", "log.tensorboard=False", "train.epochs=None", "train.batch_size=8"]
    overrides += ["train.evaluation_batch_size=8", "train.evaluate_every=0"]
    if spec in TUNED:
        overrides += [f"checkpoint.init_from={synthetic / 'model'}"]
        overrides += [] if "cpu" in spec else ["data.image_size=64"]
    else:
        overrides += ["model.width=16", "model.depth=1", "model.heads=2", "model.mlp_width=16"]
    steps = options.load(f"configs/{spec}").train.steps or 300
    config = commands.make_config(f"configs/{spec}", [*overrides, f"train.steps={min(steps // 100, 5)}"])
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
    summary = train.train(config, tmp_path / "run")
    assert summary["test/examples"] == 40 and np.isfinite(summary["test/loss"])
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["step"] == config.train.steps and np.isfinite(lines[-1]["train/loss"])


# --- a learning-rate sweep as a user runs it -------------------------------------------------------------------------

SWEEP = [
    *("--config=configs/digits.py", "--rates=.0001,.01", "--held_out=10"),
    *flags(
        model={"width": 16, "depth": 1, "heads": 2, "mlp_width": 16},
        train={"epochs": None, "steps": 120, "evaluate_every": 0},
        optimizer={"warmup_steps": 10},
        checkpoint={"every": 20},
        log={"every": 10},
    ),
]


@pytest.mark.slow
def test_a_sweep_is_stopped_by_a_signal_and_resumed(tmp_path):
    """Stopped in its second run, it exits with status 0; the same command finishes it and repeats nothing."""
    command = ["vit_jax.sweep", *SWEEP, f"--workdir={tmp_path}"]
    process = start_command(*command)
    wait_until(process, lambda: num_records(tmp_path / "rate-0.01") > 0)
    process.send_signal(signal.SIGTERM)
    finish(process)
    first = (tmp_path / "rate-0.0001" / "metrics.jsonl").read_bytes()
    output = run_command(*command)
    assert (tmp_path / "rate-0.0001" / "metrics.jsonl").read_bytes() == first
    content = json.loads((tmp_path / "sweep.json").read_text())
    accuracies = [trial["validation/accuracy"] for trial in content["trials"]]
    assert content["best"] == 0.01 and accuracies[1] > accuracies[0]
    assert [trial["validation/examples"] for trial in content["trials"]] == [144, 144]
    assert content["final"]["test/examples"] == 360
    for name in ("rate-0.0001", "rate-0.01"):
        assert "test/" not in (tmp_path / name / "metrics.jsonl").read_text()
    lines = read_metrics(tmp_path / "final-0.01")
    assert [line["step"] for line in lines if "test/accuracy" in line] == [120]
    table, _, result = (tmp_path / "sweep.md").read_text().partition("\n\n")
    assert result in output
    for row in table.splitlines()[2:]:
        assert re.search(r" +".join(re.escape(cell.strip("* ")) for cell in row.strip("|").split("|")), output), row
    assert (tmp_path / "sweep.png").stat().st_size > 1000
