"""Runs without labels from end to end: resuming, what is kept and shown, fine-tuning from them, pictures."""

import json
import shutil

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config
from orbax.checkpoint import v1 as ocp
from PIL import Image

from vit_jax import config as options
from vit_jax import evaluate as evaluating
from vit_jax import features, reconstruct, weights
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config.check import check_config
from vit_jax.errors import UserError
from vit_jax.training import setup, train

pytestmark = pytest.mark.slow

STEPS = 12


def small(**sections):
    """A masked autoencoder on the digits in which all that could carry over from step to step does."""
    config = tiny_config(model={"variant": "Ti/2", "dropout": 0.1}, augment={"crop_padding": 1})
    config.optimizer.update(learning_rate=1e-2, warmup_steps=3, average_decay=0.9, weight_decay=0.1)
    config.data.update(train="train[:200]", validation="train[200:250]", test="test[:50]")
    config.train.update(objective="masked_autoencoder", batch_size=32, steps=STEPS, accumulation=2, evaluate_every=4)
    config.checkpoint.update(every=1, keep=STEPS)
    config.log.every = 3
    for section, values in sections.items():
        config[section].update(values)
    if config.train.objective == "masked_autoencoder":
        config.decoder.update(width=8, depth=1, heads=2, mlp_width=8)
    check_config(config)
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train.train(small(), folder)
    return folder


def lines(folder):
    found = [json.loads(line) for line in (folder / run_files.METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in found]


def state(folder, step=STEPS):
    return ocp.load_checkpointables(folder / "checkpoints" / str(step))["state"]


@pytest.mark.parametrize("step", [5])
def test_it_goes_on_exactly(whole, tmp_path, step):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / run_files.SUMMARY).unlink()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    train.train(small(), tmp_path / "run")
    chex.assert_trees_all_equal(state(tmp_path / "run"), state(whole))
    assert lines(tmp_path / "run") == lines(whole)


def test_what_it_leaves_tells_of_losses_alone(whole, capsys):
    summary = json.loads((whole / run_files.SUMMARY).read_text())
    assert set(summary) == {"test/loss", "test/examples", "steps", "seconds", "parameters"}
    assert not any("accuracy" in key or "top5" in key for line in lines(whole) for key in line)
    train.train(small(), whole)
    shown = capsys.readouterr().out
    assert f"is finished: test loss {summary['test/loss']:.4f} on all 50 images after 12 steps, " in shown


def test_the_best_checkpoint_is_that_of_the_least_loss(whole):
    losses = {line["step"]: line["validation/loss"] for line in lines(whole) if "validation/loss" in line}
    assert set(losses) == {4, 8, 12}
    with CheckpointManager(whole, read_only=True) as checkpoints:
        step, score = checkpoints.best()
    assert (step, -score) == min(losses.items(), key=lambda pair: pair[1])


def test_the_command_evaluates_it_as_training_did(whole):
    out = whole.parent / "evaluation"
    with pytest.raises(UserError, match="trained without labels, so it predicts no classes"):
        evaluating.evaluate(evaluating.parse([f"--workdir={whole}", f"--out={out}"]))
    flags = evaluating.parse([f"--workdir={whole}", "--batch_size=9"])
    metrics = evaluating.evaluate(flags)
    assert set(metrics) == {"step", "test/loss", "test/examples"}
    assert metrics["test/loss"] == pytest.approx(
        json.loads((whole / run_files.SUMMARY).read_text())["test/loss"], rel=1e-5
    )


def leaves(tree, prefix=""):
    for name, value in tree.items():
        yield from leaves(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]


def classifier(folder, **sections):
    model = {"dropout": 0.0, **sections.pop("model", {})}
    start = {"objective": "classify", "steps": 1}
    return small(model=model, train=start, checkpoint={"init_from": str(folder)}, **sections)


def initial(config, folder, capsys):
    """The state before the first step of a run that starts from others' parameters, and what was said of them."""
    capsys.readouterr()
    config.optimizer.update(learning_rate=0.0, average_decay=0.0)
    train.train(config, folder)
    return state(folder, 1)["parameters"], capsys.readouterr().out


def test_a_classifier_starts_from_its_encoder(whole, tmp_path, capsys):
    parameters, shown = initial(classifier(whole), tmp_path, capsys)
    pretrained = dict(leaves(state(whole)["averaged"]["backbone"]))
    started = dict(leaves(parameters))
    assert set(started) - set(pretrained) == {"head/logits/kernel", "head/logits/bias"}
    for name, array in pretrained.items():
        np.testing.assert_array_equal(started[name], array, err_msg=name)
    assert "initialized  head/logits/bias, head/logits/kernel" in shown or "initialized  head/logits" in shown
    assert "(the decoder of pre-training)" in shown
    assert "averaged/decoder/mask_embedding" in str(weights.load(whole)[2].table(verbose=True))


