"""A tiny model, config and source for tests of training."""

import jax
import numpy as np

from vit_jax import config as options
from vit_jax import objectives, optim, sharding
from vit_jax.data import pipeline
from vit_jax.data.augment import Augment
from vit_jax.data.sources import LabelSet, Source
from vit_jax.objectives import losses
from vit_jax.optim import trainable
from vit_jax.training import build_model, state, step


def toy_config(**sections):
    """A config of a model so small that it compiles in a second or two."""
    config = options.default()
    config.model.update(variant="Ti/2", width=16, depth=1, heads=2, mlp_width=16)
    config.optimizer.update(learning_rate=1e-2, schedule="constant")
    config.train.update(batch_size=16, steps=20, steps_per_dispatch=20)
    for section, values in sections.items():
        config[section].update(values)
    return config


def toy_source(examples=100, kinds=("label",)):
    """Images whose label can be learned: a bright pixel stands at the label's place; 'parity' is whether it is odd."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, examples).astype(np.int32)
    images = generator.integers(0, 128, (examples, 4, 4, 1), np.uint8)
    images[np.arange(examples), labels, labels, 0] = 255
    others = {"parity": LabelSet(labels % 2, ("even", "odd"))} if "parity" in kinds else {}
    return Source("toy", "train", images, labels, tuple("abcd"), (0.3,), (0.2,), others=others)


class Toy:
    """A compiled update over the toy source, its state, and dispatches of it."""

    def __init__(self, config, devices=1, resident="always"):
        kinds = losses.label_kinds(config.data)
        self.config, self.mesh, self.source = config, sharding.make_mesh(devices), toy_source(kinds=kinds)
        self.objective = objectives.make(config)
        built = build_model.build(config.model, classes=self.source.classes(), dtype=None)
        self.model = self.objective.module(built, self.source.mean, self.source.std)
        self.optimizer = optim.make(config.optimizer, config.train.steps)
        augment = Augment(self.source.mean, self.source.std, **config.augment.to_dict())
        shapes = jax.eval_shape(lambda: state.initialize(self.model, (4, 4, 1), 0))
        self.mask = trainable.trained(config.optimizer, shapes)
        self.update = step.make_update(self.model, self.optimizer, augment, config, self.mesh, self.mask)
        self.feeds = pipeline.make(self.source, self.mesh, resident)
        self.augment = augment

    def start(self):
        def create():
            parameters = state.initialize(self.model, (4, 4, 1), self.config.train.seed)
            average = self.config.optimizer.average_decay > 0
            return state.create(parameters, self.optimizer, average, self.objective.metrics, self.mask)

        return jax.jit(create, out_shardings=sharding.replicated(self.mesh))()

    def feed(self, first, count):
        train = self.config.train
        rows = pipeline.train_indices(train.seed, train.batch_size, first, count, train.steps_per_dispatch, 100)
        return self.feeds.feed(rows)

    def run(self, state, count):
        return self.update(state, self.feed(int(state.step), count), np.int32(count))
