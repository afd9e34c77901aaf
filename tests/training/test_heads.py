"""Several heads on one backbone: the sum of their losses, and what does not change when one of them is trained."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config.check import check_config
from vit_jax.errors import UserError
from vit_jax.objectives import losses
from vit_jax.optim import ema, trainable
from vit_jax.training import step

TWO = {"labels": ("label", "parity")}
# Everything that could change a frozen parameter: weight decay, momentum, averaging, noise in the backbone.
PUSHING = {
    "optimizer": {"weight_decay": 0.5, "average_decay": 0.9, "gradient_clip": 1.0},
    "model": {"dropout": 0.3, "stochastic_depth": 0.2},
}


def perturbed(run):
    """A state in which no parameter is zero, as those of heads are at the start."""
    state = run.start()
    keys = iter(jax.random.split(jax.random.key(1), 100))

    def perturb(leaf):
        return leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)

    parameters = jax.tree.map(perturb, state.parameters)
    averaged = None if state.averaged is None else jax.tree.map(jnp.copy, parameters)
    return state.replace(parameters=parameters, averaged=averaged)


def unchanged(before, after):
    """The names of the parameters that are bitwise what they were."""
    old, new = (jax.tree_util.tree_leaves_with_path(tree) for tree in (before, after))
    pairs = zip(old, new, strict=True)
    return {trainable.name_of(path) for (path, a), (_, b) in pairs if np.array_equal(a, b)}


def test_the_loss_of_several_heads_is_their_weighted_sum():
    generator = np.random.default_rng(0)
    logits = {"a": generator.normal(size=(6, 5)), "b": generator.normal(size=(6, 3))}
    targets = {"a": np.eye(5)[np.arange(6) % 5], "b": np.eye(3)[np.arange(6) % 3]}
    wanted = {
        name: np.mean([np.log(np.exp(row).sum()) - row[one_hot.argmax()] for row, one_hot in zip(*pair, strict=True)])
        for name, pair in {name: (logits[name], targets[name]) for name in logits}.items()
    }
    arrays = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), (logits, targets))
    loss, metrics = losses.loss_and_metrics(*arrays, {"b": 0.25, "a": 2.0})
    assert loss == pytest.approx(2 * wanted["a"] + 0.25 * wanted["b"], rel=1e-5)
    assert metrics["a/loss"] == pytest.approx(wanted["a"], rel=1e-5)
    hits = (logits["b"].argmax(1) == targets["b"].argmax(1)).mean()
    assert metrics["accuracy"] == metrics["b/accuracy"] == pytest.approx(hits)  # b is named first


@pytest.mark.slow
def test_heads_trained_together_both_learn(toy, make_config):
    run = toy(
        make_config(data=TWO, train={"steps_per_dispatch": 250, "loss_weights": (("label", 1.0), ("parity", 0.5))})
    )
    state, metrics = run.run(run.start(), 250)
    assert set(state.parameters["head"]) == {"label", "parity"}
    assert metrics["label/accuracy"] / 50 > 0.9 and metrics["parity/accuracy"] / 50 > 0.9
    total = metrics["label/loss"] + 0.5 * metrics["parity/loss"]
    assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 1])
def test_training_one_head_leaves_the_backbone_and_the_other_bitwise_unchanged(toy, make_config, accumulation):
    pushing = {**PUSHING, "optimizer": {**PUSHING["optimizer"], "trained": ("head/parity/*",)}}
    run = toy(make_config(data=TWO, train={"accumulation": accumulation}, **pushing))
    before = perturbed(run)
    kept = jax.tree.map(np.array, before)
    after, _ = run.run(before, 20)
    names = {trainable.name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(kept.parameters)}
    trained = {"head/parity/logits/kernel", "head/parity/logits/bias"}
    assert unchanged(kept.parameters, after.parameters) == names - trained
    assert unchanged(kept.averaged, after.averaged) == names - trained


@pytest.mark.slow
def test_frozen_parts_stay_and_the_rest_is_trained(toy, make_config):
    run = toy(make_config(data=TWO, optimizer={"frozen": ("embedding/*", "encoder/block_0/mlp/*")}))
    before = perturbed(run)
    kept = jax.tree.map(np.array, before.parameters)
    after, _ = run.run(before, 5)
    same = unchanged(kept, after.parameters)
    assert same and all(name.startswith(("embedding/", "encoder/block_0/mlp/")) for name in same)
    assert {name.split("/")[0] for name in same} == {"embedding", "encoder"}


@pytest.mark.slow
def test_the_optimizer_has_no_state_for_frozen_parameters(toy, make_config):
    run = toy(make_config(optimizer={"trained": ("head/*",)}))
    sizes = [leaf.size for leaf in jax.tree.leaves(run.start().optimizer) if leaf.ndim]
    head = jax.tree.leaves(run.start().parameters["head"])
    assert sum(sizes) == 2 * sum(leaf.size for leaf in head)  # Adam's two moments


def gradients(run, parameters, mask):
    inputs = run.augment.normalize(jnp.asarray(run.source.images[:16]))
    targets = jax.nn.one_hot(run.source.labels[:16], 4)
    experiment, state = dataclasses.replace(run.experiment, mask=mask), run.start()

    def gradient(parameters):
        state_with = state.replace(parameters=parameters)
        return step.accumulate(experiment, state_with, inputs, targets, jax.random.key(0))[0]

    return jax.jit(gradient)(parameters)


@pytest.mark.slow
def test_the_gradient_of_the_trained_part_is_that_of_the_whole(toy, make_config):
    run = toy(make_config(optimizer={"trained": ("head/*", "encoder/norm/*")}))
    parameters = perturbed(run).parameters
    whole, part = gradients(run, parameters, None), gradients(run, parameters, run.mask)
    assert part["embedding"]["projection"]["kernel"] is None
    chex.assert_trees_all_close(part["head"], whole["head"], rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(part["encoder"]["norm"], whole["encoder"]["norm"], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_frozen_backbone_has_no_dropout(toy, make_config):
    parts = []
    for rate in (0.0, 0.5):
        run = toy(make_config(model={"dropout": rate}, optimizer={"trained": ("head/*",)}))
        parts.append(gradients(run, perturbed(run).parameters, run.mask))
    chex.assert_trees_all_equal(*parts)
    with_norm = trainable.trained(
        make_config(optimizer={"trained": ("head/*", "encoder/norm/*")}).optimizer, perturbed(run).parameters
    )
    noisy = gradients(run, perturbed(run).parameters, with_norm)
    assert not np.allclose(noisy["head"]["logits"]["kernel"], parts[1]["head"]["logits"]["kernel"])


def test_the_average_of_frozen_parameters_does_not_change():
    averaged = {"a": jnp.full(3, 0.1), "b": jnp.full(3, 0.7)}
    made = ema.update(averaged, {"a": None, "b": jnp.full(3, 1.0)}, jnp.asarray(50), 0.9)
    chex.assert_trees_all_equal(made["a"], averaged["a"])
    decay = 51 / 60
    np.testing.assert_allclose(made["b"], decay * 0.7 + (1 - decay), rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"trained": ("heads/*",)},
            "config.optimizer.trained: 'heads/*' matches no parameter\n  parameters: class_token, ",
        ),
        ({"frozen": ("encoder/block_7/*",)}, "config.optimizer.frozen: 'encoder/block_7/*' matches no parameter"),
        ({"trained": ("head/*",), "frozen": ("head/*",)}, "no parameter is left to train"),
    ],
)
def test_invalid_patterns_are_refused(toy, make_config, optimizer, message):
    with pytest.raises(UserError) as caught:
        toy(make_config(optimizer=optimizer))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["label", "label=x", "coarse=1", "label=-1", "label=0,parity=0", "label=inf"])
def test_invalid_loss_weights_are_refused(make_config, text):
    config = make_config(data=TWO, train={"loss_weights": text})
    with pytest.raises(UserError, match=r"config.train.loss_weights is .*\n  allowed: "):
        check_config(config)


@pytest.mark.slow
def test_adam_with_a_mask_is_adam_on_the_part_alone(toy, make_config):
    """Against optax on the head's parameters by themselves."""
    run = toy(make_config(optimizer={"trained": ("head/*",), "gradient_clip": 0.05}, train={"steps_per_dispatch": 1}))
    before = perturbed(run)
    head = jax.tree.map(jnp.copy, before.parameters["head"])
    images, labels = run.source.images, run.source.labels
    rows = np.asarray(run.feed(0, 1).indices[0])
    features = run.model.clone(classes=None).apply(
        {"params": {k: v for k, v in before.parameters.items() if k != "head"}},
        run.augment.normalize(jnp.asarray(images[rows])),
    )

    def loss(head):
        logits = features @ head["logits"]["kernel"] + head["logits"]["bias"]
        return losses.cross_entropy(logits, jax.nn.one_hot(labels[rows], 4)).mean()

    rule = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(1e-2, weight_decay=0.0))
    updates, _ = rule.update(jax.grad(loss)(head), rule.init(head), head)
    after, _ = run.run(before, 1)
    chex.assert_trees_all_close(after.parameters["head"], optax.apply_updates(head, updates), atol=1e-6)
