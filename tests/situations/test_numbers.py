"""Numbers that are not finite, or that would divide by zero: never in pixels, never in files, never at a run's end."""

import ast
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, tiny_config
from PIL import Image
from toy import make_state

from vit_jax import atomic, main, transfer
from vit_jax.checkpoint import input_spec, run_files
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config.check import check_config
from vit_jax.data import cache, feature_store, normalization, sources
from vit_jax.data.augment import Augment
from vit_jax.errors import UserError
from vit_jax.evaluation import frozen_features
from vit_jax.models import masked_patches
from vit_jax.models.patches import patchify
from vit_jax.optim import registry
from vit_jax.training import lr_sweep, recovery, train
from vit_jax.training.metrics import MetricsWriter

# --- a constant channel -----------------------------------------------------------------------------------------------


def pixels(constant, value=0, size=(12, 10), examples=8):
    """Random images in which some channels are the same everywhere."""
    images = np.random.default_rng(0).integers(0, 256, (examples, *size, 3), np.uint8)
    images[..., constant] = value
    return images


def save_folder(root, images):
    for index, image in enumerate(images):
        folder = root / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")


def load_folder(root, images, decoded):
    save_folder(root / "set", images)
    options = {"data_dir": root / "set", "cache_dir": root / "cache", "image_size": images.shape[1:3]}
    first = sources.load("folder", "train", decoded=decoded, **options)
    again = sources.load("folder", "train", decoded=decoded, **options)  # statistics from the cache
    assert (first.mean, first.std) == (again.mean, again.std)
    return normalization.of_source("set", again)


def damaged_cache(root, images):
    """A cache whose statistics were written by a version that wrote NaN."""
    load_folder(root, images, True)
    for path in root.rglob("mean_std.json"):
        path.write_text('{"mean": [0.5, 0.5, 0.5], "std": [NaN, 0.1, 0.1]}')
    return load_folder(root, images, True)


def old_data_file(root, images):
    content = {"set": "folder", "image_shape": [12, 10, 3], "mean": [0.5, 0.5, 0.0], "std": [0.3, 0.2, 0]}
    (root / run_files.DATA).write_text(json.dumps({**content, "classes": {"label": ["a", "b"]}}))
    spec = input_spec.read(root)
    return spec.mean, spec.std


CONSTANT = {
    "blue is always 0": lambda root: ([2], 0, load_folder(root, pixels([2]), True)),
    "decoded when read": lambda root: ([2], 0, load_folder(root, pixels([2]), False)),
    "red is always 201, whose mean is rounded": lambda root: ([0], 201, load_folder(root, pixels([0], 201), True)),
    "all channels": lambda root: ([0, 1, 2], 77, load_folder(root, pixels([0, 1, 2], 77), True)),
    "a std of 1e-9": lambda root: ([1], 51, ((0.4, 0.2, 0.5), (0.2, 1e-9, 0.3))),
    "statistics of NaN in the cache": lambda root: ([2], 0, damaged_cache(root, pixels([2]))),
    "data.json of an old run": lambda root: ([2], 0, old_data_file(root, None)),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_channel_becomes_zero(name, tmp_path):
    constant, value, (mean, std) = CONSTANT[name](tmp_path)
    images, augment = pixels(constant, value), Augment(mean, std)
    inputs = np.asarray(augment.normalize(jnp.asarray(images)))
    varying = [channel for channel in range(3) if channel not in constant]
    expected = np.zeros(images.shape)
    expected[..., varying] = (images / 255 - mean)[..., varying] / np.array(std)[varying]
    np.testing.assert_allclose(inputs, expected, atol=1e-5)
    # Other values, as a test image may have them, stay bounded; pixels can be computed from the inputs again.
    others = np.random.default_rng(1).integers(0, 256, images.shape, np.uint8)
    inputs = np.asarray(augment.normalize(jnp.asarray(others)))
    assert np.abs(inputs[..., constant]).max() <= 1
    np.testing.assert_allclose(255 * (inputs * augment.std + mean), others, atol=1e-3)
    # The targets of masked patches are made of the inputs.
    size = 2
    colours = masked_patches.mean_colours(patchify(jnp.asarray(inputs), size), mean, augment.std)
    blocks = others.reshape(8, 6, 2, 5, 2, 3).mean((2, 4)).reshape(8, -1, 3)
    levels = np.floor(blocks / 32).astype(int)
    np.testing.assert_array_equal(colours, levels @ [64, 8, 1])


def test_constant_channels_are_named_once():
    assert (
        normalization.note((0.5, 0.2), (0.1, 0.0)) == "constant channels, not divided by their std of 0: 1 (always 51)"
    )
    assert normalization.note((0.5, 0.2), (0.1, 0.01)) is None


# --- strict JSON ------------------------------------------------------------------------------------------------------

NOT_FINITE = {
    "nan": math.nan,
    "inf": [1.5, math.inf],
    "minus": (-math.inf,),
    "deep": {"a": [{"b": math.nan}]},
    "one": 1,
}


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def written_metrics(root):
    with MetricsWriter(root, 0, tensorboard=False) as writer:
        writer.write(1, {"test/loss": math.nan, "train/loss": 0.5})
    return (root / run_files.METRICS).read_text()


def written_sweep(root):
    lr_sweep.write(root, {"trials": [{"validation/loss": math.inf}]})
    return (root / lr_sweep.RESULT).read_text()


def written_statistics(root):
    cache.write_mean_std(root, (math.nan,), (0.5,))
    assert cache.read_mean_std(root, 1) is None  # and they are computed again
    return (root / "mean_std.json").read_text()


def written_values(root):
    atomic.write_json(root / "a.json", NOT_FINITE)
    return (root / "a.json").read_text()


@pytest.mark.parametrize(
    "write, expected",
    [
        (written_metrics, {"step": 1, "test/loss": None, "train/loss": 0.5}),
        (written_sweep, {"trials": [{"validation/loss": None}]}),
        (written_statistics, {"mean": [None], "std": [0.5]}),
        (written_values, {"nan": None, "inf": [1.5, None], "minus": [None], "deep": {"a": [{"b": None}]}, "one": 1}),
        (lambda _: atomic.to_json([math.nan]), [None]),
    ],
    ids=["metrics.jsonl", "sweep.json", "mean_std.json", "any file", "a line"],
)
def test_json_has_null_for_what_is_not_finite(write, expected, tmp_path):
    assert strict(write(tmp_path)) == expected


# Digests of content, messages between processes, and a header of names and sizes are no files that others read.
OWN_JSON = ("atomic.py", "checkpoint/integrity.py", "sharding/multihost.py", "weights/safetensors.py")


def test_all_json_is_written_by_one_function():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "vit_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("dump", "dumps")
        and getattr(node.value, "id", "") == "json"
        if str(path.relative_to(ROOT / "vit_jax")) not in OWN_JSON
    ]
    assert not found, "use atomic.to_json"


