import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.objectives import losses
from vit_jax.optim import ema
from vit_jax.training import step

METRICS = ("loss", "accuracy", "gradient_norm")

RANDOM = {
    "model": {"dropout": 0.1, "stochastic_depth": 0.1},
    "augment": {"crop_padding": 1, "flip": True, "mixup": 0.2},
    "optimizer": {"average_decay": 0.9, "gradient_clip": 1.0},
}

# What mixes examples must fetch them from other devices; all else must not.
WITHIN_EXAMPLES = {**RANDOM, "augment": {"crop_padding": 1, "flip": True}}


def test_the_loss_is_smoothed_cross_entropy():
    logits = np.random.default_rng(0).normal(size=(6, 5))
    labels = np.arange(6) % 5
    targets = 0.8 * np.eye(5)[labels] + 0.2 / 5
    wanted = -(targets * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)
    smoothed = optax.smooth_labels(jax.nn.one_hot(labels, 5), 0.2)
    made = losses.cross_entropy(jnp.asarray(logits, jnp.float32), smoothed)
    np.testing.assert_allclose(made, wanted, rtol=1e-5)


def test_training_learns(toy, make_config):
    run = toy(make_config(train={"steps_per_dispatch": 150}))
    _, metrics = run.run(run.start(), 150)
    # Sums start again after steps 50 and 100: these are over the steps 101 to 150.
    assert metrics["count"] == 50
    assert metrics["accuracy"] / 50 > 0.9


def accumulate(run, parameters, inputs, targets, microbatches):
    """The mean gradient and metrics of a batch."""
    config = run.experiment.config_of(0)
    config.train.accumulation = microbatches
    experiment, state = dataclasses.replace(run.experiment, config=config), run.start().replace(parameters=parameters)
    compiled = jax.jit(lambda *arrays: step.accumulate(experiment, state, *arrays, jax.random.key(0)))
    return compiled(inputs, targets)


@pytest.mark.slow
def test_microbatches_sum_to_the_whole_batchs_gradient(toy, make_config):
    run = toy(make_config())
    parameters = run.start().parameters
    images, labels = jnp.asarray(run.source.images[:16]), jax.nn.one_hot(run.source.labels[:16], 4)
    inputs = run.augment.normalize(images)
    results = []
    for parts in (1, 2, 4):
        results.append(accumulate(run, parameters, inputs, labels, parts))
    for gradients, metrics in results[1:]:
        chex.assert_trees_all_close(gradients, results[0][0], atol=1e-6)
        assert float(metrics["loss"]) == pytest.approx(float(results[0][1]["loss"]), abs=1e-6)
        assert metrics["accuracy"] == results[0][1]["accuracy"]


@pytest.mark.slow
def test_every_microbatch_has_its_own_dropout_key(toy, make_config):
    """With the same examples in each microbatch, one key would drop the same units in all and add nothing new."""
    run = toy(make_config(model={"dropout": 0.5}))
    parameters = jax.tree.map(lambda leaf: leaf + 0.1, run.start().parameters)
    inputs = jnp.repeat(run.augment.normalize(jnp.asarray(run.source.images[:8])), 2, axis=0)
    targets = jnp.repeat(jax.nn.one_hot(run.source.labels[:8], 4), 2, axis=0)
    both, _ = accumulate(run, parameters, inputs, targets, 2)
    one, _ = accumulate(run, parameters, inputs[::2], targets[::2], 1)
    difference = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), both, one)))
    assert difference > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 1])
def test_how_a_run_is_cut_into_chunks_changes_no_bit(toy, make_config, accumulation):
    run = toy(make_config(train={"accumulation": accumulation}, log={"every": 7}, **RANDOM))
    whole, metrics = run.run(run.start(), 12)
    parts = run.start()
    for count in (1, 5, 2, 4):
        parts, part_metrics = run.run(parts, count)
    chex.assert_trees_all_equal(whole, parts)
    chex.assert_trees_all_equal(metrics, part_metrics)
    assert metrics["count"] == 5  # since step 7


@pytest.mark.slow
def test_a_streamed_set_trains_to_the_same_bits_as_a_resident_one(toy, make_config):
    ends = [run.run(run.start(), 6)[0] for run in (toy(make_config(**RANDOM), 1, how) for how in ("always", "never"))]
    chex.assert_trees_all_equal(*ends)


@pytest.fixture(scope="module")
def on_devices(toy, make_config):
    """The losses of 20 steps on one device and on eight, one step per call, with all randomness on."""
    losses, hlo = {}, {}
    for devices in (1, 8):
        run = toy(make_config(log={"every": 1}, train={"steps_per_dispatch": 1}, **WITHIN_EXAMPLES), devices)
        state, losses[devices] = run.start(), []
        hlo[devices] = run.update.lower(state, run.feed(0, 1), np.int32(1), run.seed).compile().as_text()
        for _ in range(20):
            state, metrics = run.run(state, 1)
            losses[devices].append([float(metrics[name]) for name in METRICS])
    return losses, hlo


@pytest.mark.slow
def test_eight_devices_compute_the_losses_of_one(on_devices):
    losses, _ = on_devices
    assert np.ptp(losses[1], axis=0)[0] > 0.05  # it does train
    np.testing.assert_allclose(losses[8], losses[1], atol=1e-5)


@pytest.mark.slow
def test_a_step_on_eight_devices_has_one_all_reduce_and_no_other_exchange(on_devices):
    _, hlo = on_devices
    collectives = r"= .* (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    assert re.findall(collectives, hlo[8]) == ["all-reduce"]
    assert re.findall(collectives, hlo[1]) == []


def test_the_average_of_the_parameters_follows_the_formula():
    averaged, value = {"w": jnp.zeros(3)}, 0.0
    for number in range(30):
        parameters = {"w": jnp.full(3, number + 1.0)}
        averaged = ema.update(averaged, parameters, jnp.asarray(number), 0.7)
        decay = min(0.7, (1 + number) / (10 + number))
        value = decay * value + (1 - decay) * (number + 1)
    np.testing.assert_allclose(averaged["w"], value, rtol=1e-5)
    assert ema.update(None, parameters, jnp.asarray(0), 0.0) is None


@pytest.mark.slow
def test_the_seed_is_an_argument_of_the_compiled_update(toy, make_config):
    run, other = (toy(make_config(train={"seed": seed}, model={"dropout": 0.1})) for seed in (5, 9))
    state, _ = other.update(run.start(), run.feed(0, 3), np.int32(3), np.int32(5))
    chex.assert_trees_all_equal(state, run.run(run.start(), 3)[0])
