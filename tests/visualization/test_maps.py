"""Maps from attention weights, against closed forms and NumPy in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax.errors import UserError
from vit_jax.visualization import maps, pictures
from vit_jax.visualization.subject import Subject

from .conftest import classifier, pixels


def numpy_rollout(weights):
    """Attention rollout as arXiv 2005.00928 states it, one matrix at a time: [batch, tokens, tokens]."""
    weights = np.asarray(weights, np.float64)
    found = []
    for image in range(weights.shape[1]):
        joint = np.eye(weights.shape[-1])
        for layer in weights[:, image]:
            joint = (0.5 * layer.mean(axis=0) + 0.5 * np.eye(len(joint))) @ joint
        found.append(joint)
    return np.stack(found)


def test_attention_is_that_of_apply_with_intermediates_to_the_last_bit(small, inside):
    for layer in (0, 1):
        found = pictures.draw("attention", small, pixels(), layer=layer).arrays["attention"]
        expected = np.asarray(inside[1].weights)[layer, :, :, 0, 1:].reshape(3, 2, 4, 4)
        np.testing.assert_array_equal(found, expected)
    found = pictures.draw("attention", small, pixels(), patch=(2, 1)).arrays["attention"]
    np.testing.assert_array_equal(found, np.asarray(inside[1].weights)[-1, :, :, 1 + 2 * 4 + 1, 1:].reshape(3, 2, 4, 4))


def test_rollout_equals_numpy_in_float64(small, inside):
    expected = numpy_rollout(inside[1].weights)
    found = np.asarray(maps.rollout(list(inside[1].weights)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)
    drawn = pictures.draw("rollout", small, pixels()).arrays["rollout"]
    np.testing.assert_allclose(drawn, expected[:, 0, 1:].reshape(3, 4, 4), atol=1e-6)


@pytest.mark.parametrize("layout", mostly_slow([((3, 5), 5), ((2, 3), 0), ((4, 4), 1)], 3))
def test_the_distance_of_uniform_and_of_identity_attention(layout):
    grid, extra = layout
    tokens = extra + grid[0] * grid[1]
    cells = list(itertools.product(range(grid[0]), range(grid[1])))
    mean = np.mean([16 * np.hypot(a - c, b - d) for (a, b), (c, d) in itertools.product(cells, cells)])
    uniform = jnp.full((1, 2, tokens, tokens), 1 / tokens)
    np.testing.assert_allclose(maps.mean_distance(uniform, extra, grid, 16), np.full((1, 2), mean), rtol=1e-6)
    identity = jnp.broadcast_to(jnp.eye(tokens), (1, 2, tokens, tokens))
    np.testing.assert_array_equal(maps.mean_distance(identity, extra, grid, 16), np.zeros((1, 2)))


def test_each_head_of_two_tokens_has_the_distance_that_its_weights_give():
    weights = jnp.asarray([[[[0.75, 0.25], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]]])
    np.testing.assert_allclose(maps.mean_distance(weights, 0, (1, 2), 8), [[8 * (0.25 + 0.5) / 2, 0]], rtol=1e-6)


@pytest.mark.slow
def test_distance_does_not_depend_on_the_batches(small, monkeypatch):
    images = pixels(5)
    whole = pictures.draw("distance", small, images).arrays["distance"]
    monkeypatch.setattr(Subject, "batch_size", 2)
    np.testing.assert_allclose(pictures.draw("distance", small, images).arrays["distance"], whole, rtol=1e-6)
    assert whole.shape == (2, 2) and np.all(whole > 0)


# --- relevance ------------------------------------------------------------------------------------------------------


def numpy_logits(parameters, image, added):
    """The logits of the small model in float64; `added` [layers, heads, tokens, tokens] is added to the weights."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in flat(parameters)}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    patches = image.reshape(4, 2, 4, 2, 3).swapaxes(1, 2).reshape(16, 12)
    x = np.concatenate([p["class_token"][0], dense(patches, "embedding/projection")]) + p["positions/table"][0]
    weights = []
    for layer, extra in enumerate(added):
        name = f"encoder/block_{layer}"
        fused = dense(norm(x, f"{name}/norm_attention"), f"{name}/attention/qkv").reshape(17, 3, 2, 8)
        scores = np.einsum("qhd,khd->hqk", fused[:, 0], fused[:, 1]) / np.sqrt(8)
        attention = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        weights.append(attention)
        mixed = np.einsum("hqk,khd->qhd", attention + extra, fused[:, 2]).reshape(17, 16)
        x = x + dense(mixed, f"{name}/attention/out")
        hidden = dense(norm(x, f"{name}/norm_mlp"), f"{name}/mlp/up")
        x = x + dense(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, f"{name}/mlp/down")
    return dense(norm(x, "encoder/norm")[0], "head/logits"), np.stack(weights)


