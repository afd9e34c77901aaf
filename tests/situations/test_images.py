"""Every image is decoded by a stated rule or refused by name: in training, with skip_broken and in prediction."""

import csv
import errno
import json
import os
import random
import signal
import socket

import numpy as np
import pytest
from helpers import THOROUGH, mostly_slow
from helpers_images import (
    DECODED,
    DEEP,
    GREY,
    JPEG,
    REFUSED,
    RGB,
    SHAPE,
    mutated,
    on_white,
    saved,
    valid_files,
)
from PIL import Image

from vit_jax import predict
from vit_jax.data import folder, images, sources, user_images
from vit_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


@pytest.mark.parametrize("name", DECODED)
def test_images_of_every_kind_show_what_was_written(name, tmp_path):
    content, expected, atol = DECODED[name]
    expected = np.asarray(expected, float)
    expected = expected if expected.ndim == 3 else expected[..., None].repeat(3, 2)
    (tmp_path / "image").write_bytes(content)
    for encoded in (content, tmp_path / "image"):
        np.testing.assert_allclose(images.decode(encoded, expected.shape), expected, rtol=0, atol=atol)
    # In grey, by the weights of ITU-R 601.
    grey = expected @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(images.decode(content, (*grey.shape, 1))[..., 0], grey, rtol=0, atol=atol + 1)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "HSV", "YCbCr", "I;16", "I;16B"])
def test_opened_images_are_converted_by_their_mode(mode):
    """Images of the user, which stay as they are; those of four channels are not blended."""
    image = Image.fromarray(RGB).convert("RGBA")
    image.putalpha(Image.fromarray(on_white(GREY)))
    if mode.startswith("I"):
        image = Image.fromarray(DEEP)
    else:
        image = (image.convert("LA") if mode == "La" else image).convert(mode)
    image = image if image.mode == mode else Image.frombytes(mode, image.size, DEEP.astype(">u2").tobytes())
    before = image.copy()
    plain = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}.get(mode, mode)
    expected = np.asarray(image.convert(plain).convert("RGBA"))
    if mode.startswith("I"):
        expected = np.dstack([*[DEEP >> 8] * 3, np.full_like(GREY, 255)])
    np.testing.assert_array_equal(images.convert(image, (*SHAPE[:2], 4)), expected)
    blended = 255 + (expected[..., :3] - 255.0) * (expected[..., 3:] / 255)
    np.testing.assert_allclose(images.convert(image, SHAPE), blended, rtol=0, atol=1)
    assert image == before


@pytest.mark.parametrize("mode, words", {"F": "floats", "I": "32 bits"}.items())
def test_opened_images_without_a_rule_are_refused(mode, words):
    with pytest.raises(images.ImageError, match=words):
        images.convert(Image.fromarray(GREY).convert(mode), SHAPE)


@pytest.mark.parametrize("name", ["float-tiff", "signed-32-bit-tiff", "signed-16-bit-tiff", "unsigned-32-bit-tiff"])
def test_the_conversion_that_is_advised_works(name, tmp_path):
    (tmp_path / "image.tif").write_bytes(REFUSED[name][0])
    advice = user_images.read(tmp_path / "image.tif", SHAPE).partition("scale all images alike: ")[2]
    with Image.open(tmp_path / "image.tif") as image:
        x = np.asarray(image)
    black, white = (0, 1) if x.dtype.kind == "f" else (-1024, 65535 - 1024)
    converted = eval(advice, {"x": x, "black": black, "white": white})
    expected = np.clip(np.round((x.astype(float) - black) / (white - black) * 255), 0, 255)
    np.testing.assert_array_equal(images.decode(saved(converted, "PNG"), SHAPE)[..., 0], expected)
    assert len(np.unique(expected)) > 20


# --- what is no readable image, in training, with skip_broken, in prediction ---


def make_link(path):
    path.symlink_to("/nowhere/gone.png")


