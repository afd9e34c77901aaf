"""Frequencies and arguments of the operations that policies draw, compared with the published definitions."""

import jax
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax.data import policies
from vit_jax.data.operations import CODES, NAMES
from vit_jax.data.policies import POLICIES, Settings

COUNT = 20_000


@pytest.fixture(scope="module")
def draw():
    def drawn(name, seed=0, size=(32, 48), **settings):
        chain = POLICIES[name].draw(jax.random.key(seed), COUNT, *size, Settings(**settings))
        return np.asarray(chain.codes), np.asarray(chain.arguments)

    return drawn


def assert_share(hits, probability):
    """Asserts that the fraction of hits is within five standard deviations of its probability."""
    hits = np.asarray(hits)
    assert abs(hits.mean() - probability) <= 5 * np.sqrt(probability * (1 - probability) / hits.size)


@pytest.mark.parametrize("name", mostly_slow(list(POLICIES), 3))
@pytest.mark.slow
def test_policy_draws_exactly_its_operations(name, draw):
    codes, arguments = draw(name)
    drawn = {NAMES[code] for code in np.unique(codes)}
    assert drawn - {"identity"} == {*POLICIES[name].names} - {"identity"}
    assert codes.shape == arguments.shape and np.isfinite(arguments).all()
    again, _ = draw(name)
    np.testing.assert_array_equal(codes, again)
    assert (codes != draw(name, seed=1)[0]).any()


@pytest.mark.parametrize("layers, probability", [(2, 0.5), (3, 0.9)])
def test_rand_augment_draws_each_operation_with_equal_probability(draw, layers, probability):
    codes, _ = draw("rand_augment", layers=layers, probability=probability)
    assert codes.shape == (layers, COUNT)
    assert_share(codes == CODES["identity"], 1 - probability)
    for name in policies.INCREASING:
        assert_share(codes == CODES[name], probability / 15)
    # Layers are independent of each other.
    assert_share((codes[0] != CODES["identity"]) & (codes[1] != CODES["identity"]), probability**2)


# The arguments of timm's increasing set at five magnitudes, calculated by hand.
BY_HAND = {
    "rotate": (0, 7.5, 15, 27, 30),
    "posterize": (4, 3, 2, 1, 0),
    "solarize": (256, 192, 128, 26, 0),
    "solarize_add": (0, 27, 55, 99, 110),
    "color": (1, 1.225, 1.45, 1.81, 1.9),
    "shear_x": (0, 0.075, 0.15, 0.27, 0.3),
    "translate_x": (0, 5.4, 10.8, 19.44, 21.6),  # of 48 pixels
    "translate_y": (0, 3.6, 7.2, 12.96, 14.4),  # of 32 pixels
}


@pytest.mark.parametrize("column, magnitude", enumerate((0.0, 2.5, 5.0, 9.0, 10.0)))
def test_arguments_of_rand_augment_match_timm(draw, column, magnitude):
    codes, arguments = draw("rand_augment", magnitude=magnitude, std=0.0)
    for name, values in BY_HAND.items():
        found, expected = np.abs(arguments[codes == CODES[name]]), values[column]
        if name == "color":  # 1 + x or 1 - x
            expected, found = expected - 1, np.abs(found - 1)
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)
    for name, centre in (("rotate", 0), ("color", 1), ("shear_y", 0), ("translate_x", 0)):
        if magnitude:
            assert_share(arguments[codes == CODES[name]] > centre, 0.5)


def test_magnitude_of_rand_augment_is_normal_and_clipped(draw):
    codes, arguments = draw("rand_augment", magnitude=9.0, std=0.5)
    magnitude = np.abs(arguments[codes == CODES["rotate"]]) / 3
    assert_share(magnitude < 9.0, 0.5)
    assert_share(magnitude < 8.5, 0.158655)
    assert_share(magnitude > 9.9999, 0.022750)
    assert magnitude.max() <= 10 + 1e-5


def test_trivial_augment_draws_one_operation_of_any_magnitude(draw):
    codes, arguments = draw("trivial_augment")
    assert codes.shape == (1, COUNT)
    for name in policies.WIDE:
        assert_share(codes == CODES[name], 1 / 14)
    steps = np.arange(31)
    values = {
        "rotate": 4.5 * steps,
        "shear_x": 0.033 * steps,
        "translate_y": np.floor(32 * steps / 30),
        "posterize": 8 - np.round(steps / 5),
        "solarize": 255 - 8.5 * steps,
        "brightness": 1 + 0.033 * steps,
    }
    for name, expected in values.items():
        found = arguments[codes == CODES[name]]
        found = 1 + np.abs(found - 1) if name == "brightness" else np.abs(found)
        nearest = np.abs(found[:, None] - expected[None]).min(1)
        assert nearest.max() < 1e-3, name
        for value in np.unique(expected.round(6)):
            assert_share(np.abs(found - value) < 1e-3, np.isclose(expected, value).mean())


def test_auto_augment_draws_the_25_sub_policies_with_their_probabilities(draw):
    codes, arguments = draw("auto_augment", size=(32, 32))
    for layer in range(2):
        for name in policies.SEARCHED:
            probability = sum(pair[layer][1] for pair in policies.CIFAR10 if pair[layer][0] == name) / 25
            assert_share(codes[layer] == CODES[name], probability)
    # Only the pair (translate_y 0.9, translate_y 0.7) translates twice.
    both = (codes == CODES["translate_y"]).all(0)
    assert_share(both, 0.9 * 0.7 / 25)
    np.testing.assert_allclose(np.abs(arguments[:, both]), 14)  # 150/331 of 32, rounded down
    assert_share(arguments[0, both] * arguments[1, both] > 0, 0.5)
    found = arguments[codes == CODES["posterize"]]
    np.testing.assert_array_equal(found, 5)  # magnitude 7 of 9: 8 - 3.1 bits
    np.testing.assert_allclose(np.unique(arguments[codes == CODES["solarize"]]), [85 / 3, 340 / 3, 170, 595 / 3], 1e-5)


def test_three_augment_draws_one_of_three_operations(draw):
    codes, arguments = draw("three_augment")
    for name in policies.THREE:
        assert_share(codes == CODES[name], 1 / 3)
    assert (arguments[codes == CODES["solarize"]] == 128).all()
    radius = arguments[codes == CODES["blur"]]
    assert 0.1 <= radius.min() < 0.11 and 1.99 < radius.max() <= 2
    assert abs(radius.mean() - 1.05) < 5 * 1.9 / np.sqrt(12 * radius.size)