def flat(tree, prefix=""):
    for name, value in tree.items():
        yield from flat(value, f"{prefix}{name}/") if isinstance(value, dict) else [(f"{prefix}{name}", value)]


def erf(x):
    from scipy.special import erf

    return erf(x)


@pytest.mark.slow
def test_relevance_equals_numpy_with_finite_differences(small):
    """arXiv 2103.15679, equations 5 and 6, with the gradient of the logit by central differences."""
    images, chosen, step = pixels(1), 3, 1e-4
    image = np.asarray(small.augment.normalize(jnp.asarray(images)), np.float64)[0]
    zero = np.zeros((2, 2, 17, 17))
    _, weights = numpy_logits(small.parameters, image, zero)
    gradient = np.zeros_like(zero)
    for index in np.ndindex(zero.shape):
        sides = []
        for sign in (1, -1):
            zero[index] = sign * step
            sides.append(numpy_logits(small.parameters, image, zero)[0][chosen])
        zero[index] = 0
        gradient[index] = (sides[0] - sides[1]) / (2 * step)
    joint = np.eye(17)
    for layer in range(2):
        joint = joint + np.maximum(weights[layer] * gradient[layer], 0).mean(axis=0) @ joint
    found = pictures.draw("relevance", small, images, class_name="tench").arrays
    np.testing.assert_allclose(found["relevance"][0], joint[0, 1:].reshape(4, 4), rtol=1e-3, atol=1e-6)
    assert found["classes"].tolist() == [chosen]


@pytest.mark.slow
def test_relevance_is_by_default_that_for_the_predicted_class(small, inside):
    found = pictures.draw("relevance", small, pixels()).arrays
    predicted = np.asarray(inside[0]).argmax(axis=-1)
    assert found["classes"].tolist() == predicted.tolist()
    one = pictures.draw(
        "relevance", small, pixels(), class_name=("cat", "dog", "great white shark", "tench", "zebra")[predicted[1]]
    )
    np.testing.assert_allclose(found["relevance"][1], one.arrays["relevance"][1], rtol=1e-5)


def test_the_class_of_relevance_must_exist(small):
    with pytest.raises(UserError, match="no class 'shark'\n  nearest: great white shark"):
        pictures.draw("relevance", small, pixels(1), class_name="shark")
    with pytest.raises(UserError, match="no head"):
        pictures.draw("relevance", classifier(classes=None), pixels(1))


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mask", pictures.MASKS)
def test_a_mask_hides_keys_and_the_others_are_rescaled(small, mask):
    arrays = pictures.draw("masks", small, pixels(2), mask=mask).arrays
    allowed, found = arrays["mask"], arrays["attention"]
    assert np.all(found[:, ~allowed] == 0) and np.all(found[:, allowed] > 0)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)
    patches = allowed[1:, 1:]
    if mask == "random":
        assert patches.sum(axis=1).tolist() == [8] * 16 and np.array_equal(allowed[0], allowed[5])
    elif mask == "causal":
        assert np.array_equal(patches, np.tril(np.ones((16, 16), bool)))
    else:
        assert patches.sum() == (4 * 4 + 8 * 6 + 4 * 9)  # corners, edges, the inside


def test_an_unknown_mask_is_refused(small):
    with pytest.raises(UserError, match="mask is 'holes'\n  allowed: random, causal, local"):
        pictures.draw("masks", small, pixels(1), mask="holes")
