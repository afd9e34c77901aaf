"""Features that are computed once and stored, and heads that are trained on them alone."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import saved_state, tiny_config

from vit_jax import evaluate, features, weights
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config.check import check_config
from vit_jax.data import feature_store, sources
from vit_jax.errors import UserError
from vit_jax.training import build_model, stored_features, train
from vit_jax.weights.save import flattened

pytestmark = pytest.mark.slow

STEPS = 60


SMALL = {
    "model": {"pooling": "mean", "dropout": 0.1},
    "optimizer": {"learning_rate": 1e-2, "average_decay": 0.9},
    "train": {"steps": STEPS, "evaluation_batch_size": 50},
}


def small_config(**sections):
    config = tiny_config(SMALL, **sections)
    check_config(config)
    return config


def averaged(workdir):
    """The averaged parameters of the last checkpoint."""
    return saved_state(workdir, STEPS)["averaged"]


def averaged_arrays(workdir):
    """The same by name."""
    return flattened(averaged(workdir))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A run directory with stored features: those of train as a file, those of test as a directory."""
    workdir = tmp_path_factory.mktemp("backbone")
    train.train(small_config(), workdir)
    assert features.main([f"--workdir={workdir}", "--split=train"]) == 0
    assert features.main([f"--workdir={workdir}", "--split=test", f"--out={workdir / 'features' / 'test'}"]) == 0
    return workdir


def heads_config(backbone, **data):
    """The config of a run that trains two heads on that backbone, which is frozen."""
    return small_config(
        data={"labels": ("label", "parity"), **data},
        optimizer={"trained": ("head/*",)},
        checkpoint={"init_from": str(backbone), "every": 30},
    )


@pytest.fixture(scope="module")
def heads(backbone, tmp_path_factory):
    """The directories of two such runs: one on images, the other on stored features."""
    workdirs = {}
    for kind, data in (("images", {}), ("features", {"features": str(backbone / "features")})):
        workdirs[kind] = tmp_path_factory.mktemp(kind)
        train.train(heads_config(backbone, **data), workdirs[kind])
    return workdirs


def test_features_are_the_input_of_the_head(backbone):
    digits = sources.load("digits", "train")
    model = build_model.build(small_config().model, classes=10, dtype=jnp.float32).clone(classes=None)
    parameters = averaged(backbone)
    inputs = (digits.images / 255 - digits.mean[0]) / digits.std[0]
    expected = model.apply({"params": parameters}, jnp.asarray(inputs, jnp.float32))
    stored = feature_store.read(backbone / "features" / "train.npz")
    np.testing.assert_allclose(stored.features, expected, atol=1e-5)
    head = parameters["head"]["logits"]
    logits = stored.features @ head["kernel"] + head["bias"]
    assert (logits.argmax(1) == digits.labels).mean() > 0.5  # the features are informative


def test_labels_and_ids_are_stored_with_the_features(backbone):
    test = sources.load("digits", "test")
    files = {path.stem: np.load(path, mmap_mode="r") for path in (backbone / "features" / "test").iterdir()}
    assert isinstance(files["features"], np.memmap) and files["features"].shape == (360, 16)
    np.testing.assert_array_equal(files["labels"], test.labels)
    np.testing.assert_array_equal(files["labels_parity"], test.labels % 2)
    assert list(files["ids"][[0, 359]]) == ["test:0", "test:359"]
    about = json.loads(str(files["about"]))
    assert (about["name"], about["split"], about["step"]) == ("digits", "test", 60)


def test_ids_of_a_slice_refer_to_the_stored_split(backbone, tmp_path, capsys):
    out = tmp_path / "slice.npz"
    assert features.main([f"--workdir={backbone}", "--split=train[100:110]+test[:2]", f"--out={out}"]) == 0
    assert "features 12 x 16, labels (label, parity) and ids; from step 60" in capsys.readouterr().out
    stored, train_features = feature_store.read(out), feature_store.read(backbone / "features" / "train.npz")
    assert list(stored.ids) == [f"train:{index}" for index in range(100, 110)] + ["test:0", "test:1"]
    np.testing.assert_allclose(stored.features[:10], train_features.features[100:110], atol=1e-6)


def test_heads_on_features_equal_heads_on_images(heads):
    summaries = {kind: json.loads((workdir / "summary.json").read_text()) for kind, workdir in heads.items()}
    for metric in ("test/accuracy", "test/label/accuracy", "test/parity/accuracy", "test/examples"):
        assert summaries["images"][metric] == summaries["features"][metric]
    assert summaries["features"]["test/parity/accuracy"] > 0.6
    on_images, on_features = (averaged_arrays(heads[kind]) for kind in ("images", "features"))
    for name in on_images:
        np.testing.assert_allclose(on_features[name], on_images[name], atol=1e-5, err_msg=name)


