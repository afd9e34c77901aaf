"""Pictures of every kind of model, and the figures as they were when somebody last looked at them."""

import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import THOROUGH, mostly_slow
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.models.positions import POSITIONS
from vit_jax.visualization import pictures
from vit_jax.visualization.figures import Sheet

from .conftest import classifier, pixels

GOLDENS = Path(__file__).resolve().parent / "goldens"
DPI = 40
PICTURED = ["rollout", "attention", "distance", "features", "filters", "masks", "patches", "positions"]
MODELS = [
    *({"position": position, "size": (8, 12)} for position in POSITIONS if position not in ("none", "learned")),
    {"pooling": "map", "class_token": False, "registers": 2, "scan": True, "size": (8, 12)},
    {"pooling": "mean", "class_token": False},
    {"pooling": "mean", "registers": 1},
    {"pooling": "token_register", "registers": 1, "attention_norm": True},
    {"pooling": "token_mean", "classes": None, "parallel": True},
    {"pooling": "none"},
    {"pooling": "map", "pool_heads": 4},
    {"stem": (1, 1), "stem_width": 32, "patch_size": 1, "size": (32, 48)},
    {"classes": {"one": 5, "two": 3}},
    {"qk_norm": True, "norm": "rms", "scan": True, "remat": True},
    {"channels": 1, "norm_after_pooling": True, "pooling": "mean"},
]


def render(figure, **options):
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, **options)
    return np.asarray(Image.open(stream).convert("RGB"), np.float32)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("fields", mostly_slow(MODELS[:: 1 if THOROUGH else 3], 100), ids=str)
def test_every_kind_of_model_has_every_picture_that_is_defined_for_it(fields):
    fields = dict(fields)
    size, channels = fields.pop("size", (8, 8)), fields.pop("channels", 3)
    model, images = classifier(size, channels, **fields), pixels(2, size, channels)
    side = 2 if model.model.stem is None else 8
    grid = size[0] // side, size[1] // side
    kinds = ("positions", "rollout") if "position" in fields else pictures.KINDS
    for what in kinds:
        if what == "relevance" and (model.model.classes is None or model.model.pooling == "none"):
            continue
        picture = pictures.draw(what, model, images)
        assert all(np.isfinite(array).all() for array in picture.arrays.values())
        if what in ("rollout", "relevance"):
            assert picture.arrays[what].shape == (2, *grid)
        if what == "attention":
            heads = (model.model.pool_heads or 2) if model.model.pooling == "map" else 2
            assert picture.arrays[what].shape == (2, heads, *grid)
    assert render(picture.figure).std() > 1


@pytest.mark.slow
def test_the_row_of_rollout_is_that_of_what_the_head_reads():
    """Mean pooling: the mean of the patches' rows; attention pooling: the rows weighted by the query of the pooling."""
    import jax

    from vit_jax.models.intermediates import apply_with_intermediates

    for pooling in ("mean", "map"):
        model, images = classifier(pooling=pooling, class_token=False), pixels(2)
        inputs = jax.jit(model.augment.normalize)(images)
        _, inside = jax.jit(lambda p, x, m=model.model: apply_with_intermediates(m, {"params": p}, x))(
            model.parameters, inputs
        )
        joint = np.broadcast_to(np.eye(16), (2, 16, 16))
        for layer in np.asarray(inside.weights, np.float64):
            joint = (layer.mean(axis=1) + np.eye(16)) / 2 @ joint
        if pooling == "mean":
            expected = joint.mean(axis=1)
        else:
            expected = np.einsum("bt,btk->bk", np.asarray(inside.pooling, np.float64).mean(axis=1), joint)
        found = pictures.draw("rollout", model, images).arrays["rollout"]
        np.testing.assert_allclose(found.reshape(2, 16), expected, atol=1e-6)
        np.testing.assert_allclose(found.sum(axis=(1, 2)), 1, atol=1e-6)


