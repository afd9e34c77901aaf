"""Image directories and NumPy files: their content is read exactly, and errors name the file."""

import shutil

import numpy as np
import pytest
from PIL import Image

from vit_jax import config as options
from vit_jax.config.check import check_config
from vit_jax.data import lazy_images, sources
from vit_jax.errors import UserError


def random_image(seed, size=(12, 10), channels=3):
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


@pytest.fixture
def tree(tmp_path):
    """Returns a directory with 10 cats and 6 dogs in train/ and 3 dogs in test/, in several image formats."""
    for split, counts in {"train": {"cat": 10, "dog": 6}, "test": {"dog": 3}}.items():
        for label, count in counts.items():
            folder = tmp_path / "set" / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                image = random_image(k + 100 * ord(label[0]) + len(split))
                Image.fromarray(image).save(folder / f"{k}.{('png', 'webp', 'bmp')[k % 3]}", lossless=True)
    return tmp_path / "set"


def load(root, split="train", **options):
    options = {"cache_dir": root.parent / "cache", "image_size": (12, 10)} | options
    return sources.load("folder", split, data_dir=root, **options)


def decode_with_pillow(root, split):
    """Returns the label of every file of a split, by its pixels as decoded with Pillow."""
    found = {}
    for label, name in enumerate(("cat", "dog")):
        for path in (root / split / name).glob("*"):
            found[np.asarray(Image.open(path).convert("RGB")).tobytes()] = label
    return found


@pytest.mark.parametrize("decoded", [True, False])
def test_image_directory_contains_every_file_once_with_its_class(tree, decoded):
    for split, count in (("train", 16), ("test", 3)):
        source, expected = load(tree, split, decoded=decoded), decode_with_pillow(tree, split)
        assert len(source) == count == len(expected)
        images = source.read(np.arange(count))
        assert {image.tobytes(): label for image, label in zip(images, source.labels.tolist(), strict=True)} == expected
        assert source.class_names == ("cat", "dog")
        pixels = np.frombuffer(b"".join(decode_with_pillow(tree, "train")), np.uint8).reshape(-1, 3) / 255
        np.testing.assert_allclose(source.mean, pixels.mean(0), rtol=1e-12)
        np.testing.assert_allclose(source.std, pixels.std(0), rtol=1e-12)
        assert isinstance(source.images, lazy_images.LazyImages) != decoded


def test_lazily_decoded_images_equal_cached_ones(tree):
    for split in ("train", "train[:50%]", "train[3:9]+test", "test[1:]"):
        for size in ((12, 10), 7):
            cached, lazy = (load(tree, split, decoded=decoded, image_size=size) for decoded in (True, False))
            np.testing.assert_array_equal(cached.images, lazy.read(np.arange(len(lazy))))
            np.testing.assert_array_equal(cached.labels, lazy.labels)
            assert (cached.mean, cached.std, cached.images.shape) == (lazy.mean, lazy.std, lazy.images.shape)


def test_second_load_does_not_scan_again(tree, monkeypatch, capsys):
    first = load(tree, decoded=False)
    assert "scanning folder train: 16 images" in capsys.readouterr().err
    monkeypatch.setattr("vit_jax.data.images.decode", lambda *_: pytest.fail("decoded again"))
    second = load(tree, decoded=False)
    assert (first.mean, first.labels.tolist()) == (second.mean, second.labels.tolist())
    assert capsys.readouterr().err == ""


def test_slices_of_a_directory_without_stored_splits_are_random_samples(tmp_path):
    for label, name in enumerate("ab"):
        (tmp_path / "one" / name).mkdir(parents=True)
        for k in range(100):
            Image.new("RGB", (4, 4), (label, k, 0)).save(tmp_path / "one" / name / f"{k:03}.png")
    first, rest = (load(tmp_path / "one", split, image_size=4) for split in ("train[:80%]", "train[80%:]"))
    assert (len(first), len(rest)) == (160, 40)
    seen = {tuple(image[0, 0, :2].tolist()) for source in (first, rest) for image in source.images}
    assert seen == {(label, k) for label in range(2) for k in range(100)}
    # 40 examples drawn from 100 and 100: 20 +- 5 standard deviations of 2.8 (hypergeometric).
    assert abs(int(rest.labels.sum()) - 20) < 14
    # Adding a file does not change the order of the others.
    before = [image.tobytes() for image in first.images]
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "one" / "a" / "new.png")
    after = [image.tobytes() for image in load(tmp_path / "one", "train", image_size=4).images]
    assert [image for image in after if image in before] == before


