"""What the tests of the models share: a small model, random parameters."""

import contextlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.vit import VisionTransformer

SMALL = {"classes": 5, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24}


@pytest.fixture(scope="session")
def small():
    """A function that makes a model of two blocks, 16 wide; keywords replace its fields."""
    return lambda **fields: VisionTransformer(**{**SMALL, **fields})


@pytest.fixture(scope="session")
def randomise():
    """A function that draws all variables of a module at random: none is zero or one, as some are at initialisation."""

    def variables(module, *inputs, seed=0, scale=0.3):
        generator = np.random.default_rng(seed)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        return jax.tree.map(lambda leaf: jnp.asarray(scale * generator.normal(size=leaf.shape), leaf.dtype), shapes)

    return variables


@pytest.fixture(scope="session")
def draw():
    """A function that draws normal float32 numbers of a shape."""
    return lambda *shape, seed=0: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture
def quick_compilation():
    """Programs that run once, and whose last bits do not matter, are not worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _described_gpu():
    """A context in which JAX assumes an H200. JAX 0.11 and later need it; earlier versions assume a GPU themselves."""
    device = getattr(jax.sharding, "AbstractDevice", None)
    if device is None or "platform" not in inspect.signature(device).parameters:
        return contextlib.nullcontext()
    described = device(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=described))


@pytest.fixture(scope="session")
def lower_for_gpu():
    """A function that lowers another for an NVIDIA GPU, on any machine: its StableHLO text.

    Arguments are arrays or `jax.ShapeDtypeStruct`s.
    """

    def lower(function, *arguments):
        with _described_gpu():
            return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    return lower
