"""The command `vit-jax look`, and `vit_jax.look.draw`."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax import look
from vit_jax.errors import UserError

FILE = Path(__file__).resolve().parent / "weights" / "references" / "hf_dinov2_registers"


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    root = tmp_path_factory.mktemp("album")
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    return root


def run(capsys, *arguments):
    status = look.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def test_it_draws_the_images_below_a_directory(album, tmp_path, capsys):
    (album / "broken.png").write_bytes(b"nothing")
    out = tmp_path / "rollout.png"
    status, output, warned = run(capsys, f"--init={FILE}", "--what=rollout", f"--out={out}", "--dpi=50", album)
    (album / "broken.png").unlink()
    assert status == 1 and "broken.png: cannot be read as an image" in warned
    assert output.startswith(f"wrote {out}: rollout of {FILE}, ")
    with Image.open(out) as picture:
        assert f"{picture.width}x{picture.height} pixels" in output


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_the_suffix_is_the_format(tmp_path, capsys, suffix):
    out = tmp_path / f"filters.{suffix}"
    assert run(capsys, f"--init={FILE}", "--what=filters", f"--out={out}")[0] == 0
    assert out.read_bytes()[:5] in (b"<?xml", b"%PDF-")


@pytest.mark.slow
def test_the_arrays_are_written_to_npz_and_are_those_of_python(album, tmp_path, capsys):
    out = tmp_path / "attention.npz"
    assert run(capsys, f"--init={FILE}", "--what=attention", "--layer=0", f"--out={out}", album)[0] == 0
    stored = np.load(out)["attention"]
    picture = look.draw("attention", FILE, [album / "0.png", album / "1.png"], layer=0)
    np.testing.assert_array_equal(stored, picture.arrays["attention"])
    assert stored.ndim == 4 and isinstance(picture, look.Picture)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what=rolout"], "there is no picture 'rolout'\n  nearest: rollout"),
        (["--what=filters", "image.png"], "--what=filters needs no images"),
        (["--what=rollout"], "--what=rollout: images are missing\n  name one or more images"),
        (
            ["--what=rollout", "--layer=1"],
            "--layer cannot be combined with --what=rollout\n  omit it; it is for positions, attention",
        ),
        (["--what=attention", "--patch=3"], "--patch=3\n  allowed: row and column from 0, such as 3,4"),
        (["--what=filters", "--out=filters.txt"], "--out=filters.txt has no known format\n  allowed: .png, .svg, .pdf"),
        (["--what=filters", "--out=nowhere/filters.png"], "--out=nowhere/filters.png cannot be written"),
        (["--what=filters", "--count=3"], "--count cannot be combined with --init"),
        (["--what=positions", "--layer=0"], "layer is 0, but the layers of this model have no positions of their own"),
        (["--what=filters", "--out=filters.pgf"], "--out=filters.pgf has no known format"),
        (["--what=filters", "--dpi=0"], "--dpi is 0\n  allowed: 30 to 1200"),
        (["--what=rollout", "--count=3"], "--count cannot be combined with --init"),
        (["--what=rollout", "missing.png"], "missing.png"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output, warned = run(capsys, f"--init={FILE}", *arguments)
    assert status == 2 and not output and message in warned
    assert len(warned[warned.index("error: ") :].splitlines()) <= 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("attention", {"patch": (1.5, 2)}, "patch is 1.5"),
        ("attention", {"patch": "3,4"}, "patch is '3,4'\n  allowed: a row and a column"),
        ("masks", {"mask": np.ones((2, 2), bool)}, "mask is .*\n  allowed: random, causal, local"),
    ],
)
def test_from_python_an_option_of_another_type_is_named(what, options, message):
    with pytest.raises(UserError, match=message):
        look.draw(what, FILE, np.zeros((1, 20, 20, 3), np.uint8), **options)


def test_no_images_are_an_error():
    with pytest.raises(UserError, match="rollout: there are no images"):
        look.draw("rollout", FILE, [])


def test_embeddings_of_texts_are_not_taken_for_classes(album, capsys, tmp_path):
    """A model with a text tower projects onto its embeddings, whose channels have no class names."""
    clip = FILE.parent / "clip"
    status, _, warned = run(capsys, f"--init={clip}", "--what=relevance", f"--out={tmp_path / 'x.png'}", album)
    assert status == 2 and "its outputs are embeddings, not classes (name some: --classes=cat,dog)" in warned


def test_a_line_of_a_file_name_is_one_line_of_a_caption(album, tmp_path):
    from vit_jax.visualization.subject import Subject

    subject = Subject(look._open(FILE), np.zeros((1, 20, 20, 3), np.uint8), ("new\nline.jpg",))
    assert "\n" not in subject.captions()[0]


def test_a_class_name_with_a_slash_is_written_whole():
    from vit_jax.visualization.subject import Subject

    subject = Subject(look._open(FILE), np.zeros((1, 20, 20, 3), np.uint8), ("true: cat/dog",))
    assert subject.captions() == ["true: cat/dog"]


def test_from_python_an_image_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.png: cannot be read as an image"):
        look.draw("rollout", FILE, [tmp_path / "broken.png"])
