"""What `import vit_jax` offers: train, load, create_model."""

import dataclasses
import json
import os
import signal
import threading

import jax
import jaxtyping
import numpy as np
import pytest
from helpers import ROOT, run_command, tiny_config
from PIL import Image

import vit_jax
from vit_jax import api, commands, config, evaluate, features, inference, weights
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.data import feature_store, sources
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.training.run import Run
from vit_jax.training.shutdown import Interruption


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", "test")


# --- names ------------------------------------------------------------------------------------------------------------


def test_every_name_is_there_and_listed():
    assert set(vit_jax.__all__) <= set(dir(vit_jax))
    assert vit_jax.load is api.load and vit_jax.load_weights is weights.load
    assert all(callable(getattr(vit_jax, name)) for name in vit_jax.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'Trainer'; it has .*create_model"):
        vit_jax.Trainer  # noqa: B018


@pytest.mark.slow
def test_the_import_loads_neither_jax_nor_a_command():
    code = "import sys, vit_jax\nassert not {'jax', 'numpy', 'argparse'} & set(sys.modules)\nvit_jax.load"
    run_command(f"{code}\nassert 'jax' in sys.modules")


# --- create_model -----------------------------------------------------------------------------------------------------


def test_a_model_is_created_by_its_name():
    assert vit_jax.create_model("B/16", classes=10) == vit_jax.VisionTransformer(classes=10, **variants.fields("B/16"))
    pooled = vit_jax.create_model("Ti/4", pooling="mean", dropout=0.1)
    assert (pooled.classes, pooled.class_token, pooled.dropout) == (None, False, 0.1)
    assert vit_jax.create_model("Ti/4", pooling="mean", class_token=True).class_token


@pytest.mark.parametrize("name, options", [("augreg-b16-224", {}), ("B/16", {"width": 7}), ("B/16", {"depht": 3})])
def test_a_model_that_does_not_exist_is_refused_with_the_ways_to_a_published_one(name, options):
    with pytest.raises(UserError, match=r"(?s)^create_model: .*\n  for a published model, use vit_jax\.load") as caught:
        vit_jax.create_model(name, **options)
    assert str(caught.value).count("\n") == 1


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["digits", "cifar10", "pretrain", "finetune"])
def test_values_of_python_give_the_same_config_as_the_text_of_the_command_line(file):
    spec = {"pretrain": "pretrain.py:mae-cpu", "finetune": "finetune.py:cifar10,cpu"}.get(file, f"{file}.py")
    made, again = config.load(str(ROOT / "configs" / spec)), config.default()
    values = {f"{section}.{key}": value for section, keys in made.to_dict().items() for key, value in keys.items()}
    for assignment in api._assignments(values):
        config.override(again, assignment)
    assert again.to_dict() == made.to_dict()


def test_an_option_is_named_by_its_key_if_that_is_enough():
    passed = {"steps": np.int64(5), "test_flip": True, "labels": ["label", "parity"], "model.width": 8}
    assert api._assignments(passed) == [
        *("train.steps=5", "augment.test_flip=True", "data.labels=label,parity", "model.width=8")
    ]
    nested = {"train": {"steps": 3, "loss_weights": {"label": 1.0, "parity": 0.5}}, "data": {"train": "train[:9]"}}
    assert api._assignments(nested)[::2] == ["train.steps=3", "data.train=train[:9]"]
    made = commands.make_config(tiny_config(data={"labels": ("label", "parity")}), api._assignments(nested))
    assert dict(made.train.loss_weights) == {"label": 1.0, "parity": 0.5}
    with pytest.raises(UserError, match=r"width is an option of several sections\n  use overrides=\{'model\.width': "):
        api._assignments({"width": 8})
    with pytest.raises(UserError, match=r"stps does not exist.*\n  nearest: config\.train\.steps"):
        api._assignments({"stps": 8})


def test_a_config_without_a_run_directory_and_options_that_are_no_mapping_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=r"workdir is missing\n  name the run directory"):
        vit_jax.train(tiny_config())
    with pytest.raises(
        UserError, match=r"overrides is 'steps=3'\n  allowed: a mapping such as \{'train\.steps': 100\}"
    ):
        vit_jax.train(tiny_config(), tmp_path, "steps=3")


def test_a_config_is_copied(tmp_path):
    mine = tiny_config()
    made = commands.make_config(mine, ["train.steps=7"], tmp_path)
    assert (made.train.steps, mine.train.steps) == (7, 20)


# --- interruption -----------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_once_and_the_handler_is_restored():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as stop:
        assert stop.reason is None
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGINT" and stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_raises_at_once_while_there_is_nothing_to_save():
    with Interruption() as stop:
        stop.exit_on_signal = True
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_signals_keep_their_handlers_and_a_lost_directory_is_an_error():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    with Interruption(max_minutes=0.0) as stop:
        assert {number: signal.getsignal(number) for number in before} == before
        assert stop.reason == "train.max_minutes is 0"
        stop.exit_without_saving("DIR has been taken over by process 7")
        with pytest.raises(UserError, match="taken over by process 7\n  use another workdir"):
            stop.reason  # noqa: B018


