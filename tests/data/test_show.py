import numpy as np
import pytest
from PIL import Image

from vit_jax.data import show, sources

DIGITS = ["--config=configs/digits.py", "--config.augment.rotation=0", "--config.augment.scaling=0"]


def drawn(tmp_path, *arguments):
    out = tmp_path / "sheet.png"
    assert show.main([*DIGITS, f"--out={out}", *arguments]) == 0
    return np.asarray(Image.open(out))


def test_a_sheet_holds_the_steps_images_enlarged(tmp_path, capsys):
    from vit_jax.data import order

    made = drawn(tmp_path, "--config.augment.mixup=0", "--count=3", "--step=2")
    assert "3 images of step 2" in capsys.readouterr().out
    digits = sources.load("digits", "train")
    wanted = digits.images[order.indices(0, 2 * 64, 3, len(digits))]
    for place, image in enumerate(wanted):
        left = 6 + place * (96 + 6)
        tile = made[6 : 6 + 96, left : left + 96]
        np.testing.assert_array_equal(tile[6::12, 6::12], np.broadcast_to(image, (8, 8, 3)))


def test_patches_are_drawn_apart(tmp_path):
    made = drawn(tmp_path, "--config.augment.mixup=0", "--count=1", "--patches")
    assert made.shape[1] == 96 + 3 * 2 + 2 * 6  # 4 x 4 patches of 2 pixels, of 12 each
    assert (made[6 : 6 + 96, 6 + 24 : 6 + 26] == 255).all()


def test_captions_name_what_is_mixed():
    names = tuple("abcd")
    assert show.caption(np.array([0.0, 0.7, 0.3, 0.0]), names, 0.0) == ["70% b", "30% c"]
    assert show.caption(np.array([0.025, 0.025, 0.025, 0.925]), names, 0.1) == ["92% d"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--count=65"], "1 to 64"),
        (["--step=-1"], "at least 0"),
        (["--config.augment.policy=nothing"], "policy"),
    ],
)
def test_mistakes_are_explained(tmp_path, arguments, words, capsys):
    assert show.main([*DIGITS, f"--out={tmp_path / 'x.png'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) <= 3
    assert not (tmp_path / "x.png").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    assert show.main([*DIGITS, f"--out={tmp_path}/nowhere/x.png", "--count=1"]) == 2
    assert "nowhere/x.png" in capsys.readouterr().err
