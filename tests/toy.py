"""A tiny config and an in-memory source for tests of training, assembled as any experiment is."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny_config

from vit_jax import sharding
from vit_jax.data import pipeline
from vit_jax.data.sources import LabelSet, Source
from vit_jax.training import setup, step
from vit_jax.training.state import TrainState, zero_metrics

TOY = {
    "model": {"variant": "Ti/2"},
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
    "train": {"batch_size": 16, "steps_per_dispatch": 20},
}


def toy_config(**sections):
    """The tiny config for images of 4x4 pixels."""
    return tiny_config(TOY, **sections)


def toy_source(examples=100, kinds=("label",)):
    """Images whose label can be learned: pixel (label, label) is bright; 'parity' is whether the label is odd."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, examples).astype(np.int32)
    images = generator.integers(0, 128, (examples, 4, 4, 1), np.uint8)
    images[np.arange(examples), labels, labels, 0] = 255
    others = {"parity": LabelSet(labels % 2, ("even", "odd"))} if "parity" in kinds else {}
    return Source("toy", "train", images, labels, tuple("abcd"), (0.3,), (0.2,), others=others)


def make_state(parameters, optimizer, average=False, metrics=("loss",)):
    """The state before the first step, of any parameters and optax transformation."""
    counters = ("step", "skipped_batches", "nonfinite_streak", "updates")
    return TrainState(
        **{name: jnp.zeros((), jnp.int32) for name in counters},
        parameters=parameters,
        optimizer=optimizer.init(parameters),
        averaged=jax.tree.map(jnp.copy, parameters) if average else None,
        objective=None,
        metrics=zero_metrics(metrics),
    )


class Toy:
    """An experiment on the toy source, whose attributes it has, and its compiled update."""

    def __init__(self, config, devices=1, resident="always"):
        config.data.resident = resident
        kinds = config.data.labels
        self.experiment = setup.assemble(config, sharding.make_mesh(devices), {"train": toy_source(kinds=kinds)})
        self.update = step.make_update(self.experiment)

        self.source, self.feeds = self.experiment.sources["train"], self.experiment.pipelines["train"]
        self.seed = np.int32(config.train.seed)

    def __getattr__(self, name):
        return getattr(self.experiment, name)

    def start(self):
        return self.experiment.init_state(int(self.seed))

    def feed(self, first, count):
        train = self.config.train
        rows = pipeline.train_indices(train.seed, train.batch_size, first, count, train.steps_per_dispatch, 100)
        return self.feeds.feed(rows)

    def run(self, state, count):
        return self.update(state, self.feed(int(state.step), count), np.int32(count), self.seed)
