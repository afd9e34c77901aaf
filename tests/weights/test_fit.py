import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.weights import fit


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 5), (16, 32), (1, 2)])
def test_a_patch_that_was_enlarged_keeps_its_embedding(old, new):
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(old * old * 3, 7)).astype("f")
    patch = generator.normal(size=(old, old, 3))
    enlarged = np.asarray(jax.image.resize(jnp.asarray(patch, jnp.float32), (new, new, 3), "bilinear"), np.float64)
    resized = fit.resize_patches(kernel, old, new)
    assert resized.shape == (new * new * 3, 7)
    np.testing.assert_allclose(enlarged.ravel() @ resized, patch.ravel() @ np.float64(kernel), atol=2e-4)


def test_a_patch_that_shrank_has_the_least_squares_embedding():
    """Smaller patches cannot keep every embedding: the kernel is then the best one, of all and of least norm."""
    kernel = np.random.default_rng(1).normal(size=(8 * 8, 2)).astype("f")
    basis = np.asarray(jax.image.resize(jnp.eye(64).reshape(64, 8, 8), (64, 4, 4), "bilinear"), np.float64)
    expected = np.linalg.lstsq(basis.reshape(64, 16), np.float64(kernel), rcond=None)[0]
    np.testing.assert_allclose(fit.resize_patches(kernel, 8, 4), expected, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5))
def test_channels_that_are_equal_do_what_they_did(old, new):
    kernel = np.random.default_rng(old).normal(size=(2, 2, old, 3)).astype("f")
    adapted = fit.adapt_channels(kernel, new)
    assert adapted.shape == (2, 2, new, 3)
    if new == 1 or new % old == 0:  # elsewhere some of the old channels count more than others, as in timm
        np.testing.assert_allclose(adapted.sum(2), kernel.sum(2), atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "detail", "size"),
    [
        ({"image_size": 384}, {"positions/table": "grid 14x14 -> 24x24"}, (384, 384)),
        ({"image_size": (160, 256)}, {"positions/table": "grid 14x14 -> 10x16"}, (160, 256)),
        (
            {"patch_size": 32},
            {"positions/table": "grid 14x14 -> 7x7", "embedding/projection/kernel": "patch 16 -> 32"},
            (224, 224),
        ),
    ],
)
@pytest.mark.slow
def test_other_images_and_patches(tmp_path, helpers, overrides, detail, size):
    model, parameters = helpers.small((224, 224), patch_size=16)
    weights.save(tmp_path / "file.npz", model, parameters)
    found, fitted, report = weights.load(tmp_path / "file.npz", **overrides)
    resampled = {row.paths[0]: row.detail for row in report.rows if row.action == "resampled"}
    assert resampled == detail and report.image_size == size
    images = np.random.default_rng(2).normal(size=(1, *size, 3)).astype("f")
    logits = helpers.outputs(found, fitted, images)
    assert logits.shape == (1, 5) and np.isfinite(logits).all()
    assert fitted["positions"]["table"].shape[1] == 1 + (size[0] // found.patch_size) * (size[1] // found.patch_size)
    np.testing.assert_array_equal(fitted["positions"]["table"][:, 0], parameters["positions"]["table"][:, 0])


@pytest.mark.slow
def test_enlarged_images_in_enlarged_patches_have_the_same_logits(tmp_path, helpers):
    model, parameters = helpers.small((16, 16))
    weights.save(tmp_path / "file.npz", model, parameters)
    found, fitted, _ = weights.load(tmp_path / "file.npz", image_size=32, patch_size=8)
    images = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 4, 4, 4, 3)), jnp.float32)
    larger = jax.image.resize(images, (2, 4, 4, 8, 8, 3), "bilinear")  # each patch by itself

    def whole(patches, side):
        return patches.swapaxes(2, 3).reshape(2, 4 * side, 4 * side, 3)

    np.testing.assert_allclose(
        helpers.outputs(found, fitted, whole(larger, 8)),
        helpers.outputs(model, parameters, whole(images, 4)),
        atol=1e-3,
    )


@pytest.mark.slow
def test_a_hybrids_root_and_patches_are_fitted(tmp_path, helpers):
    model, parameters = helpers.small(stem=(), stem_width=32, patch_size=2)
    weights.save(tmp_path / "file.npz", model, parameters)
    found, fitted, report = weights.load(tmp_path / "file.npz", channels=1, patch_size=4, image_size=(32, 64))
    details = {row.paths[0]: row.detail for row in report.rows if row.action in ("adapted", "resampled")}
    assert details == {
        "stem/convolution_root/kernel": "channels 3 -> 1, summed",
        "embedding/projection/kernel": "patch 2 -> 4",
        "positions/table": "grid 4x4 -> 2x4",
    }
    assert helpers.outputs(found, fitted, np.ones((1, 32, 64, 1), "f")).shape == (1, 5)


def test_images_that_the_patch_does_not_divide(tmp_path, helpers):
    model, parameters = helpers.small()
    weights.save(tmp_path / "file.npz", model, parameters)
    with pytest.raises(UserError, match="a patch of 4 does not divide an image of 30x30"):
        weights.load(tmp_path / "file.npz", image_size=30)
    with pytest.raises(UserError, match="a patch of 5 does not divide an image of 32x32"):
        weights.load(tmp_path / "file.npz", patch_size=5)
