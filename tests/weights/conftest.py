"""What the tests of weights share: models of all kinds with random parameters, and what came of which array."""

import importlib.util
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import weights
from vit_jax.models.parameters import nested, parameter_shapes
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights.save import flattened

REFERENCES = Path(__file__).resolve().parent / "references"
SMALL = {"classes": 5, "patch_size": 4, "width": 24, "depth": 2, "heads": 3, "mlp_width": 40}


def small(image_size=(32, 32), channels=3, seed=0, **fields):
    """A model of two blocks, 24 wide, and parameters of it, all drawn."""
    model = VisionTransformer(**{**SMALL, **fields})
    grid = (image_size[0] // model.patch_size, image_size[1] // model.patch_size)
    if model.stem is not None:
        grid = tuple(side // 2 ** (2 + max(len(model.stem) - 1, 0)) for side in grid)
    generator = np.random.default_rng(seed)
    shapes = parameter_shapes(model, grid, channels)
    return model, nested({path: generator.normal(size=shape).astype("f") * 0.3 for path, shape in shapes.items()})


def outputs(model, parameters, images):
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)({"params": parameters}, images)


def same(one, other):
    """Whether two trees of parameters have the same paths and the same bits."""
    one, other = flattened(one), flattened(other)
    assert sorted(one) == sorted(other)
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)
        assert one[path].dtype == other[path].dtype == np.float32


def covers(report, names, paths):
    """Every array of the file and every array of the model is in one row, and in no other."""
    assert sorted(name for row in report.rows for name in row.names) == sorted(names)
    assert sorted(path for row in report.rows for path in row.paths) == sorted(paths)
    assert all(row.detail for row in report.rows if row.action in ("ignored", "initialized", "resampled", "adapted"))


@pytest.fixture(scope="session")
def references() -> Path:
    """Recorded models of timm and transformers, made by make_references.py."""
    return REFERENCES


@pytest.fixture
def google_file(tmp_path):
    """A function that writes a model as .npz, its names changed by a function, and returns the path."""

    def write(model, parameters, rename=lambda name: name, change=None):
        path = tmp_path / "file.npz"
        weights.save(path, model, parameters)
        arrays = {rename(name): array for name, array in np.load(path).items()}
        np.savez(path, **(change(arrays) if change else arrays))
        return path

    return write


@pytest.fixture(scope="session")
def timm():
    """timm itself, where it and torch are installed."""
    for name in ("torch", "timm"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: see make_references.py for what it takes")
    path = REFERENCES.with_name("make_references.py")
    spec = importlib.util.spec_from_file_location("make_references", path)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.stub_torchvision()
    return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def helpers():
    """The functions above, as tests cannot import each other."""
    return types.SimpleNamespace(small=small, outputs=outputs, same=same, covers=covers)
