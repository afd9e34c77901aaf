"""A classifier of a small model with random parameters, and images, for the tests of pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.classifier import Classifier
from vit_jax.data.augment import Augment
from vit_jax.models.vit import VisionTransformer

SMALL = {"classes": 5, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24}
NAMES = ("cat", "dog", "great white shark", "tench", "zebra")


def classifier(size=(8, 8), channels=3, **fields):
    """The classifier of a small model with these fields, all of its parameters random."""
    model = VisionTransformer(**{**SMALL, **fields})
    shape, half = (*size, channels), ((0.5,) * channels,) * 2
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    parameters = jax.tree.map(lambda leaf: np.asarray(0.3 * generator.normal(size=leaf.shape), leaf.dtype), shapes)
    names = {} if model.classes is None else {"label": NAMES}
    return Classifier(model, parameters, Augment(*half), InputSpec("test", shape, *half, names), source="small")


def pixels(count=3, size=(8, 8), channels=3):
    """Random images."""
    return np.random.default_rng(1).integers(0, 256, (count, *size, channels), np.uint8)


@pytest.fixture(scope="session")
def small():
    """The classifier with a class token."""
    return classifier()


@pytest.fixture(scope="session")
def inside(small):
    """Its logits and intermediate arrays for three images."""
    from vit_jax.models.intermediates import apply_with_intermediates

    images = jax.jit(small.augment.normalize)(pixels())
    return jax.jit(lambda p, x: apply_with_intermediates(small.model, {"params": p}, x))(small.parameters, images)


@pytest.fixture
def quick_compilation():
    """Programs that run once, and whose last bits do not matter, are not worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
