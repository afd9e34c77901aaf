"""An experiment: made of sources in memory, independent of the seed, with data on the devices only when it is used."""

import chex
import pytest
from toy import toy_config, toy_source

from vit_jax import sharding
from vit_jax.training import setup


@pytest.fixture(scope="module")
def experiment():
    sources = {"train": toy_source(), "test": toy_source(20)}
    return setup.assemble(toy_config(train={"seeds": (3, 5)}), sharding.make_mesh(1), sources)


def test_only_the_split_that_is_used_is_copied_to_the_devices(experiment):
    experiment.pipelines["test"]
    assert set(experiment.pipelines) == {"test"}
    assert set(experiment.pipelines.make_all()) == {"train", "test"}


def test_the_config_of_a_seed_leaves_the_experiments_own_alone(experiment):
    config = experiment.config_of(5)
    assert (config.train.seed, config.train.seeds) == (5, None)
    assert experiment.config.train.seeds == (3, 5)


@pytest.mark.slow
def test_the_initial_state_depends_on_the_seed_alone(experiment):
    first, again, other = (experiment.init_state(seed).parameters for seed in (3, 3, 5))
    chex.assert_trees_all_equal(first, again)
    kernel = ("embedding", "projection", "kernel")
    assert (first[kernel[0]][kernel[1]][kernel[2]] != other[kernel[0]][kernel[1]][kernel[2]]).any()


def test_the_shapes_of_the_state_are_known_without_making_it(experiment):
    chex.assert_trees_all_equal_shapes_and_dtypes(experiment.abstract_state(), experiment.init_state(3))
