"""An objective with a teacher, two views and a moving centre fits the interface: it is one class, written here."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from vit_jax import sharding
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.objectives import OBJECTIVES
from vit_jax.objectives.masked import Masked
from vit_jax.training import setup, step, train

PROTOTYPES, MOMENTUM, CENTER_MOMENTUM = 6, 0.9, 0.8


@dataclasses.dataclass(frozen=True)
class SelfDistillation(Masked):
    """The student matches the teacher's output for the other view (arXiv 2104.14294); evaluated by its loss.

    The extra state is the teacher's parameters and the mean of its outputs. Summaries are those of `Masked`.
    """

    metrics = ("loss", "gradient_norm")
    backbone_path = ()
    min_patches = 1

    @classmethod
    def from_config(cls, config):
        return cls()

    def make_module(self, model, mean, std):
        return model.clone(classes=PROTOTYPES)

    def patch_metrics(self, module, outputs, patches):
        raise NotImplementedError

    def make_views(self, augment, key, images, targets):
        keys = jax.random.split(key)
        return tuple(augment(key, images, targets)[0] for key in keys), targets

    def init_state(self, parameters):
        return {"teacher": jax.tree.map(jnp.copy, parameters), "center": jnp.zeros(PROTOTYPES)}

    def loss_and_metrics(self, module, parameters, inputs, targets, key, train, state=None):
        student = [module.apply({"params": parameters}, view, train=train, rngs={"dropout": key}) for view in inputs]
        teacher = [module.apply({"params": state["teacher"]}, view) for view in inputs]
        wanted = [jax.nn.softmax((logits - state["center"]) / 0.1) for logits in teacher]
        losses = [-(w * jax.nn.log_softmax(s)).sum(axis=-1) for w, s in zip(wanted, student[::-1], strict=True)]
        loss = sum(losses).mean() / 2
        return loss, {"loss": loss, "teacher_mean": jnp.concatenate(teacher).mean(axis=0)}

    def after_update(self, state, parameters, metrics, step):
        teacher = jax.tree.map(lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new, state["teacher"], parameters)
        center = CENTER_MOMENTUM * state["center"] + (1 - CENTER_MOMENTUM) * metrics["teacher_mean"]
        return {"teacher": teacher, "center": center}

    def eval_sums(self, module, parameters, views, labels, example_ids):
        entropy = -jax.nn.log_softmax(module.apply({"params": parameters}, views[0])).max(axis=-1)
        return {"loss": jnp.where(example_ids >= 0, entropy, 0.0).sum(), "examples": (example_ids >= 0).sum()}


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "masked_autoencoder", SelfDistillation)


def config_of(**sections):
    return tiny_config(train={"objective": "masked_autoencoder", **sections.pop("train", {})}, **sections)


@pytest.mark.slow
def test_the_step_carries_teacher_and_center(registered, toy):
    config = config_of(train={"steps": 4, "batch_size": 16, "accumulation": 2}, augment={"crop_padding": 1})
    run = toy(config)
    state = run.start()
    perturbed = jax.tree.map(lambda leaf: leaf + 0.01, state.parameters)
    state = state.replace(parameters=perturbed, objective=run.objective.init_state(perturbed))
    before = jax.device_get(state)
    after, metrics = run.run(state, 1)
    after = jax.device_get(after)
    teacher = jax.tree.map(
        lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new, before.objective["teacher"], after.parameters
    )
    chex.assert_trees_all_close(after.objective["teacher"], teacher, rtol=1e-6)
    assert np.abs(after.objective["center"] - CENTER_MOMENTUM * before.objective["center"]).max() > 1e-6
    assert set(metrics) == {"loss", "gradient_norm", "count", "skipped", "step", "nonfinite_streak", "updates"}


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(registered, tmp_path):
    sections = {"checkpoint": {"every": 3, "keep": 9}, "log": {"every": 3, "tensorboard": False}}
    config = config_of(train={"steps": 6, "batch_size": 64}, **sections)
    train.train(config, tmp_path / "whole")
    half = config_of(train={"steps": 6, "batch_size": 64, "max_minutes": 0.0}, **sections)
    assert train.train(half, tmp_path / "resumed") is None
    train.train(config, tmp_path / "resumed")
    experiment = setup.assemble(config, sharding.make_mesh(1), setup.load_sources(config))
    like = experiment.abstract_state().to_arrays()
    assert "objective" in like and step.make_update(experiment) is not None
    states = []
    for name in ("whole", "resumed"):
        with CheckpointManager(tmp_path / name, read_only=True) as checkpoints:
            states.append(checkpoints.restore(like, 6))
    chex.assert_trees_all_equal(*states)