# --- inputs that are not finite ---------------------------------------------------------------------------------------


def save_features(path, features, labels=None):
    labels = np.arange(len(features), dtype=np.int32) % 2 if labels is None else labels
    about = {"name": "set", "split": path.stem, "class_names": {"label": ["a", "b"]}, "backbone": "x", "step": 1}
    ids = np.array([f"{path.stem}:{index}" for index in range(len(features))])
    np.savez(
        path, features=features, labels=labels, ids=ids, about=np.array(json.dumps({**about, "image_shape": [8, 8, 1]}))
    )


def spoiled(value, row=3):
    features = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    features[row, 2] = value
    return features


def read_features(root, features, labels=None):
    save_features(root / "train.npz", features, labels)
    feature_store.read(root / "train.npz")


def measure_features(root, features):
    save_features(root / "train.npz", spoiled(0))
    save_features(root / "test.npz", features)
    transfer.measure(transfer.parse([f"--features={root}", "--methods=knn", "--neighbours=1"]))


def write_features(root, features):
    save_features(root / "train.npz", spoiled(0))
    source = feature_store.read(root / "train.npz").source(("label",))
    feature_store.write(root / "new.npz", features.shape, [features[:2], features[2:]], source, {})


def evaluate_features(root, features):
    examples = frozen_features.Examples(features, np.arange(10, dtype=np.int32) % 2)
    frozen_features.evaluate(examples, examples, 2, frozen_features.Settings(methods=("probe",)))


LABELS = np.array([0, 1, 0, 2, 0, 1, 0, 1, 0, 1], np.int32)


@pytest.mark.parametrize(
    "use, words",
    [
        (lambda root: read_features(root, spoiled(np.nan)), ["train.npz", "1 examples", "train:3"]),
        (lambda root: read_features(root, spoiled(np.inf, 7)), ["train.npz", "train:7"]),
        (lambda root: read_features(root, spoiled(0), LABELS), ["labels", "1 of 10", "example 3 has 2", "0 to 1"]),
        (lambda root: read_features(root, spoiled(0), LABELS[:9]), ["train.npz", "number of examples"]),
        (lambda root: read_features(root, spoiled(0).astype(np.float64) + 1e300), ["train.npz", "10 examples"]),
        (lambda root: read_features(root, spoiled(0), LABELS.astype(np.float32)), ["train.npz", "labels integers"]),
        (lambda root: measure_features(root, spoiled(-np.inf)), ["test.npz", "test:3"]),
        (lambda root: write_features(root, spoiled(np.nan)), ["new.npz is not written", "train:3"]),
        (lambda root: evaluate_features(root, spoiled(np.nan)), ["examples of train", ": 3"]),
    ],
    ids=[
        "NaN",
        "inf",
        "labels out of range",
        "labels missing",
        "float64",
        "float labels",
        "transfer",
        "features command",
        "probe",
    ],
)
def test_features_that_are_not_finite_are_named(use, words, tmp_path):
    with pytest.raises(UserError) as caught:
        use(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "learning_rate" not in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "new.npz").exists()