def test_every_image_mode_is_converted_to_rgb(tmp_path):
    folder = tmp_path / "set" / "only"
    folder.mkdir(parents=True)
    rgb, grey = random_image(1), random_image(2, channels=1)[..., 0]
    alpha = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    alpha[:3, :, 3] = 0
    files = {
        "grey.png": Image.fromarray(grey),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "palette.png": Image.fromarray(rgb).quantize(8),
        "alpha.png": Image.fromarray(alpha),
        "alpha.webp": Image.fromarray(alpha),
        "bilevel.png": Image.fromarray(grey > 127),
        "cmyk.jpg": Image.fromarray(rgb).convert("CMYK"),
        "rgb.JPEG": Image.fromarray(rgb),
    }
    expected = {}
    for name, image in files.items():
        image.save(folder / name, lossless=True)
        with Image.open(folder / name) as stored:
            expected[name] = np.asarray(stored.convert("RGB")).copy()
    expected["sixteen.png"] = expected["grey.png"] = np.dstack([grey] * 3)
    for name in ("alpha.png", "alpha.webp"):
        expected[name] = np.where(alpha[..., 3:] == 0, 255, rgb)
    source = load(tmp_path / "set", decoded=False)
    assert len(source) == len(expected)
    for index in range(len(source)):
        name = source.describe(index).rpartition("/")[2]
        np.testing.assert_array_equal(source.read([index])[0], expected[name], err_msg=name)


def damage(tree):
    (tree / "train" / "cat" / "notes.txt").write_text("no image")
    png = next((tree / "train" / "dog").glob("*.png"))
    png.write_bytes(png.read_bytes()[:150])
    (tree / "train" / "dog" / "empty.jpg").write_bytes(b"")
    (tree / "train" / "dog" / ".hidden").write_bytes(b"")
    return {"notes.txt", png.name, "empty.jpg"}


@pytest.mark.parametrize("decoded", [True, False])
def test_broken_file_is_named(tree, decoded):
    names = damage(tree)
    with pytest.raises(UserError) as caught:
        load(tree, decoded=decoded)
    message = str(caught.value)
    assert any(name in message for name in names) and "skip_broken" in message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize("decoded", [True, False])
def test_broken_files_are_skipped_and_counted_with_skip_broken(tree, decoded, capsys):
    pristine = {image.tobytes() for image in load(tree).images}
    names = damage(tree)
    for _ in range(2):  # the second time from the cached list
        source = load(tree, decoded=decoded, skip_broken=True)
        printed = capsys.readouterr().err
        assert "skipping 3 of 18 files" in printed and all(name in printed for name in names)
        assert len(source) == 15
        assert {image.tobytes() for image in source.read(np.arange(15))} < pristine


def test_errors_of_image_directories_are_explained(tree, tmp_path):
    def message(root, split="train", **options):
        with pytest.raises(UserError) as caught:
            load(root, split, **options)
        assert len(str(caught.value).splitlines()) <= 3
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    assert "image_size" in message(tree, image_size=None)
    assert "validation" in message(tree, "validation") and "train (16 examples)" in message(tree, "validation")
    (tmp_path / "flat").mkdir()
    Image.fromarray(random_image(0)).save(tmp_path / "flat" / "a.png")
    assert "no subdirectories" in message(tmp_path / "flat")
    (tree / "test" / "wolf").mkdir()
    assert "wolf" in message(tree, "test")
    with pytest.raises(UserError, match=r"config\.data\.dir"):
        sources.load("folder", "train")


def test_changed_file_is_read_again(tree):
    before = load(tree).images.copy()
    target = next((tree / "train" / "cat").glob("*.png"))
    Image.fromarray(random_image(5)).save(target)
    after = load(tree).images
    assert (before != after).any((1, 2, 3)).sum() == 1