def test_the_frozen_backbone_does_not_change(backbone, heads):
    before = averaged_arrays(backbone)
    for workdir in heads.values():
        after = averaged_arrays(workdir)
        for name in before:
            if not name.startswith("head/"):
                np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_a_single_head_is_loaded_as_the_head_of_its_label(backbone):
    before = averaged_arrays(backbone)
    model = build_model.build(small_config().model, classes={"label": 10, "parity": 2}, dtype=jnp.float32)
    loaded, _ = weights.load_into(backbone, model, (8, 8), 1)
    np.testing.assert_array_equal(loaded["head"]["label"]["logits"]["kernel"], before["head/logits/kernel"])
    assert not loaded["head"]["parity"]["logits"]["kernel"].any()


def test_a_checkpoint_of_a_run_on_features_classifies_images(heads, capsys):
    assert evaluate.main([f"--workdir={heads['features']}"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    summary = json.loads((heads["features"] / "summary.json").read_text())
    assert metrics["test/accuracy"] == summary["test/accuracy"]
    assert metrics["test/loss"] == pytest.approx(summary["test/loss"], rel=1e-5)


def test_only_runs_on_images_write_data_json(heads):
    assert (heads["images"] / "data.json").exists() and not (heads["features"] / "data.json").exists()


def test_a_run_on_features_resumes_bit_for_bit(backbone, heads, tmp_path):
    config = heads_config(backbone, features=str(backbone / "features"))
    with pytest.MonkeyPatch.context() as patch:
        # The run is interrupted just after its checkpoint of step 30.
        save = CheckpointManager.save

        def save_and_stop(self, arrays, *rest):
            save(self, arrays, *rest)
            self.wait()
            raise KeyboardInterrupt

        patch.setattr(CheckpointManager, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path)
    train.train(config, tmp_path)
    resumed, uninterrupted = averaged_arrays(tmp_path), averaged_arrays(heads["features"])
    for name in uninterrupted:
        np.testing.assert_array_equal(resumed[name], uninterrupted[name], err_msg=name)


def test_features_of_another_backbone_are_refused(backbone, tmp_path):
    other = tmp_path / "other"
    train.train(small_config(train={"seed": 1, "steps": 1}), other)
    config = heads_config(other, features=str(backbone / "features"), labels=("label",))
    with pytest.raises(UserError, match=r"train\.npz was computed by another backbone"):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"checkpoint": {"init_from": None}}, "config.data.features requires the backbone that computed the features"),
        ({"optimizer": {"trained": ("encoder/*",)}}, "config.optimizer.trained is 'encoder/*', but only heads can be"),
        ({"optimizer": {"trained": None}}, "config.optimizer.trained is None, but only heads can be trained on"),
        ({"augment": {"flip": True}}, "config.augment.flip is True, but stored features (config.data.features) are"),
    ],
)
def test_options_that_stored_features_do_not_allow_are_refused(sections, message):
    config = heads_config("a/run")
    config.data.features = "a/run/features"
    stored_features.check_config(config)
    for section, values in sections.items():
        config[section].update(values)
    with pytest.raises(UserError) as caught:
        stored_features.check_config(config)
    assert str(caught.value).startswith(message)


def test_missing_and_damaged_features_are_reported(backbone, tmp_path):
    with pytest.raises(UserError, match=r"features of the validation split\n .* python -m vit_jax"):
        feature_store.find(backbone / "features", "validation")
    torn = tmp_path / "torn.npz"
    torn.write_bytes((backbone / "features" / "train.npz").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"torn\.npz"):
        feature_store.read(torn)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        feature_store.read(tmp_path / "empty")
    with pytest.raises(UserError, match=r"'colour'\n .*label, parity"):
        feature_store.read(backbone / "features" / "train.npz").source(("colour",))


def test_only_features_are_overwritten(backbone, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    for out in (tmp_path / "mine", backbone, backbone / "features", tmp_path / "mine" / "notes.txt"):
        before = sorted(out.rglob("*"))
        assert features.main([f"--workdir={backbone}", "--split=test", f"--out={out}"]) == 2
        assert f"--out={out}" in capsys.readouterr().err
        assert sorted(out.rglob("*")) == before
    out = tmp_path / "new"
    for _ in range(2):
        assert features.main([f"--workdir={backbone}", "--split=test[:9]", f"--out={out}"]) == 0
    assert len(feature_store.read(out).ids) == 9 and not list(tmp_path.glob(".*"))


def test_features_of_another_split_or_data_set_are_refused(backbone, tmp_path):
    for data in ({"train": "train[:10%]"}, {"name": "cifar10"}):
        config = heads_config(backbone, features=str(backbone / "features"), labels=("label",), **data)
        with pytest.raises(UserError, match="holds digits train, not"):
            train.train(config, tmp_path)


def test_a_split_expression_needs_an_output_file(backbone, capsys):
    assert features.main([f"--workdir={backbone}", "--split=train[:9]"]) == 2
    assert "add --out=" in capsys.readouterr().err