# --- load -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(digits_run):
    return vit_jax.load(digits_run)


@pytest.fixture(scope="module")
def by_hand(model, digits_run, digits):
    """Logits by head and features of the test digits, normalized here by the mean and std of the training images."""
    train = sources.load("digits", "train").images / 255
    inputs = ((digits.images / 255 - train.mean()) / train.std()).astype(np.float32)
    module, parameters, _ = vit_jax.load_weights(digits_run)
    apply = jax.jit(lambda one, images: one.apply({"params": parameters}, images), static_argnums=0)
    return apply(module, inputs), apply(module.clone(classes=None), inputs)


@pytest.mark.slow
def test_logits_and_features_are_those_of_the_module_on_normalized_images(model, by_hand, digits):
    logits, hidden = model.logits(digits.images), model.features(digits.images)
    for head in ("label", "parity"):
        np.testing.assert_allclose(logits[head], by_hand[0][head], atol=1e-4)
    np.testing.assert_allclose(hidden, by_hand[1], atol=1e-4)
    exponentials = np.exp(np.asarray(by_hand[0]["label"], np.float64))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.probabilities(digits.images)["label"], expected, atol=1e-4)
    patches = model.features(digits.images[:3], patches=True)
    assert patches.shape == (3, 4, 16) and model.features([]).shape == (0, 16)


@pytest.mark.slow
def test_features_are_those_that_the_command_stores_and_accuracy_is_that_of_evaluate(
    model, digits_run, digits, tmp_path, capsys
):
    assert features.main([f"--workdir={digits_run}", f"--out={tmp_path / 'stored.npz'}"]) == 0
    np.testing.assert_allclose(
        model.features(digits.images), feature_store.read(tmp_path / "stored.npz").features, atol=1e-5
    )
    capsys.readouterr()
    assert evaluate.main([f"--workdir={digits_run}"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["test/accuracy"]
    assert (model.logits(digits.images)["label"].argmax(axis=1) == digits.labels).mean() == accuracy


@pytest.mark.slow
def test_every_kind_of_image_gives_the_same_logits(model, digits, tmp_path):
    Image.fromarray(digits.images[0, ..., 0]).save(tmp_path / "digit.png")
    expected = model.logits(digits.images[:1])["label"]
    with Image.open(tmp_path / "digit.png") as opened:
        for passed in (str(tmp_path / "digit.png"), tmp_path, opened, [digits.images[0]], digits.images[0, ..., 0]):
            np.testing.assert_allclose(model.logits(passed)["label"], expected, atol=1e-6)


def test_a_model_shows_what_it_is(model, digits_run):
    assert model.classes == {"label": tuple("0123456789"), "parity": ("even", "odd")} and model.image_size == (8, 8)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.parameters))
    assert repr(model).startswith(f"<{digits_run}") and f"{count:,} parameters; images of 8x8x1" in repr(model)
    assert "10 classes (0, 1, 2 and 7 more) and 2 classes (even, odd)>" in repr(model)


