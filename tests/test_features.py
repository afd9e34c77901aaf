"""Features computed once and stored, and heads that are trained on nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config as options
from vit_jax import evaluate, features, weights
from vit_jax.checkpoint.manager import Checkpoints
from vit_jax.data import feature_store, sources
from vit_jax.errors import UserError
from vit_jax.training import build_model, train


def small_config(**sections):
    config = options.default()
    config.model.update(variant="Ti/4", width=16, depth=1, heads=2, mlp_width=16, pooling="mean", dropout=0.1)
    config.optimizer.update(learning_rate=1e-2, average_decay=0.9)
    config.train.update(batch_size=64, steps=60, evaluation_batch_size=50)
    config.mesh.devices, config.log.tensorboard = 1, False
    for section, values in sections.items():
        config[section].update(values)
    options.check(config)
    return config


def arrays(folder):
    """The parameters of the newest checkpoint, by name."""
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(folder.resolve() / "checkpoints") as checkpointer:
        state = checkpointer.load_checkpointables()["state"]
    leaves = jax.tree_util.tree_leaves_with_path(state["averaged"])
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A run whose features of train and test are stored, in a file and in a folder."""
    folder = tmp_path_factory.mktemp("backbone")
    train.train(small_config(), folder)
    assert features.main([f"--workdir={folder}", "--split=train"]) == 0
    assert features.main([f"--workdir={folder}", "--split=test", f"--out={folder / 'features' / 'test'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def heads(backbone, tmp_path_factory):
    """Two runs that train two heads on that backbone, frozen: on images, and on the stored features."""
    folders = {}
    for kind, data in (("images", {}), ("features", {"features": str(backbone / "features")})):
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = small_config(
            data={"labels": "label,parity", **data},
            optimizer={"trained": "head/*"},
            checkpoint={"init_from": str(backbone)},
        )
        train.train(config, folders[kind])
    return folders


def test_the_features_are_what_the_head_reads(backbone):
    digits = sources.load("digits", "train")
    model = build_model.build(small_config().model, classes=10, dtype=jnp.float32).clone(classes=None)
    parameters = arrays(backbone)
    tree = {}
    for name, leaf in parameters.items():
        *path, last = name.split("/")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[last] = leaf
    inputs = (digits.images / 255 - digits.mean[0]) / digits.std[0]
    wanted = model.apply({"params": tree}, jnp.asarray(inputs, jnp.float32))
    made = feature_store.read(backbone / "features" / "train.npz")
    np.testing.assert_allclose(made.features, wanted, atol=1e-5)
    logits = made.features @ parameters["head/logits/kernel"] + parameters["head/logits/bias"]
    assert (logits.argmax(1) == digits.labels).mean() > 0.5  # they are worth something


def test_labels_and_ids_lie_beside_them(backbone):
    test = sources.load("digits", "test")
    files = {path.stem: np.load(path, mmap_mode="r") for path in (backbone / "features" / "test").iterdir()}
    assert isinstance(files["features"], np.memmap) and files["features"].shape == (360, 16)
    np.testing.assert_array_equal(files["labels"], test.labels)
    np.testing.assert_array_equal(files["labels_parity"], test.labels % 2)
    assert list(files["ids"][[0, 359]]) == ["test:0", "test:359"]
    about = json.loads(str(files["about"]))
    assert (about["name"], about["split"], about["step"]) == ("digits", "test", 60)


def test_a_slice_has_the_ids_of_the_whole(backbone, tmp_path, capsys):
    out = tmp_path / "slice.npz"
    assert features.main([f"--workdir={backbone}", "--split=train[100:110]+test[:2]", f"--out={out}"]) == 0
    assert "features 12 x 16, labels (label, parity) and ids, by step 60" in capsys.readouterr().out
    made, train_features = feature_store.read(out), feature_store.read(backbone / "features" / "train.npz")
    assert list(made.ids) == [f"train:{place}" for place in range(100, 110)] + ["test:0", "test:1"]
    np.testing.assert_allclose(made.features[:10], train_features.features[100:110], atol=1e-6)


def test_heads_on_stored_features_come_out_as_on_images_with_a_frozen_backbone(heads):
    summaries = {kind: json.loads((folder / "summary.json").read_text()) for kind, folder in heads.items()}
    for metric in ("test/accuracy", "test/label/accuracy", "test/parity/accuracy", "test/examples"):
        assert summaries["images"][metric] == summaries["features"][metric]
    assert summaries["features"]["test/parity/accuracy"] > 0.6
    by_images, by_features = (arrays(heads[kind]) for kind in ("images", "features"))
    for name in by_images:
        np.testing.assert_allclose(by_features[name], by_images[name], atol=1e-5, err_msg=name)


def test_the_backbone_below_them_is_bitwise_what_it_was(backbone, heads):
    before = arrays(backbone)
    for folder in heads.values():
        after = arrays(folder)
        for name in before:
            if not name.startswith("head/"):
                np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_the_head_there_was_goes_on_under_its_name(backbone):
    before = arrays(backbone)
    model = build_model.build(small_config().model, classes={"label": 10, "parity": 2}, dtype=jnp.float32)
    taken, _ = weights.load_into(backbone, model, (8, 8), 1)
    np.testing.assert_array_equal(taken["head"]["label"]["logits"]["kernel"], before["head/logits/kernel"])
    assert not taken["head"]["parity"]["logits"]["kernel"].any()


def test_a_model_whose_head_learned_on_features_is_whole(heads, capsys):
    """Its checkpoint classifies images, without the stored features."""
    assert evaluate.main([f"--workdir={heads['features']}"]) == 0
    made = json.loads(capsys.readouterr().out)
    summary = json.loads((heads["features"] / "summary.json").read_text())
    assert made["test/accuracy"] == summary["test/accuracy"]
    assert made["test/loss"] == pytest.approx(summary["test/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_on_features_goes_on_where_it_stopped(backbone, heads, tmp_path):
    """Half of it, then the rest: the same parameters, bit for bit."""
    half = small_config(
        data={"labels": "label,parity", "features": str(backbone / "features")},
        optimizer={"trained": "head/*"},
        checkpoint={"init_from": str(backbone), "every": 30},
    )
    with pytest.MonkeyPatch.context() as patch:
        # The run ends as a killed one does: behind its save at step 30.
        saved = Checkpoints.save

        def save_and_stop(self, state, *rest):
            saved(self, state, *rest)
            self.wait()
            raise KeyboardInterrupt

        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(half, tmp_path)
    train.train(half, tmp_path)
    resumed, whole = arrays(tmp_path), arrays(heads["features"])
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)


@pytest.mark.slow
def test_features_of_another_backbone_are_refused(backbone, tmp_path):
    other = tmp_path / "other"
    train.train(small_config(train={"seed": 1, "steps": 1}), other)
    config = small_config(
        data={"features": str(backbone / "features")},
        optimizer={"trained": "head/*"},
        checkpoint={"init_from": str(other)},
    )
    with pytest.raises(UserError, match=r"train\.npz was computed by another backbone"):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"checkpoint": {}}, "config.data.features needs the backbone that made them"),
        ({"optimizer": {"trained": "encoder/*"}}, "config.data.features goes with heads alone"),
        ({"optimizer": {"trained": None}}, "config.data.features goes with heads alone"),
        ({"augment": {"flip": True}}, "config.data.features are of images as they are; config.augment.flip is True"),
    ],
)
def test_what_does_not_go_with_stored_features_is_refused(sections, said):
    given = {"data": {"features": "x"}, "optimizer": {"trained": "head/*"}, "checkpoint": {"init_from": "y"}}
    with pytest.raises(UserError) as caught:
        small_config(**{**given, **sections})
    assert str(caught.value).startswith(said)


