"""Labels and class names as users have them: right, or refused with the way out."""

import csv
import json
import os
import random
import unicodedata

import numpy as np
import pytest
from helpers import THOROUGH
from PIL import Image

from vit_jax import atomic, fonts, predict, preview
from vit_jax.checkpoint import input_spec
from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.data import labels as label_files
from vit_jax.data import listing, sources
from vit_jax.errors import UserError
from vit_jax.inference import Guess, Prediction

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)


def load(root, labels, images=IMAGES, names=None, **stored):
    np.savez(root / "train.npz", **(stored or {"images": images, "labels": labels}))
    if names is not None:
        (root / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    return sources.load("arrays", "train", data_dir=root, cache_dir=root / "cache")


ZEROS = np.zeros(6, int)


@pytest.mark.parametrize(
    "labels, more, words",
    [
        (ZEROS + 4_102_444_800, {}, ["largest label is 4102444800", "1 different labels", "return_inverse=True"]),
        (np.array([2**63 + 5, 0, 1, 1, 0, 0], np.uint64), {}, ["largest label is 9223372036854775813", "ids"]),
        (np.arange(6) * 5_000, {}, ["largest label is 25000", "only 6 different", "0, 5000, 10000 and 3 more"]),
        (np.array([0, -1, 2, -7, 0, 0]), {}, ["2 of 6 labels are negative", "-7"]),
        (np.arange(6.0), {}, ["float64", "labels.astype(np.int64)"]),
        (ZEROS == 0, {}, ["bool", "labels.astype(np.int64)"]),
        (np.eye(6), {}, ["(6, 6)", "labels.argmax(axis=1)"]),
        (ZEROS[:, None], {}, ["(6, 1)", "labels[:, 0]"]),
        (np.array(["cat"] * 6), {}, ["<U3", "return_inverse=True"]),
        (np.array([1, "a", 2, 3, 4, 5], object), {}, ["Python objects", "np.array(values.tolist())"]),
        (ZEROS[:5], {}, ["(5,)", "expected: non-negative integers of shape (6,)"]),
        (np.arange(6), {"names": ["a", "b"]}, ["2 lines", "largest label is 5", "one per class"]),
        (ZEROS[:0], {"images": IMAGES[:0]}, ["(0, 4, 4, 3)", "at least one example"]),
        (ZEROS, {"images": np.zeros((6, 3, 8, 8), np.uint8)}, ["(6, 3, 8, 8)", "images.transpose(0, 2, 3, 1)"]),
        (ZEROS, {"images": np.zeros((8, 8, 3, 6), np.uint8)}, ["(8, 8, 3, 6)", "images.transpose(3, 0, 1, 2)"]),
        (ZEROS, {"images": np.zeros((6, 3072), np.uint8)}, ["(6, 3072)", ".reshape(-1, 3, 32, 32)"]),
        (ZEROS, {"images": IMAGES / 255}, ["float64", "(255 * images).round().astype('uint8')"]),
        (ZEROS, {"images": IMAGES.astype(np.uint16)}, ["uint16", "(images >> 8)"]),
        (None, {"x": IMAGES, "y": ZEROS}, ["no array 'images'", "x, y", "images=..., labels=..."]),
    ],
    ids=[
        *("ids", "64-bit ids", "sparse ids", "negative", "floats", "bool", "one-hot", "column", "text", "objects"),
        *("too few", "too few names", "no example", "channels first"),
        *("examples last", "flat", "float images", "16 bits", "other names"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, more, words, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, labels, **more)
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) <= 3


COCO = np.array([1, 90, 13, 44, 1, 90])


@pytest.mark.parametrize(
    "labels, classes",
    [
        (COCO, 91),
        (np.arange(1, 7), 7),
        (np.array([0, 1, 2, 0, 1, 2], ">i8"), 3),
        (np.array([0, 1, 2, 0, 1, 2], np.uint8), 3),
        (np.asfortranarray(np.arange(12).reshape(6, 2))[:, 0] % 4, 3),
        (np.array([0, 999, 5, 0, 0, 0]), 1000),
    ],
    ids=["gaps", "from 1", "big-endian", "bytes", "not contiguous", "999"],
)
def test_labels_of_any_integer_type_are_classes(labels, classes, tmp_path, capsys):
    source = load(tmp_path, labels, images=np.asfortranarray(IMAGES))
    np.testing.assert_array_equal(source.labels, labels)
    np.testing.assert_array_equal(source.read(np.arange(6)), IMAGES)
    assert source.class_names == tuple(map(str, range(classes)))
    empty = classes - len({*labels.tolist()})
    assert (f"{empty} of {classes:,} classes without examples" in capsys.readouterr().err) == (empty > 0)


def test_ids_are_classes_if_their_names_are_given(tmp_path):
    names = [f"class {number}" for number in range(30_000)]
    assert load(tmp_path, np.arange(6) * 5_000, names=names).class_names == tuple(names)


# --- files of class names ---------------------------------------------------------------------------------------------

NAMES = [
    "caf\u00e9",
    "\u732b",
    "\u043a\u043e\u0448\u043a\u0430",
    "\u0642\u0637\u0629",
    'a, "b"',
    "line\u2028separator",
    "dog",
    "dog",
]
TEXT = "\n".join(NAMES)


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        f"{TEXT}\n".encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        f"{TEXT}\n\n \n\t\r\n".encode(),
        f"{TEXT}\r\n".encode("utf-8-sig").replace(b"\n", b"\r\n").replace(b"\r\r", b"\r"),
    ],
    ids=["plain", "byte order mark", "CRLF", "CR", "blank lines at the end", "from Windows"],
)
def test_class_names_are_read_as_written(content, tmp_path):
    (tmp_path / "classes.txt").write_bytes(content)
    assert label_files.read_names(tmp_path / "classes.txt") == tuple(NAMES)
    assert load(tmp_path, np.array([0, 7, 1, 2, 3, 4])).class_names == tuple(NAMES)


