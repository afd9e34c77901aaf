import numpy as np
import pytest


@pytest.fixture(scope="session")
def photos():
    """Returns 24 images [24, 32, 40, 3]: 20 crops of photographs, and a flat, nearly flat, two-valued and noisy one."""
    samples = pytest.importorskip("sklearn.datasets").load_sample_images().images
    generator = np.random.default_rng(0)
    crops = []
    for index in range(20):
        photo, step = samples[index % 2], 1 + index % 5
        top, left = generator.integers(0, 427 - 32 * step), generator.integers(0, 640 - 40 * step)
        crops.append(photo[top : top + 32 * step : step, left : left + 40 * step : step])
    flat = np.full((32, 40, 3), (0, 128, 255), np.uint8)
    nearly = flat + (generator.random(flat.shape) < 0.1) * np.array([1, 3, -7], np.int64)
    two = np.where(generator.random(flat.shape) < 0.3, 40, 210)
    noise = generator.integers(0, 256, flat.shape)
    return np.stack([*crops, flat, nearly, two, noise]).astype(np.uint8)