def test_features_that_are_not_there_or_not_whole_are_named(backbone, tmp_path):
    with pytest.raises(UserError, match=r"has no features of the validation split\n  make them: python -m vit_jax"):
        feature_store.find(backbone / "features", "validation")
    torn = tmp_path / "torn.npz"
    torn.write_bytes((backbone / "features" / "train.npz").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"torn\.npz holds no features that can be read"):
        feature_store.read(torn)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no features that can be read"):
        feature_store.read(tmp_path / "empty")
    with pytest.raises(UserError, match=r"has no 'colour'\n  it has: label, parity"):
        feature_store.read(backbone / "features" / "train.npz").source(("colour",))


def test_nothing_but_features_is_replaced(backbone, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear")
    for out in (tmp_path / "mine", backbone, backbone / "features", tmp_path / "mine" / "notes.txt"):
        before = sorted(out.rglob("*"))
        assert features.main([f"--workdir={backbone}", "--split=test", f"--out={out}"]) == 2
        assert "holds what are no features" in capsys.readouterr().err
        assert sorted(out.rglob("*")) == before
    out = tmp_path / "new"
    for _ in range(2):
        assert features.main([f"--workdir={backbone}", "--split=test[:9]", f"--out={out}"]) == 0
    assert len(feature_store.read(out).ids) == 9 and not list(tmp_path.glob(".*"))


def test_features_of_other_examples_are_refused(backbone, tmp_path):
    for data in ({"train": "train[:10%]"}, {"name": "cifar10"}):
        config = small_config(
            data={"features": str(backbone / "features"), **data},
            optimizer={"trained": "head/*"},
            checkpoint={"init_from": str(backbone)},
        )
        with pytest.raises(UserError, match="is of digits train, not of"):
            train.train(config, tmp_path)


def test_a_split_without_a_name_needs_one_for_its_file(backbone, capsys):
    assert features.main([f"--workdir={backbone}", "--split=train[:9]"]) == 2
    assert "give --out=" in capsys.readouterr().err
