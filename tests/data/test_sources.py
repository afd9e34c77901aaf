"""Sources compared with scikit-learn, TFDS and published statistics; the cache; error messages."""

import collections
import os
import threading
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

from vit_jax.data import cache, digits, sources, splits
from vit_jax.data.preparation import Preparation, fit
from vit_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")


def write_tfds(
    data_dir, name, images, labels, *, shape, names=("ant", "bee"), encoding="png", file_format="array_record"
):
    """Prepares a small set in `data_dir` with TFDS's writer; `images` maps each split to a list of uint8 arrays."""

    def info(builder):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=shape, encoding_format=encoding),
                "label": tfds.features.ClassLabel(names=list(names)),
            }
        )
        return tfds.core.DatasetInfo(builder=builder, features=features)

    def examples(split):
        for index, (image, label) in enumerate(zip(images[split], labels[split], strict=True)):
            yield index, {"image": Image.fromarray(image), "label": int(label)}

    with tfds.core.registered.skip_registration():
        builder_class = type(
            name.title(),
            (tfds.core.GeneratorBasedBuilder,),
            {
                "VERSION": tfds.core.Version("1.0.0"),
                "name": name,
                "_info": info,
                "_split_generators": lambda self, dl_manager: {
                    split: self._generate_examples(split) for split in images
                },
                "_generate_examples": lambda self, split: examples(split),
            },
        )
    builder = builder_class(data_dir=data_dir)
    builder._make_download_manager = lambda **_: collections.namedtuple("Manager", "downloaded_size")(0)
    builder.download_and_prepare(file_format=file_format)
    return Path(builder.data_dir)


