from functools import partial

import jax
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax.models.attention_backends import attention_weights
from vit_jax.models.intermediates import apply_with_intermediates
from vit_jax.models.norm import LayerNorm


@pytest.mark.parametrize("fields", mostly_slow([{"scan": True}, {}, {"pooling": "map", "registers": 1}], 3))
def test_asking_changes_no_bit_of_the_logits(small, draw, randomise, fields):
    images = draw(2, 4, 4, 3)
    model = small(**fields)
    variables = randomise(model, images)
    if not fields:
        logits, _ = apply_with_intermediates(model, variables, images)
        np.testing.assert_array_equal(logits, model.apply(variables, images))
    compiled, _ = jax.jit(lambda v, x: apply_with_intermediates(model, v, x))(variables, images)
    np.testing.assert_array_equal(compiled, jax.jit(model.apply)(variables, images))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_what_comes_out_is_what_happens_inside(small, draw, randomise, scan):
    images = draw(2, 4, 4, 3)
    model = small(scan=scan, registers=1)
    variables = randomise(model, images)
    parameters = variables["params"]
    logits, inside = jax.jit(partial(apply_with_intermediates, model))(variables, images)
    assert inside.embedded.shape == (2, 6, 16)
    assert inside.blocks.shape == (2, 2, 6, 16)
    assert inside.weights.shape == (2, 2, 2, 6, 6)
    assert inside.pooling is None
    np.testing.assert_allclose(inside.weights.sum(-1), 1, atol=1e-6)
    # From the last block on, by hand.
    features = LayerNorm().apply({"params": parameters["encoder"]["norm"]}, inside.blocks[-1])[:, 0]
    head = parameters["head"]["logits"]
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, atol=1e-5)
    # The second layer's weights from the first one's output, by hand.
    encoder = parameters["encoder"]
    block = jax.tree.map(lambda leaf: leaf[1], encoder["blocks"]) if scan else encoder["block_1"]
    normed = LayerNorm().apply({"params": block["norm_attention"]}, inside.blocks[0])
    fused = (normed @ block["attention"]["qkv"]["kernel"] + block["attention"]["qkv"]["bias"]).reshape(2, 6, 3, 2, 8)
    np.testing.assert_allclose(inside.weights[1], attention_weights(fused[:, :, 0], fused[:, :, 1]), atol=1e-5)


def test_masked_tokens_get_no_weight_in_any_layer(small, draw, randomise):
    images = draw(2, 4, 4, 3)
    model = small()
    mask = np.ones((1, 1, 5, 5), bool)
    mask[..., 3] = False
    _, inside = apply_with_intermediates(model, randomise(model, images), images, jax.numpy.asarray(mask))
    assert np.all(inside.weights[..., 3] == 0) and np.all(inside.weights[..., 0] > 0)


def test_attention_pooling_shows_what_it_looks_at(small, draw, randomise):
    images = draw(2, 4, 4, 3)
    model = small(pooling="map", class_token=False)
    _, inside = jax.jit(partial(apply_with_intermediates, model))(randomise(model, images), images)
    assert inside.pooling.shape == (2, 2, 4)
    np.testing.assert_allclose(inside.pooling.sum(-1), 1, atol=1e-6)