@pytest.mark.parametrize(
    "content, words",
    [
        ("cat\ncaf\u00e9\n".encode("latin-1"), ["Latin-1", "line 2", "0xe9", "iconv -f LATIN1"]),
        (TEXT.encode("utf-16"), ["UTF-16", "iconv -f UTF-16"]),
        ("cat\ndog".encode("utf-16-le"), ["UTF-16"]),
        (TEXT.encode("utf-32"), ["UTF-32", "iconv -f UTF-32"]),
        ("\u732b\n".encode("shift-jis"), ["not UTF-8"]),
        (b"cat\n\ndog\n", ["line 2 is blank"]),
        (b"\ncat\n", ["line 1 is blank"]),
        ("\u72d7\n".encode("gbk"), ["GBK", "iconv"]),
        (b'["cat", "dog"]', ["JSON", "one class name per line"]),
        (b'{\n"0": "cat",\n"1": "dog"\n}\n', ["JSON"]),
        (None, ["cannot be read", "No such file"]),
    ],
    ids=["Latin-1", "UTF-16", "UTF-16 without a mark", "UTF-32", "Shift JIS", "blank line", "blank first line", "GBK"]
    + ["JSON list", "JSON object", "none"],
)
def test_other_files_of_class_names_are_refused(content, words, tmp_path, capsys):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        label_files.read_names(path, "--classes")
    assert all(word in str(caught.value) for word in (f"--classes={path}", *words)), caught.value
    assert len(str(caught.value).splitlines()) <= 3
    assert predict.main(["--init=none.npz", f"--classes={path}", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err


# --- pictures ---------------------------------------------------------------------------------------------------------


def boxes(text, size=10):
    """The characters that the chosen font does not have, as drawn alone without shaping."""
    from PIL import ImageFont

    font, shown = fonts.fit(text, size)
    alone = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    box = bytes(alone.getmask("\U0010fffe"))
    return [c for c in shown if not c.isspace() and bytes(alone.getmask(c)) == box]


SCRIPTS = {
    "Latin": "caf\u00e9",
    "Cyrillic": "\u043a\u043e\u0448\u043a\u0430",
    "Chinese": "\u732b",
    "Arabic": "\u0642\u0637\u0629",
    "Devanagari": "\u0939\u093f\u0928\u094d\u0926\u0940",
    "emoji": "\U0001f408\u200d\u2b1b",
    "control": "a\nb\x1b[0m",
    "bytes": "k\udce4tzchen",
    "empty": "",
}


@pytest.mark.parametrize("directories", [fonts.DIRECTORIES, ()], ids=["fonts of the machine", "no fonts"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_pictures_show_names_of_every_script(script, directories, monkeypatch):
    monkeypatch.setattr(fonts, "DIRECTORIES", directories)
    fonts.fit.cache_clear()
    (line,) = preview.caption(np.array([0.0, 1.0]), ("other", SCRIPTS[script]), 0.0)
    assert not boxes(line)
    drawn = preview.sheet(np.full((1, 8, 8, 1), 255, np.uint8), [[line]], None)
    assert (drawn < 128).any()
    if not directories and script == "Chinese":
        assert fonts.fit(line, 10)[1] == r"100 %  \u732b"
    if script == "bytes":
        assert line == r"100 %  k\xe4tzchen"
    fonts.fit.cache_clear()


# --- fuzz: names of classes, folders and files ------------------------------------------------------------------------

PARTS = (
    *(
        "cat",
        "Dog",
        "\u732b",
        "\u043a\u043e\u0442",
        "\u0642\u0637\u0629",
        "\U0001f408",
        "e\u0301",
        "\u00e9",
        "\u1e9b\u0323",
        "\u200f",
        "\u0000".strip("\0"),
    ),
    *(
        " ",
        "-",
        "--help",
        ".",
        "=",
        ",",
        '"',
        "'",
        "\n",
        "\r",
        "\t",
        "\x1b[31m",
        "\x7f",
        "\\",
        "*",
        "[0]",
        "{}",
        "%s",
        "$HOME",
        "~",
        ":",
        ";",
    ),
    *(
        "x" * 60,
        "\udce4",
        "\udcff",
        "\u2028",
        "\ufeff",
        "#",
        "&",
        "<b>",
        "NaN",
        "null",
        "0",
        "\u0130",
        "\ufffd",
        "\u0660",
    ),
)


def random_name(generator):
    name = "".join(generator.choices(PARTS, k=generator.randint(1, 4)))
    name = os.fsencode(name)[:200].decode("utf-8", "surrogateescape")
    return name if name.strip(".") else f"{name}a"


@pytest.mark.slow
def test_random_names_of_folders_and_files_survive(tmp_path, capsys):
    generator, count = random.Random(0), 1000 if THOROUGH else 100
    names, tried = [random_name(generator) for _ in range(count)], 0
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    for start in range(0, count, 10):
        root, some = tmp_path / str(start), names[start : start + 10]
        for name in some:
            for split in ("train", "test"):
                folder = root / "set" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{name[:40]}.png", format="png")
        seen = {unicodedata.normalize("NFC", name) for name in some if not listing.is_hidden(name)}
        options = {"data_dir": root / "set", "cache_dir": root / "cache", "image_size": 2}
        if not seen:
            with pytest.raises(UserError):
                sources.load("folder", "train", **options)
            continue
        source = sources.load("folder", "train", **options)
        # Scanning: every visible folder is one class, and every class has its images.
        assert {unicodedata.normalize("NFC", name) for name in source.class_names} == seen
        assert len(source.class_names) == len(seen)
        visible = {*some} - {name for name in some if listing.is_hidden(name)}
        expected = [name for name in visible if not listing.is_hidden(f"{name[:40]}.png")]
        assert len(source) == len(expected)
        assert all(character.isprintable() or character == "\n" for character in capsys.readouterr().err)
        # data.json, predictions as JSON and as CSV.
        spec = InputSpec("folder", (2, 2, 3), source.mean, source.std, {"label": source.class_names})
        input_spec.write(root, spec)
        assert input_spec.read(root) == spec
        assert json.loads(atomic.to_json({"dir": str(root / "set" / some[0])}))["dir"] == str(root / "set" / some[0])
        (caption,) = preview.caption(np.ones(1), source.class_names[:1], 0.0)
        assert "\n" not in caption and not boxes(caption)
        guesses = tuple(Guess(name, 0.5) for name in source.class_names)
        prediction = Prediction(source.describe(0), {"label": guesses}, {})
        line = predict._json(prediction, False)
        assert [guess["label"] for guess in json.loads(line)["predictions"]] == list(source.class_names)
        assert "\n" not in line and json.loads(line)["path"] == source.describe(0)
        predict._write_csv(str(root / "p.csv"), ["path", "rank", "class", "p"], predict._rows(prediction, False))
        with open(root / "p.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.reader(file))
        assert [row[2] for row in rows[1:]] == list(source.class_names) and rows[1][0] == source.describe(0)
        tried += len(some)
    assert tried > 0.9 * count


# --- other classes than the run was trained with ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, words",
    [
        (("ant", "caf\u00e9"), None),
        (("ant", "cafe\u0301"), None),
        (("caf\u00e9", "ant"), ["'caf\u00e9' in place of 'ant'"]),
        (("bee", "caf\u00e9"), ["'bee' in place of 'ant'", "train in another --workdir"]),
        (("ant",), ["2, the data now has 1"]),
        (("ant", "caf\u00e9", "dog"), ["2, the data now has 3"]),
    ],
    ids=["the same", "another Unicode form", "another order", "renamed", "fewer", "more"],
)
def test_a_run_is_not_continued_or_evaluated_with_other_classes(names, words, tmp_path):
    input_spec.check_classes(tmp_path, {"label": names})  # nothing is recorded yet
    spec = InputSpec("folder", (8, 8, 3), (0.5,) * 3, (0.5,) * 3, {"label": ("ant", "caf\u00e9")})
    input_spec.write(tmp_path, spec)
    if words is None:
        input_spec.check_classes(tmp_path, {"label": names})
        return
    with pytest.raises(UserError) as caught:
        input_spec.check_classes(tmp_path, {"label": names})
    assert all(word in str(caught.value) for word in (str(tmp_path), *words)), caught.value
    assert len(str(caught.value).splitlines()) <= 3