def random_images(rng, sizes, channels):
    return [rng.integers(0, 256, (*size, channels), dtype=np.uint8).squeeze() for size in sizes]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Returns the data_dir of a set of 30 train and 7 test images, 6x5 RGB, and its examples as TFDS reads them."""
    data_dir = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    images = {"train": random_images(rng, [(6, 5)] * 30, 3), "test": random_images(rng, [(6, 5)] * 7, 3)}
    labels = {split: rng.integers(0, 2, len(items)) for split, items in images.items()}
    write_tfds(data_dir, "tiny", images, labels, shape=(6, 5, 3))
    read = tfds.data_source("tiny", data_dir=data_dir)
    return data_dir, {split: list(read[split]) for split in read}


# --- digits ---

RECORDED_TRAIN = [8, 1, 7, 8, 9, 0, 3, 7, 5, 7, 8, 5]  # the first labels of each split; they never change
RECORDED_TEST = [9, 6, 6, 0, 6, 9, 3, 6, 5, 1, 9, 8]


def test_digits_match_scikit_learn_bit_for_bit():
    published = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = digits.split(published.target)
    expected = np.floor(published.images * 255 / 16 + 0.5).astype(np.uint8)[..., None]
    for split, indices in (("train", train), ("test", test)):
        source = sources.load("digits", split)
        chex.assert_trees_all_equal(source.images, expected[indices])
        chex.assert_trees_all_equal(source.labels, published.target[indices].astype(np.int32))
    assert sorted([*train, *test]) == list(range(1797))


def test_digits_split_is_stratified_and_never_changes():
    train, test = sources.load("digits", "train"), sources.load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    per_class = np.bincount(train.labels) + np.bincount(test.labels)
    assert np.abs(np.bincount(test.labels) - per_class * 360 / 1797).max() < 1
    # Shuffled: the class frequencies of the first half pass a chi-squared test with 9 degrees of freedom.
    for split in (train, test):
        half = np.bincount(split.labels[: len(split) // 2], minlength=10)
        expected = np.bincount(split.labels) / 2
        assert ((half - expected) ** 2 / (expected / 2)).sum() < 25
    assert test.class_names == tuple("0123456789")
    assert train.labels[:12].tolist() == RECORDED_TRAIN
    assert test.labels[:12].tolist() == RECORDED_TEST


def test_mean_and_std_are_computed_from_the_whole_train_split():
    whole = sources.load("digits", "train")
    pixels = whole.images / 255
    for split in ("train", "train[:10%]", "test"):
        source = sources.load("digits", split)
        np.testing.assert_allclose(source.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(source.std, pixels.std((0, 1, 2)), rtol=1e-12)


def test_read_returns_the_images_in_the_order_of_the_indices():
    source = sources.load("digits", "test")
    indices = np.array([5, 0, 359, 5])
    chex.assert_shape(source.read(indices), (4, 8, 8, 1))
    chex.assert_trees_all_equal(source.read(indices), np.stack([source.images[i] for i in indices]))


# --- split expressions ---

EXPRESSIONS = [
    "train",
    "test",
    "train[:98%]",
    "train[98%:]",
    "train[500:]",
    "train[:-500]",
    "train[10%:20%]",
    "train[-3:]",
    "train[:-1%]",
    "train[33.3%:66.6%]",
    "train+test",
    "train[:3]+test[2:4]+train[5:6]",
    "train[:50%]+train[50%:]",
    "all",
    "train[1:20%]",
    "train[0:1]",
    "train[:1_0]",
    "train[-100%:]",
    "train[:100%]",
    "train+train[:1]",
    "train[15%:85%]",
    "train[2.5%:]",
]


@pytest.mark.parametrize(
    "sizes", [{"train": 1437, "test": 360}, {"train": 50_000, "test": 10_000}, {"train": 1001, "test": 9}]
)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_split_expressions_match_tfds(expression, sizes):
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0) for name, size in sizes.items()}
    expected = []
    for absolute in tfds.core.splits.AbstractSplit.from_spec(expression).to_absolute(infos):
        stop = sizes[absolute.splitname] if absolute.to is None else absolute.to
        expected += [(absolute.splitname, index) for index in range(absolute.from_ or 0, stop)]
    found = [(p.split, index) for p in splits.parse(expression, sizes) for index in range(p.start, p.stop)]
    assert found == expected


@pytest.mark.parametrize(
    "expression",
    [
        "valid",
        "train[",
        "train[:]",
        "train[5:5]",
        "train[:0%]",
        "train[7:3]",
        "train[x:]",
        "train[:101%]",
        "train[:2000]",
        "train[5]",
        "train[5%]",
        "train[a:b:c]",
        "train[1:2:3]",
        "train[:1shard]",
        "train[:.]",
        "train++test",
        "all[:5]",
        "train[:1%]%",
        "",
        " train",
    ],
)
def test_malformed_split_expressions_are_explained(expression):
    with pytest.raises(UserError, match=r"train \(1,437 examples\), test \(360 examples\)") as caught:
        sources.load("digits", expression)
    assert repr(expression) in str(caught.value)
    assert str(caught.value).count("\n") < 3
    with pytest.raises(UserError):
        sources.check("digits", ["train", expression])


# --- TFDS ---


def test_tfds_set_is_read_as_by_tfds(tiny, tmp_path):
    data_dir, expected = tiny
    for split in ("train", "test"):
        source = sources.load("tiny", split, data_dir=data_dir, cache_dir=tmp_path)
        chex.assert_trees_all_equal(np.asarray(source.images), np.stack([e["image"] for e in expected[split]]))
        assert source.labels.tolist() == [e["label"] for e in expected[split]]
    train = np.stack([e["image"] for e in expected["train"]]) / 255
    np.testing.assert_allclose(source.mean, train.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(source.std, train.std((0, 1, 2)), rtol=1e-12)
    assert source.class_names == ("ant", "bee")


@pytest.mark.parametrize("split", ["train[:40%]", "train[3:-2]", "test+train[5:9]", "train[20:]+train[:4]"])
def test_slices_match_tfds(tiny, tmp_path, split):
    data_dir, _ = tiny
    expected = tfds.data_source("tiny", split=split, data_dir=data_dir, download=False)
    source = sources.load("tiny", split, data_dir=data_dir, cache_dir=tmp_path)
    chex.assert_trees_all_equal(np.asarray(source.images), np.stack([e["image"] for e in expected]))
    assert source.labels.tolist() == [e["label"] for e in expected]


def test_second_load_decodes_nothing_and_slices_copy_nothing(tiny, tmp_path, monkeypatch, capsys):
    data_dir, _ = tiny
    first = sources.load("tiny", "train", data_dir=data_dir, cache_dir=tmp_path)
    assert "decoding tiny train: 30 images (only once; cached in " in capsys.readouterr().err
    monkeypatch.setattr("vit_jax.data.images.decode", lambda *_: pytest.fail("decoded again"))
    second = sources.load("tiny", "train[10:20]", data_dir=data_dir, cache_dir=tmp_path)
    chex.assert_trees_all_equal(np.asarray(second.images), np.asarray(first.images[10:20]))
    assert (
        isinstance(second.images, np.memmap) and not second.images.flags.writeable and not second.images.flags.owndata
    )
    joined = sources.load("tiny", "train[:50%]+train[50%:]", data_dir=data_dir, cache_dir=tmp_path)
    assert isinstance(joined.images, np.memmap)
    assert capsys.readouterr().err == ""


def damage_truncate(folder):
    path = folder / "images.npy"
    os.truncate(path, path.stat().st_size - 1)


def damage_remove_labels(folder):
    (folder / "labels.npy").unlink()


def damage_lengthen(folder):
    with (folder / "images.npy").open("ab") as file:
        file.write(b"x")


def damage_empty(folder):
    (folder / "images.npy").write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_truncate, damage_remove_labels, damage_lengthen, damage_empty])
def test_damaged_cache_is_created_again(tiny, tmp_path, damage):
    data_dir, expected = tiny
    sources.load("tiny", "train", data_dir=data_dir, cache_dir=tmp_path)
    (folder,) = tmp_path.glob("*/train-*")
    damage(folder)
    (folder / "mean_std.json").write_text('{"mean": [0.')
    source = sources.load("tiny", "train", data_dir=data_dir, cache_dir=tmp_path)
    chex.assert_trees_all_equal(np.asarray(source.images), np.stack([e["image"] for e in expected["train"]]))
    assert len(source.mean) == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == ["train-6x5"]


def test_interrupted_decoding_leaves_no_files(tiny, tmp_path, monkeypatch):
    data_dir, _ = tiny
    monkeypatch.setattr("vit_jax.data.images.decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sources.load("tiny", "train", data_dir=data_dir, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*/*"))


def test_concurrent_writers_agree(tmp_path):
    barrier = threading.Barrier(4)
    results = []

    def fill(images, labels):
        barrier.wait()
        images[:], labels[:] = 7, 3

    def work():
        results.append(cache.open_or_create(tmp_path / "a" / "train", (5, 2, 2, 1), fill, title="t"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(int(r.images.sum()), int(r.labels.sum())) for r in results] == [(140, 15)] * 4
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["train"]


def test_unwritable_cache_is_not_required(tiny, tmp_path, capsys):
    data_dir, expected = tiny
    (tmp_path / "file").write_text("a file")
    source = sources.load("tiny", "train", data_dir=data_dir, cache_dir=tmp_path / "file" / "cache")
    assert source.labels.tolist() == [e["label"] for e in expected["train"]]
    assert not isinstance(source.images, np.memmap)
    assert capsys.readouterr().err.count("warning: cannot write the cache") == 1


def test_set_that_was_prepared_again_is_decoded_again(tmp_path):
    for value in (1, 2):
        data_dir = tmp_path / str(value)
        write_tfds(
            data_dir,
            "again",
            {"train": [np.full((4, 4, 3), value, np.uint8)] * 3},
            {"train": [0, 1, 1]},
            shape=(4, 4, 3),
        )
        source = sources.load("again", "train", data_dir=data_dir, cache_dir=tmp_path / "cache")
        assert (np.asarray(source.images) == value).all()


def test_grey_images_keep_one_channel(tmp_path):
    rng = np.random.default_rng(1)
    images = random_images(rng, [(7, 9)] * 5, 1)
    write_tfds(tmp_path, "grey", {"test": images}, {"test": [0, 1, 0, 1, 1]}, shape=(7, 9, 1))
    source = sources.load("grey", "test", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    chex.assert_shape(source.images, (5, 7, 9, 1))
    assert sorted(source.images.sum((1, 2, 3))) == sorted(image.sum() for image in images)
    # Without a train split, the statistics are those of the split that is read.
    np.testing.assert_allclose(source.mean, np.mean(images) / 255, rtol=1e-12)


def test_images_of_different_sizes_require_image_size(tmp_path):
    rng = np.random.default_rng(2)
    images = random_images(rng, [(12, 20), (31, 10), (8, 8)], 3)
    write_tfds(tmp_path, "mixed", {"train": images}, {"train": [0, 0, 1]}, shape=(None, None, 3))
    for function, split in ((sources.load, "train"), (sources.check, ["train"])):
        with pytest.raises(UserError, match=r"mixed.*differ in size(.|\n)*data\.image_size"):
            function("mixed", split, data_dir=tmp_path, cache_dir=tmp_path / "cache")
    source = sources.load("mixed", "train", data_dir=tmp_path, cache_dir=tmp_path / "cache", image_size=8)
    expected = {
        (8, 13): np.asarray(Image.fromarray(images[0]).resize((13, 8), Image.BICUBIC))[:, 2:10],
        (25, 8): np.asarray(Image.fromarray(images[1]).resize((8, 25), Image.BICUBIC))[8:16],
        (8, 8): images[2],
    }
    assert sorted(image.tobytes() for image in source.images) == sorted(image.tobytes() for image in expected.values())
    how = Preparation("center", 0.7, "bilinear", "transformers")
    where = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache", "image_size": 8}  # beside those of training
    expected = sorted(fit(Image.fromarray(image), (8, 8), how).tobytes() for image in images)
    for decoded in (True, False):
        source = sources.load("mixed", "train", preparation=how, decoded=decoded, **where)
        assert sorted(image.tobytes() for image in source.images[:]) == expected


def test_images_of_equal_size_are_resized_to_image_size(tiny, tmp_path):
    data_dir, expected = tiny
    source = sources.load("tiny", "test", data_dir=data_dir, cache_dir=tmp_path, image_size=(3, 10))
    resized = [Image.fromarray(e["image"]).resize((10, 12), Image.BICUBIC) for e in expected["test"]]
    chex.assert_trees_all_equal(np.asarray(source.images), np.stack([np.asarray(image)[4:7] for image in resized]))
    chex.assert_shape(sources.load("digits", "test", image_size=32).images, (360, 32, 32, 1))
    stored = sources.load("tiny", "test", data_dir=data_dir, cache_dir=tmp_path, preparation=Preparation(crop_pct=0.5))
    assert sorted(i.tobytes() for i in stored.images) == sorted(e["image"].tobytes() for e in expected["test"])


def test_damaged_or_missing_shard_is_named(tmp_path):
    images = random_images(np.random.default_rng(3), [(6, 5)] * 4, 3)
    folder = write_tfds(tmp_path, "torn", {"train": images}, {"train": [0, 1, 0, 1]}, shape=(6, 5, 3))
    (shard,) = folder.glob("*array_record*")
    data = bytearray(shard.read_bytes())
    start = data.index(b"\x89PNG")
    data[start : start + 8] = bytes(8)
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"torn.*\n.*prepare it again"):
        sources.load("torn", "train", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    shard.unlink()
    with pytest.raises(UserError, match=r"torn-train.array_record.* is missing"):
        sources.check("torn", ["train"], data_dir=tmp_path)


def test_other_file_formats_and_features_are_refused(tmp_path):
    folder = write_tfds(tmp_path, "flat", {"train": [np.zeros((2, 2), np.uint8)]}, {"train": [0]}, shape=(2, 2, 1))
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="contains tfrecord files; array_record is required"):
        sources.check("flat", ["train"], data_dir=tmp_path)
    (folder / "dataset_info.json").write_text(info)
    features = folder / "features.json"
    features.write_text(features.read_text().replace('"label"', '"target"'))
    with pytest.raises(UserError, match=r"`label`.*required\n  it has: image, target"):
        sources.check("flat", ["train"], data_dir=tmp_path)
    features.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        sources.check("flat", ["train"], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar_10", "cifar10"),
        ("tiy", "tiny"),
        ("digit", "digits"),
        ("mnist", "tfds build mnist --file_format=array_record"),
        ("mnist:3.0.1", "not prepared"),
        ("cifar10:1.0.0", "plain name 'cifar10'"),
        ("tiny/other", "not known"),
        ("huggingface:mnist", "malformed name"),
        ("../tiny", "malformed name"),
        ("", "malformed name"),
    ],
)
def test_unreadable_sets_are_explained(tiny, tmp_path, name, message):
    data_dir, _ = tiny
    for function, split in ((sources.load, "train"), (sources.check, ["train"])):
        with pytest.raises(UserError) as caught:
            function(name, split, data_dir=data_dir, cache_dir=tmp_path)
        assert message in str(caught.value) and str(caught.value).count("\n") < 3


def test_version_and_data_dir_are_used(tiny, tmp_path, monkeypatch):
    data_dir, _ = tiny
    assert len(sources.load("tiny:1.0.0", "test", data_dir=str(data_dir), cache_dir=str(tmp_path))) == 7
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert len(sources.load("tiny", "train")) == 30
    assert list((tmp_path / "xdg" / "vit_jax" / "data").glob("tiny_1.0.0-*/train-6x5/images.npy"))


# --- real CIFAR ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
        ("cifar100", (0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
    ],
)
def test_cifar_is_complete(real_sets, tmp_path, name, mean, std):
    train = sources.load(name, "train", data_dir=real_sets, cache_dir=tmp_path)
    test = sources.load(name, "test", data_dir=real_sets, cache_dir=tmp_path)
    classes = len(train.class_names)
    assert np.bincount(train.labels).tolist() == [50_000 // classes] * classes
    assert np.bincount(test.labels).tolist() == [10_000 // classes] * classes
    np.testing.assert_allclose(train.mean, mean, atol=1e-5)
    np.testing.assert_allclose(train.std, std, atol=1e-5)
    assert (test.mean, test.std) == (train.mean, train.std)