@pytest.mark.slow
def test_patches_are_those_of_the_model_in_their_order(small):
    from vit_jax.models.patches import patchify

    images = pixels()
    found = pictures.draw("patches", small, images).arrays["patches"]
    np.testing.assert_array_equal(found.reshape(3, 16, 12), np.asarray(patchify(jnp.asarray(images), 2)))


@pytest.mark.parametrize("what", mostly_slow(PICTURED, 8))
def test_figures_look_as_they_did(small, what):
    """A picture differs little from the recorded one; fonts are drawn slightly differently elsewhere."""
    images = None if what in pictures.OF_PARAMETERS else smooth(2)
    found = render(
        pictures.draw(what, small, images, names=("a.png", "b.png")[: len(images) if images is not None else 0]).figure
    )
    expected = np.asarray(Image.open(GOLDENS / f"{what}.png").convert("RGB"), np.float32)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 2
    blocks = [array[: len(array) // 8 * 8, : array.shape[1] // 8 * 8] for array in (found, expected)]
    means = [array.reshape(len(array) // 8, 8, -1, 8, 3).mean(axis=(1, 3)) for array in blocks]
    assert np.abs(means[0] - means[1]).max() < 40


def smooth(count):
    """Images of a bright disc, so that the goldens are small and show something."""
    row, column = np.mgrid[:8, :8]
    disc = [255 * np.exp(-((row - 2 - 3 * index) ** 2 + (column - 4) ** 2) / 6) for index in range(count)]
    return np.stack([np.stack([one, one / 2, 255 - one], axis=-1) for one in disc]).astype(np.uint8)


@pytest.mark.slow
def test_text_that_is_too_long_is_cut_off_and_nothing_is_outside_the_figure(small):
    names = ("x" * 300, "\u5c0f\u732b.png")
    figure = pictures.draw("rollout", small, pixels(2), names=names, title="y" * 500).figure
    figure.canvas.draw()
    width, height = figure.bbox.size
    for text in figure.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text
    boxes = [text.get_window_extent() for text in figure.texts] + [axes.get_window_extent() for axes in figure.axes]
    pairs = [(a, b) for index, a in enumerate(boxes) for b in boxes[:index]]
    assert not [pair for pair in pairs if overlap(*pair) > 4]


def overlap(a, b):
    """The area of the intersection of two boxes, in pixels."""
    return max(0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0, min(a.y1, b.y1) - max(a.y0, b.y0))


@pytest.mark.parametrize("count", mostly_slow([2, 12, 3, 1], 4))
@pytest.mark.slow
def test_tiles_and_captions_do_not_overlap(small, count):
    for what in ("attention", "rollout", "patches", "masks"):
        figure = pictures.draw(what, small, pixels(count), names=[f"image {i}.jpeg" for i in range(count)]).figure
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in figure.texts]
        tiles = [axes.get_window_extent() for axes in figure.axes]
        for index, box in enumerate(boxes):
            assert not any(overlap(box, tile) > 2 for tile in tiles), (what, figure.texts[index])
            assert not any(overlap(box, other) > 2 for other in boxes[:index]), (what, figure.texts[index])


def test_a_sheet_has_room_for_its_title_and_its_bar():
    sheet = Sheet(1, 1, (1.0, 1.0), "a title that is wider than the only tile", "and a second line", bar=True)
    assert sheet.width > 2.5


def test_what_does_not_exist_is_named(small):
    with pytest.raises(UserError, match="there is no picture 'rolout'\n  nearest: rollout"):
        pictures.draw("rolout", small, pixels(1))
    with pytest.raises(UserError, match="rollout has no option layer\n  omit it; it is for positions, attention"):
        pictures.draw("rollout", small, pixels(1), layer=1)
    with pytest.raises(UserError, match="rollout: images are missing"):
        pictures.draw("rollout", small)
    with pytest.raises(UserError, match="layer is 2\n  allowed: 0 to 1, or -1 to -2"):
        pictures.draw("attention", small, pixels(1), layer=2)
    with pytest.raises(UserError, match="patch is 4,0\n  allowed: a row to 3 and a column to 3"):
        pictures.draw("attention", small, pixels(1), patch=(4, 0))