@pytest.mark.parametrize(
    "found, words",
    [
        ({"first": "inputs", "updates": 9}, "not the learning rate's fault"),
        ({"first": "encoder/block_0", "updates": 0}, "the learning rate is not the cause"),
        ({"first": "encoder/block_0", "updates": 9}, "lower config.optimizer.learning_rate"),
        ({"first": "gradient of head/logits/kernel", "updates": 9}, "gradient_clip"),
        ({"first": "parameters/head/logits/kernel", "updates": 9}, "lower config.optimizer.learning_rate"),
    ],
    ids=["inputs", "before any update", "a module", "the gradient", "the parameters"],
)
def test_the_advice_fits_the_cause(found, words):
    assert words in recovery.advice(found)


# --- the end of a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(toy, make_config):
    return toy(make_config()).experiment


def guard(experiment, workdir, lines):
    return recovery.Recovery(experiment, 0, CheckpointManager(workdir, read_only=True), workdir, lines.append)


def end_state(step, updates, value=1.0):
    parameters = {"kernel": jnp.full((2, 2), value)}
    state = make_state(parameters, registry.optax.sgd(0.1))
    return state.replace(step=jnp.int32(step), updates=jnp.int32(updates))


@pytest.mark.parametrize(
    "state, loss, words",
    [
        ((10, 10), math.nan, "test/loss is not finite after step 10: the parameters are finite"),
        ((10, 10), math.inf, "test/loss is not finite"),
        ((10, 10, math.nan), math.nan, "the parameters kernel are not finite"),
        ((10, 4), 0.5, "6 of 10 steps were skipped"),
        ((3, 0), 0.5, "3 of 3 steps were skipped"),
    ],
    ids=["NaN in the evaluation", "an infinite loss", "NaN in the parameters", "most steps skipped", "no update"],
)
def test_a_run_that_is_not_finite_does_not_end_as_finished(state, loss, words, experiment, tmp_path):
    with pytest.raises(recovery.NonFinite) as caught:
        guard(experiment, tmp_path, []).check_end(end_state(*state), {"test/accuracy": 0.1, "test/loss": loss})
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    assert strict((tmp_path / recovery.REPORT).read_text())["step"] == state[0]


def test_skipped_steps_are_counted_at_the_end(experiment, tmp_path):
    lines = []
    guard(experiment, tmp_path, lines).check_end(end_state(10, 8), {"test/loss": 0.5})
    assert lines == ["warning: 2 of 10 steps were skipped: their loss or gradient was not finite"]
    guard(experiment, tmp_path, lines).check_end(end_state(10, 10), {"test/loss": 0.5})
    assert len(lines) == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3], ids=["the evaluation", "the last steps"])
def test_short_runs_that_overflow_fail(steps, tmp_path):
    config = tiny_config(optimizer={"learning_rate": 1e38}, train={"steps": steps})
    check_config(config)
    for _ in range(2 if steps == 1 else 1):  # and again when it is resumed
        with pytest.raises(UserError, match="is not finite"):
            train.train(config, tmp_path)
        assert not (tmp_path / run_files.SUMMARY).exists() and strict((tmp_path / recovery.REPORT).read_text())
    for line in (tmp_path / run_files.METRICS).read_text().splitlines():
        strict(line)


@pytest.mark.slow
def test_a_run_with_a_constant_channel_is_finite(tmp_path, capsys):
    save_folder(tmp_path / "set", pixels([2], size=(8, 8), examples=16))
    section = {"name": "folder", "dir": tmp_path / "set", "image_size": 8, "train": "train", "test": "train"}
    arguments = [f"--config.data.{key}={value}" for key, value in section.items()]
    arguments += ["--config.model.variant=Ti/4", "--config.model.width=16", "--config.model.depth=1"]
    arguments += ["--config.model.heads=2", "--config.model.mlp_width=16", "--config.train.batch_size=8"]
    arguments += ["--config.train.epochs=None", "--config.train.steps=3", "--config.augment.rotation=0"]
    arguments += ["--config.augment.scaling=0", f"--workdir={tmp_path / 'run'}"]
    assert main.main(["--config=configs/digits.py", *arguments]) == 0
    assert capsys.readouterr().out.count("constant channels, not divided by their std of 0: 2 (always 0)") == 1
    assert math.isfinite(json.loads((tmp_path / "run" / run_files.SUMMARY).read_text())["test/loss"])
    assert input_spec.read(tmp_path / "run").std[2] == 1.0
