import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax import preview
from vit_jax.data import order, sources

DIGITS = ["--config=configs/digits.py", "--config.augment.rotation=0", "--config.augment.scaling=0"]


def draw(tmp_path, *arguments):
    out = tmp_path / "sheet.png"
    assert preview.main([*DIGITS, f"--out={out}", *arguments]) == 0
    return np.asarray(Image.open(out))


def test_sheet_contains_the_enlarged_images_of_the_step(tmp_path, capsys):
    drawn = draw(tmp_path, "--config.augment.mixup=0", "--count=3", "--step=2")
    assert "3 images of step 2" in capsys.readouterr().out
    digits = sources.load("digits", "train")
    expected = digits.images[order.indices(0, 2 * 64, 3, len(digits))]
    for index, image in enumerate(expected):
        left = 6 + index * (96 + 6)
        tile = drawn[6 : 6 + 96, left : left + 96]
        np.testing.assert_array_equal(tile[6::12, 6::12], np.broadcast_to(image, (8, 8, 3)))


def test_patches_are_separated_by_white_lines(tmp_path):
    drawn = draw(tmp_path, "--config.augment.mixup=0", "--count=1", "--patches")
    assert drawn.shape[1] == 96 + 3 * 2 + 2 * 6  # 4 x 4 patches of 2 pixels, of 12 each
    assert (drawn[6 : 6 + 96, 6 + 24 : 6 + 26] == 255).all()


def test_captions_show_the_mixed_classes():
    names = tuple("abcd")
    assert preview.caption(np.array([0.0, 0.7, 0.3, 0.0]), names, 0.0) == ["70 %  b", "30 %  c"]
    assert preview.caption(np.array([0.025, 0.025, 0.025, 0.925]), names, 0.1) == ["92 %  d"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--count=65"], "1 to 64"),
        (["--step=-1"], "at least 0"),
        (["--config.augment.policy=nothing"], "policy"),
    ],
)
def test_user_errors_are_reported_in_at_most_three_lines(tmp_path, arguments, message, capsys):
    assert preview.main([*DIGITS, f"--out={tmp_path / 'x.png'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 3
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["nowhere/x.png", "x.txt", ""])
def test_an_output_file_that_cannot_be_written_is_named_before_the_work(tmp_path, name, capsys, monkeypatch):
    monkeypatch.setattr(preview, "batch", lambda *_: pytest.fail("images were drawn"))
    assert preview.main([*DIGITS, f"--out={tmp_path}/{name}", "--count=1"]) == 2
    assert f"--out={tmp_path}/{name}" in capsys.readouterr().err


def test_former_command_name_still_works():
    command = [sys.executable, "-m", "vit_jax.data.show", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert "python -m vit_jax.preview" in run.stdout