@pytest.mark.parametrize(
    "passed, words",
    [
        (np.zeros((2, 8, 8, 1)), "dtype float64\n.*255 \\* image"),
        (np.zeros((5, 8, 8), np.uint8), r"shape \[5, 8, 8\]\n.*\n  of gray images .*images\[\.\.\., None\]"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]\n.*\n.* pass np\.moveaxis\(image, 0, -1\)"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_pass(model, passed, words):
    for call in (model.logits, model.features, model.predict):
        with pytest.raises(UserError, match=f"(?s){words}"):
            call(passed)


def test_predictions_are_shown_in_one_line_per_image():
    guesses = (inference.Guess("cat", 0.931), inference.Guess("dog\n", 0.042))
    one = inference.Prediction("photo.jpg", {"label": guesses}, {})
    two = inference.Prediction(1, {"label": guesses[:1], "tail": guesses[1:]}, {})
    assert str(one) == "photo.jpg: cat 93.1 %, dog\\n 4.2 %" and one.probability == 0.931
    assert str(inference.Predictions([one, two])).splitlines()[1] == "image 1: label: cat 93.1 %; tail: dog\\n 4.2 %"
    assert str(inference.Predictions([one] * 25)).splitlines()[20:] == ["... and 5 more"]


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """The file of a model without a head, with the module and its parameters."""
    path = tmp_path_factory.mktemp("weights") / "backbone.npz"
    module = vit_jax.create_model("Ti/4", width=16, depth=1, heads=2, mlp_width=16)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]
    generator = np.random.default_rng(0)
    parameters = jax.tree.map(lambda leaf: generator.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
    weights.save(path, module, parameters)
    return path, module, parameters


@pytest.mark.slow
def test_a_model_without_a_head_gives_features_and_no_logits(headless):
    path, module, parameters = headless
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    backbone = vit_jax.load(path, normalize="half")
    expected = module.apply({"params": parameters}, jax.numpy.asarray(images / np.float32(127.5) - 1))
    np.testing.assert_allclose(backbone.features(images), expected, atol=1e-4)
    assert backbone.classes is None and "no head" in repr(backbone)
    for call in (backbone.logits, backbone.predict, backbone.probabilities):
        with pytest.raises(UserError, match=r"the model has no head, so it cannot classify\n  use \.features"):
            call(images)
    with pytest.raises(UserError, match="has no head"):
        inference.of_file(path)


def test_arguments_of_the_other_kind_of_source_are_refused(digits_run, headless):
    with pytest.raises(UserError, match=r"image_size cannot be combined with the run .*\n  omit image_size"):
        vit_jax.load(digits_run, image_size=16)
    with pytest.raises(UserError, match=r"step is 3, but .* is not a run\n  omit step"):
        vit_jax.load(headless[0], step=3)


# --- train ------------------------------------------------------------------------------------------------------------

TRAINED = {"checkpoint": {"every": 5}, "train": {"steps": 20, "evaluate_every": 10, "steps_per_dispatch": 2}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return vit_jax.train(tiny_config(TRAINED), tmp_path_factory.mktemp("api") / "run")


@pytest.mark.slow
def test_the_result_has_the_metrics_of_the_summary(trained, digits):
    summary = json.loads((trained.workdir / "summary.json").read_text())
    assert trained.finished and trained.steps == 20 and dict(trained.metrics) == summary
    assert (trained.accuracy, trained.loss) == (summary["test/accuracy"], summary["test/loss"])
    assert {"accuracy", "loss", "model"} <= set(dir(trained)) and "test accuracy" in repr(trained)
    assert [record["step"] for record in trained.history][-1] == 20
    logits = trained.model().logits(digits.images)
    assert (logits.argmax(axis=1) == digits.labels).mean() == pytest.approx(trained.accuracy)
    with pytest.raises(AttributeError, match="no 'recall'; its metrics are test/accuracy"):
        trained.recall  # noqa: B018
    assert dataclasses.replace(trained, steps=3).steps == 3


@pytest.mark.slow
def test_training_again_returns_the_finished_run_and_trains_nothing(trained):
    before = {path: path.stat().st_mtime_ns for path in trained.workdir.rglob("*")}
    assert vit_jax.train(tiny_config(TRAINED), trained.workdir) == trained
    assert {path: path.stat().st_mtime_ns for path in trained.workdir.rglob("*")} == before


@pytest.mark.slow
def test_it_trains_in_a_thread_and_resumes_after_max_minutes(trained, tmp_path):
    results = []

    def work(**options):
        results.append(vit_jax.train(tiny_config(TRAINED), tmp_path / "run", **options))

    for options in ({"max_minutes": 1e-9}, {"max_minutes": None}):
        thread = threading.Thread(target=work, kwargs=options)
        thread.start()
        thread.join()
    stopped, finished = results
    assert (stopped.finished, stopped.steps) == (False, 0) and "stopped, saved at step 0" in repr(stopped)
    assert finished.finished and finished.metrics["test/loss"] == trained.metrics["test/loss"]


@pytest.mark.slow
def test_ctrl_c_saves_raises_and_resumes_to_the_same_result(trained, tmp_path, monkeypatch):
    before, calls = signal.getsignal(signal.SIGINT), []
    stop_requested = Run.stop_requested

    def interrupted(run):
        calls.append(run.step)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return stop_requested(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_requested", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vit_jax.train(tiny_config(TRAINED), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    with CheckpointManager(tmp_path, read_only=True) as checkpoints:
        assert 0 < checkpoints.steps()[-1] < 20
    resumed = vit_jax.train(tiny_config(TRAINED), tmp_path)
    assert resumed.finished and resumed.metrics["test/loss"] == trained.metrics["test/loss"]


@pytest.mark.slow
def test_several_seeds_have_a_result_each(trained, tmp_path):
    result = vit_jax.train(tiny_config(TRAINED), tmp_path, {"train.seeds": [3, 0]})
    each = [result.of_seed(seed).accuracy for seed in (3, 0)]
    assert result.seeds == (3, 0) and result.accuracy == pytest.approx(np.mean(each))
    assert each[1] == trained.accuracy and "over 2 seeds" in repr(result)
    with pytest.raises(UserError, match=r"holds the runs of several seeds\n  use \.of_seed\(3\)\.model\(\)"):
        result.model()
    with pytest.raises(UserError, match=r"seed 9 is not one of this run\n  allowed: 3, 0"):
        result.of_seed(9)