def test_its_positions_are_resampled_for_another_patch_size_of_image(whole, tmp_path, capsys):
    config = classifier(whole, data={"image_size": 12})
    parameters, shown = initial(config, tmp_path, capsys)
    assert "grid 4x4 -> 6x6" in shown
    assert parameters["positions"]["table"].shape == (1, 1 + 36, 16)


def test_pre_training_goes_on_from_a_classifier(whole, tmp_path, capsys):
    """Backwards: what a classifier has is taken, and the decoder is new."""
    train.train(classifier(whole), tmp_path / "classifier")
    again = small(checkpoint={"init_from": str(tmp_path / "classifier")}, train={"steps": 1})
    parameters, _ = initial(again, tmp_path / "again", capsys)
    before = dict(leaves(state(tmp_path / "classifier", 1)["averaged"]))
    for name, array in leaves(parameters["backbone"]):
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert "decoder" in parameters


def test_features_are_those_of_the_encoder(whole, tmp_path):
    features.compute(features.parse([f"--workdir={whole}", "--split=test", f"--out={tmp_path / 'test.npz'}"]))
    model, parameters, _ = weights.load(whole)
    run = setup.assemble(small(), setup.check(small()), setup.load_sources(small()))
    inputs = run.augment.normalize(jnp.asarray(run.sources["test"].read(np.arange(50))))
    with np.load(tmp_path / "test.npz") as stored:
        np.testing.assert_allclose(stored["features"], model.apply({"params": parameters}, inputs), atol=1e-5)


def test_a_picture_shows_images_what_is_seen_and_what_is_told(whole, tmp_path, capsys):
    out = tmp_path / "seen.png"
    assert reconstruct.main([f"--workdir={whole}", f"--out={out}", "--count=5"]) == 0
    assert "5 images of test at step 12, loss " in capsys.readouterr().out
    tile, gap = 96, 6
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (gap + 3 * (tile + gap), gap + 5 * (tile + gap), 3)
    run = setup.assemble(small(), setup.check(small()), setup.load_sources(small()))
    images = run.sources["test"].read(np.arange(5))
    rows = drawn[gap:, gap:].reshape(3, tile + gap, 5, tile + gap, 3)[:, :tile, :, :tile, 0].transpose(0, 2, 1, 3)
    pixels = rows[:, :, ::12, ::12]
    np.testing.assert_array_equal(pixels[0], images[..., 0])
    hidden = (pixels[1] != pixels[0]) | (pixels[1] == 128)
    assert (hidden.reshape(5, 4, 2, 4, 2).all(axis=(2, 4)).sum(axis=(1, 2)) == 12).all()
    np.testing.assert_array_equal(pixels[2][~hidden], pixels[0][~hidden])
    assert (pixels[2] != pixels[0]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--count=51"], "allowed: 1 to 50"), (["--out=/nowhere/x.png"], "--out=/nowhere/x.png cannot be written")],
)
def test_pictures_that_cannot_be_drawn_are_explained(whole, capsys, arguments, message):
    assert reconstruct.main([f"--workdir={whole}", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_classifier_has_no_reconstructions(whole, tmp_path, capsys):
    train.train(classifier(whole), tmp_path)
    assert reconstruct.main([f"--workdir={tmp_path}"]) == 2
    assert "objective is 'classify', which reconstructs no images" in capsys.readouterr().err


def test_another_objective_is_refused_in_its_workdir(whole):
    config = small(train={"masked_share": 0.5})
    with pytest.raises(UserError, match=r"differs: train\.masked_share: None -> 0\.5"):
        train.train(config, whole)


SHORT = {"train.steps": 2, "train.batch_size": 8, "train.accumulation": 1, "train.evaluation_batch_size": 32}
TINY = {"model.width": 24, "model.depth": 1, "model.heads": 2, "model.mlp_width": 16}


@pytest.mark.parametrize("recipe", ["cifar100", "mae", "masked-patches", "imagenet21k"])
def test_the_recipes_run_from_end_to_end(tmp_path, recipe):
    """Each with a small model, a few images and two steps; its own data replaced by digits, or a folder of images."""
    config = options.load(f"configs/pretrain.py:{recipe}")
    config.data.update(name="digits", train="train[:64]", test="test[:40]")
    config.data.validation = None if config.data.validation is None else "train[64:96]"
    config.data.image_size = 32
    config.train.epochs = None
    for name, value in {**SHORT, **TINY}.items():
        section, key = name.split(".")
        config[section][key] = value
    if config.train.objective == "masked_autoencoder":
        config.decoder.update(width=8, heads=2, mlp_width=8)
    config.log.tensorboard = False
    check_config(config)
    summary = train.train(config, tmp_path)
    assert summary["steps"] == 2 and summary["test/examples"] == 40 and np.isfinite(summary["test/loss"])