# --- NumPy files ---


@pytest.fixture
def stored(tmp_path):
    root = tmp_path / "arrays"
    root.mkdir()
    images, labels = random_image(0, (20, 6, 5)), np.arange(20) % 3
    np.savez(root / "train.npz", images=images, labels=labels)
    np.save(root / "test_images.npy", images[:4, ..., 0])
    np.save(root / "test_labels.npy", labels[:4].astype(np.uint8))
    return root, images.reshape(20, 6, 5, 3), labels


def load_arrays(root, split, **options):
    return sources.load("arrays", split, data_dir=root, cache_dir=root.parent / "cache", **options)


@pytest.mark.parametrize("decoded", [True, False])
def test_arrays_are_read_as_stored(stored, decoded):
    root, images, labels = stored
    (root / "test_images.npy").unlink(), (root / "test_labels.npy").unlink()
    source = load_arrays(root, "train[2:]", decoded=decoded)
    np.testing.assert_array_equal(source.read(np.arange(18)), images[2:])
    np.testing.assert_array_equal(source.labels, labels[2:])
    assert source.class_names == ("0", "1", "2")
    (root / "classes.txt").write_text("ant\nbee\ncow\n")
    assert load_arrays(root, "train").class_names == ("ant", "bee", "cow")
    assert load_arrays(root, "train", image_size=3).images.shape == (20, 3, 3, 3)


def test_grey_arrays_need_no_channel_axis(stored):
    root, images, _ = stored
    (root / "train.npz").unlink()
    source = load_arrays(root, "test[1:]")
    np.testing.assert_array_equal(source.images[..., 0], images[1:4, ..., 0])


def spoil(root, name):
    if name == "pickle":
        np.savez(root / "train.npz", images=np.array([{"a": 1}], object), labels=np.zeros(1, int))
    elif name == "float":
        np.savez(root / "train.npz", images=np.zeros((3, 4, 4, 3), np.float32), labels=np.zeros(3, int))
    elif name == "length":
        np.savez(root / "train.npz", images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.zeros(2, int))
    elif name == "negative":
        np.savez(root / "train.npz", images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.array([0, -1, 2]))
    elif name == "no labels":
        np.savez(root / "train.npz", images=np.zeros((3, 4, 4, 3), np.uint8))
    elif name == "truncated":
        path = root / "train.npz"
        path.write_bytes(path.read_bytes()[:400])
    elif name == "alone":
        (root / "test_labels.npy").unlink()
    elif name == "names":
        (root / "classes.txt").write_text("ant\n")
    elif name == "channels":
        pass  # the splits of the fixture differ
    elif name == "nothing":
        shutil.rmtree(root)
        root.mkdir()


@pytest.mark.parametrize(
    "name, words",
    [
        ("pickle", ["train.npz", "cannot be read"]),
        ("float", ["float32", "uint8"]),
        ("length", ["labels", "(3,)"]),
        ("negative", ["labels"]),
        ("no labels", ["'labels'", "images"]),
        ("truncated", ["train.npz", "cannot be read"]),
        ("alone", ["test_labels.npy", "missing"]),
        ("channels", ["channels"]),
        ("nothing", ["no data", "train.npz"]),
    ],
)
def test_errors_of_arrays_are_explained(stored, name, words):
    root, *_ = stored
    spoil(root, name)
    with pytest.raises(UserError) as caught:
        load_arrays(root, "train")
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) <= 3


def test_too_few_class_names_are_refused(stored):
    root, *_ = stored
    (root / "test_images.npy").unlink()
    spoil(root, "names")
    with pytest.raises(UserError, match="one per class"):
        load_arrays(root, "train")


def test_config_check_does_not_decode_images(tree, monkeypatch):
    monkeypatch.setattr("vit_jax.data.images.decode", lambda *_: pytest.fail("decoded"))
    config = options.default()
    config.data.update(name="folder", dir=str(tree), image_size=8)
    config.train.steps = 1
    check_config(config)
    assert sources.check("folder", ["train", "test"], data_dir=tree, image_size=8) == (8, 8, 3)
