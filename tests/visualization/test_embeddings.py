"""Principal components, filters and position similarities, against scikit-learn and formulas."""

import numpy as np
import pytest
from helpers import mostly_slow
from sklearn.decomposition import PCA

from vit_jax.errors import UserError
from vit_jax.visualization import embeddings, pictures

from .conftest import classifier, pixels


@pytest.mark.parametrize("shape", [(50, 12), (9, 40)])
def test_principal_components_are_those_of_scikit_learn(shape):
    samples = np.random.default_rng(0).normal(size=shape) * np.linspace(1, 3, shape[1])
    components, variance, mean = embeddings.principal_components(samples, 5)
    expected = PCA(5, svd_solver="full").fit(samples)
    np.testing.assert_allclose(np.abs(np.sum(components * expected.components_, axis=1)), 1, atol=1e-9)
    np.testing.assert_allclose(variance, expected.explained_variance_ratio_, atol=1e-12)
    np.testing.assert_allclose(mean, samples.mean(axis=0))
    assert np.all(components[np.arange(5), np.abs(components).argmax(axis=1)] > 0)


def test_fewer_components_than_asked_for_if_there_are_no_more():
    assert embeddings.principal_components(np.eye(3), 28)[0].shape == (3, 3)


def test_filters_are_the_kernel_and_their_components_those_of_scikit_learn(small):
    arrays = pictures.draw("filters", small).arrays
    kernel = small.parameters["embedding"]["projection"]["kernel"]  # [2 * 2 * 3, 16]
    np.testing.assert_array_equal(arrays["kernels"].reshape(16, 12), kernel.T)
    expected = PCA(12, svd_solver="full").fit(kernel.T)
    flat = arrays["components"].reshape(12, 12)
    np.testing.assert_allclose(np.abs(np.sum(flat * expected.components_, axis=1)), 1, atol=1e-5)
    np.testing.assert_allclose(arrays["variance"], expected.explained_variance_ratio_, atol=1e-6)


def test_filters_of_images_that_are_neither_grey_nor_rgb_are_not_defined():
    with pytest.raises(UserError, match="images have 4 channels"):
        pictures.draw("filters", classifier(channels=4))


@pytest.mark.slow
def test_features_are_the_components_of_all_patches_together(small):
    from vit_jax.inference import Predictor

    images = pixels()
    arrays = pictures.draw("features", small, images).arrays
    tokens = Predictor(small).features(images, patches=True).reshape(-1, 16)
    expected = PCA(3, svd_solver="full").fit(tokens)
    scores, found = expected.transform(tokens), arrays["components"].reshape(-1, 3)
    np.testing.assert_allclose(found * np.sign(np.sum(found * scores, axis=0)), scores, atol=1e-4)
    np.testing.assert_allclose(arrays["variance"], expected.explained_variance_ratio_, atol=1e-5)


OTHERS = {"learned_2d", "sinusoidal", "relative_class", "dinov3", "eva02", "learned_pe"}


def similarity(position, size=(8, 6), **fields):
    model = classifier(size=size, position=position, **fields)
    return model, pictures.draw("positions", model).arrays["similarity"]


def grid_differences():
    row, column = np.mgrid[:4, :3]
    return row[..., None, None] - row, column[..., None, None] - column


def test_the_similarity_of_sines_and_cosines_is_the_mean_cosine_of_the_differences():
    _, found = similarity("sincos_2d")
    down, right = grid_differences()
    frequencies = 10_000.0 ** -np.linspace(0, 1, 4)  # a quarter of the width
    expected = np.mean([(np.cos(down * f) + np.cos(right * f)) / 2 for f in frequencies], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_similarity_of_rotations_is_the_mean_cosine_of_the_differences():
    _, found = similarity("rotary")
    down, right = grid_differences()
    frequencies = 100.0 ** (-np.arange(2) / 2)  # a head of 8 channels has 2 frequencies per axis
    expected = np.mean([(np.cos(down * f) + np.cos(right * f)) / 2 for f in frequencies], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_of_relative_positions_it_is_the_bias_of_the_layer(scan):
    model = classifier(size=(8, 6), position="relative", scan=scan)
    encoder = model.parameters["encoder"]
    for layer in (0, -1):
        found = pictures.draw("positions", model, layer=layer).arrays["similarity"]
        if scan:
            offsets = encoder["blocks"]["positions"]["offsets"][layer]
        else:
            offsets = encoder[f"block_{layer % 2}"]["positions"]["offsets"]
        assert found.shape == (4, 3, 4, 3)
        np.testing.assert_allclose(found[1, 2, 3, 0], offsets[:, 3 - 1 + 3, 0 - 2 + 2].mean(), rtol=1e-6)
        np.testing.assert_allclose(found[3, 0, 0, 1], offsets[:, 0 - 3 + 3, 1 - 0 + 2].mean(), rtol=1e-6)


def test_of_a_learned_table_it_is_the_cosine_without_class_token_and_registers():
    model, found = similarity("learned", registers=2)
    table = model.parameters["positions"]["table"][0, 1:]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    np.testing.assert_allclose(found.reshape(12, 12), unit @ unit.T, atol=1e-6)


@pytest.mark.parametrize("position", mostly_slow(sorted(OTHERS), 3))
def test_every_other_kind_of_position_has_a_picture_with_the_largest_similarity_at_itself(position):
    _, found = similarity(position)
    assert found.shape == (4, 3, 4, 3)
    if position != "relative_class":
        flat = found.reshape(12, 12)
        np.testing.assert_allclose(np.diag(flat), 1, atol=1e-6)
        assert np.all(flat <= 1 + 1e-6)


def test_a_model_without_position_embedding_has_no_picture_of_it():
    with pytest.raises(UserError, match="no position embedding"):
        similarity("none")


def test_no_kind_of_position_is_forgotten():
    from vit_jax.models.positions import POSITIONS

    tested = {*OTHERS, "learned", "relative", "rotary", "sincos_2d", "none"}
    assert POSITIONS.keys() - tested == {"pe", "learned_rotary", "learned_eva02"}  # as eva02 and learned_pe