def make_loop(path):
    path.symlink_to(path.name)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        server.bind(path.name)


def make_linked_device(path):
    path.symlink_to("/dev/zero")


def make_linked_pipe(path):
    os.mkfifo(path.parents[3] / "pipe")
    path.symlink_to(path.parents[3] / "pipe")


SPECIAL = {
    "dangling-link": (make_link, "/nowhere/gone.png, which does not exist"),
    "loop-of-links": (make_loop, "a loop of links"),
    "pipe": (os.mkfifo, "a pipe"),
    "linked-pipe": (make_linked_pipe, "a pipe"),
    "socket": (make_socket, "a socket"),
    "device": (make_linked_device, "a device"),
}


@pytest.fixture
def tree(tmp_path):
    """Returns an image directory with three readable images, one of them with an upper-case name."""
    for name in ("cat/a.png", "dog/B.PNG", "dog/c.png"):
        (tmp_path / "set/train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).save(tmp_path / "set/train" / name)
    return tmp_path / "set"


def load(root, **options):
    return sources.load("folder", "train", data_dir=root, cache_dir=root.parent / "cache", image_size=8, **options)


@pytest.fixture
def limits():
    """An image that blocks fails the test."""

    def stop(*_):
        pytest.fail("blocked")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_file_is_refused_or_skipped_and_never_opened(name, tree, monkeypatch, capsys, limits):
    monkeypatch.chdir(tree)
    (make, words), path = SPECIAL[name], tree / "train/cat/odd.png"
    make(path)
    files = [("train/cat/a.png", 0), ("train/cat/odd.png", 0)]
    with pytest.raises(UserError, match=words) as caught:
        folder.records(tree, files).read(1, SHAPE)
    assert str(caught.value).startswith(f"{path} cannot be read as an image: ")
    assert folder.skip_broken(tree, files, tree / "list.json") == files[:1] and words in capsys.readouterr().err
    assert not (tree / "list.json").exists()  # it may be readable next time
    assert words in user_images.read(path, SHAPE)


@pytest.mark.parametrize("name", mostly_slow(REFUSED, 3))
def test_what_is_no_image_is_refused_or_skipped_by_name(name, tree, capsys):
    path, (content, words) = tree / "train/cat/odd.png", REFUSED[name]
    path.write_bytes(content)
    for decoded in (True, False):
        with pytest.raises(UserError) as caught:
            load(tree, decoded=decoded)
        message = str(caught.value)
        assert message.startswith(f"{path} cannot be read as an image: ") and words in message
        assert len(message.splitlines()) <= 3 and "skip_broken=True" in message
    capsys.readouterr()
    for decoded in (True, False):  # the second time from the list of the first where there is one
        source = load(tree, decoded=decoded, skip_broken=True)
        error = capsys.readouterr().err
        assert len(source) == 3 and "skipping 1 of 4 files" in error and "cat/odd.png: " in error and words in error
    reason = user_images.read(path, SHAPE)
    assert isinstance(reason, str) and words in reason and "\n" not in reason


def test_a_directory_with_the_name_of_an_image_is_a_directory(tree):
    (tree / "train/cat/odd.png").mkdir()
    (tree / "train/cat/odd.png/inner.png").write_bytes(saved(RGB, "PNG"))
    assert len(load(tree)) == 4 and user_images.read(tree / "train/cat/odd.png", SHAPE) == "it is a directory"


def test_only_unreadable_files_are_an_error(tree):
    for path in (tree / "train").glob("*/*"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of 3 files can be decoded") as caught:
        load(tree, skip_broken=True)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE])
def test_errors_of_the_machine_are_not_the_image_s(number, tree, monkeypatch):
    """skip_broken leaves out no file because of them, now or later."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(images, "open", fail, raising=False)
    for skip_broken in (False, True):
        with pytest.raises(UserError, match=os.strerror(number)) as caught:
            load(tree, skip_broken=skip_broken)
        assert str(tree) in str(caught.value)
    assert "cannot be read now" in user_images.read(tree / "train/cat/a.png", SHAPE)
    monkeypatch.undo()
    assert len(load(tree, skip_broken=True)) == 3


@pytest.mark.parametrize(
    "error",
    [AttributeError("x"), TypeError(), OverflowError("x"), MemoryError(), RecursionError("x"), SystemError("x")]
    + [UserWarning("x"), AssertionError(), Image.DecompressionBombError("x"), RuntimeError("a\nb"), OSError("x")],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_the_image_s_fault(error, tree, monkeypatch, capsys):
    before, bad = Image.Image.load, tree / "train/cat/a.png"

    def fail(self):
        if self.size == (5, 5):
            raise error
        return before(self)

    bad.write_bytes(saved(RGB[:5, :5], "PNG"))
    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(UserError, match=str(bad)) as caught:
        load(tree)
    assert len(str(caught.value).splitlines()) <= 3
    assert len(load(tree, skip_broken=True)) == 2 and "cat/a.png: " in capsys.readouterr().err
    assert isinstance(user_images.read(bad, SHAPE), str)


def test_a_failure_that_may_pass_is_not_remembered(tree, monkeypatch):
    """A file that could not be read for want of memory or permission is tried again."""
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda self: (_ for _ in ()).throw(MemoryError) if self.width else None)
        with pytest.raises(UserError, match="more memory"):
            load(tree, skip_broken=True)
    assert len(load(tree, skip_broken=True)) == 3


def test_what_another_version_of_pillow_could_not_read_is_tried_again(tree, monkeypatch):
    (tree / "train/cat/odd.png").write_bytes(b"of a later format")
    assert len(load(tree, skip_broken=True)) == 3
    monkeypatch.setattr(images, "load", lambda *_: None)
    assert len(load(tree, skip_broken=True)) == 3
    monkeypatch.setattr("PIL.__version__", "99.0.0")
    monkeypatch.setattr(images, "decode", lambda _, shape, how: np.zeros(shape, np.uint8))
    assert len(load(tree, skip_broken=True)) == 4


def test_other_files_left_out_are_other_decoded_images(tree, monkeypatch):
    """As many images are left as before, but not the same."""
    fail, decode = "a.png", images.load

    def load_but_one(path, channels):
        if path.name == fail:
            raise images.ImageError("it is locked", is_final=False)
        return decode(path, channels)

    Image.fromarray(RGB[::-1].copy()).save(tree / "train/dog/c.png")
    monkeypatch.setattr(images, "load", load_but_one)
    first = load(tree, skip_broken=True).images.tobytes()
    fail = "c.png"
    assert first != load(tree, skip_broken=True).images.tobytes()


def test_images_decoded_by_older_rules_are_not_used(tree, monkeypatch, capsys):
    load(tree)
    assert "decoding" in capsys.readouterr().err
    load(tree)
    assert "decoding" not in capsys.readouterr().err
    monkeypatch.setattr(images, "RULES", images.RULES + 1)
    load(tree)
    assert "decoding" in capsys.readouterr().err


# --- size ---


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (3, 900), (900, 7), (40, 3000)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_strips_are_resized_as_a_whole_would_be(size, channels):
    steps = np.add.outer(np.arange(size[0]), np.arange(size[1])) % 200
    image = np.stack([steps, 255 - steps, steps // 2, np.full(size, 255)], 2)[..., :channels].astype(np.uint8)
    found = images.decode(saved(image if channels > 1 else image[..., 0], "PNG"), (32, 24, channels))
    whole = resized_whole(image if channels > 1 else image[..., 0], (32, 24))
    assert np.abs(found.astype(int) - whole.reshape(found.shape)).max() <= 1 and found.std() > 0


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1), (1, 10**6)])
def test_a_strip_costs_no_more_than_any_image(size, monkeypatch):
    resized, resize = [], Image.Image.resize

    def record(self, new_size, *arguments, **options):
        resized.append((new_size, self.size))
        return resize(self, new_size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", record)
    content = saved(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8), "PNG")
    assert images.decode(content, (32, 32, 3)).std() > 5
    assert [new for new, _ in resized] == [(32, 32)] and max(resized[0][1]) < 100


def resized_whole(image, size):
    """What docs/data.md says, by Pillow: resized to cover the size, then cropped at the centre."""
    factor = max(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = max(size[0], round(image.shape[0] * factor)), max(size[1], round(image.shape[1] * factor))
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    left, top = (width - size[1]) // 2, (height - size[0]) // 2
    return whole[top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize("size", [(8, 8), (20, 30), (5, 40), (40, 5), (3, 47)])
def test_images_of_usual_proportions_are_resized_as_a_whole(size):
    image = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8)
    expected = resized_whole(image, (9, 12))
    np.testing.assert_array_equal(images.decode(saved(image, "PNG"), SHAPE), expected)
    np.testing.assert_array_equal(images.resize_and_crop(image, (9, 12)), expected)


# --- random files ---


@pytest.mark.slow
def test_random_files_are_read_or_refused_by_all_alike(tmp_path, limits):
    """Damaged files of every format: no other error, no hang; training, skip_broken and prediction agree."""
    files, choice, count = valid_files(), random.Random(0), 1000 if THOROUGH else 150
    for index in range(count):
        path = tmp_path / f"set/train/{'cat' if index % 2 else 'dog'}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mutated(choice, files))
    readable, _ = set(), signal.alarm(600)
    spec = folder.dataset_spec(tmp_path / "set", None)
    records = spec.records("train")
    for index in range(records.count):
        try:
            assert records.read(index, SHAPE)[0].shape == SHAPE
            readable.add(records.describe(index))
        except UserError as error:
            assert str(error).startswith(records.describe(index)) and len(str(error).splitlines()) <= 3
    skipping = folder.dataset_spec(tmp_path / "set", tmp_path / "lists")
    kept = skipping.records("train")
    assert {kept.describe(index) for index in range(kept.count)} == readable
    assert f"skipping {count - len(readable):,} of {count:,} files" in skipping.skipped["train"]
    assert {path for path in readable if isinstance(user_images.read(path, SHAPE), np.ndarray)} == readable
    others = {records.describe(index) for index in range(count)} - readable
    assert all(isinstance(user_images.read(path, SHAPE), str) for path in others)
    assert 0.1 < len(readable) / count < 0.9


# --- names ---


@pytest.mark.slow
def test_predictions_of_odd_names_are_written(digits_run, tmp_path, capfdbinary, limits):
    """Names that are not UTF-8, upper-case extensions, directories with the names of images, pipes."""
    (tmp_path / "album/folder.png").mkdir(parents=True)
    shown = {"A.JPG", "folder.png/b.Jpeg", os.fsdecode(b"k\xe4tzchen.jpg")}
    for name in [*shown, ".hidden.jpg"]:
        (tmp_path / "album" / name).write_bytes(JPEG)
    os.mkfifo(tmp_path / "pipe.png")
    out = tmp_path / "out.csv"
    arguments = ["--json", f"--csv={out}", "--top=1", str(tmp_path / "album"), str(tmp_path / "pipe.png")]
    assert predict.main([f"--workdir={digits_run}", *arguments]) == 1
    captured = capfdbinary.readouterr()
    paths = [json.loads(line)["path"] for line in captured.out.splitlines()]
    assert {os.path.relpath(path, tmp_path / "album") for path in paths} == shown
    with open(out, newline="", errors="surrogateescape") as file:
        assert {row["path"] for row in csv.DictReader(file)} == set(paths)
    assert b"pipe.png: cannot be read as an image: it is a pipe" in captured.err
