"""Several heads on one backbone: how their losses add up, and what stays untouched when one of them is trained."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import config as options
from vit_jax.errors import UserError
from vit_jax.objectives import losses
from vit_jax.optim import trainable
from vit_jax.training import step

TWO = {"labels": "label,parity"}
# Everything that could touch a parameter that is not trained: decay, momentum, averaging, noise in the backbone.
PUSHING = {
    "optimizer": {"weight_decay": 0.5, "average_decay": 0.9, "gradient_clip": 1.0},
    "model": {"dropout": 0.3, "stochastic_depth": 0.2},
}


def shaken(run):
    """A start in which no parameter is zero, as heads are."""
    state = run.start()
    keys = iter(jax.random.split(jax.random.key(1), 100))
    shake = lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)  # noqa: E731
    parameters = jax.tree.map(shake, state.parameters)
    averaged = None if state.averaged is None else jax.tree.map(jnp.copy, parameters)
    return state.replace(parameters=parameters, averaged=averaged)


def untouched(before, after):
    """The names of the parameters that are bitwise what they were."""
    old, new = (jax.tree_util.tree_leaves_with_path(tree) for tree in (before, after))
    pairs = zip(old, new, strict=True)
    return {trainable.name_of(path) for (path, a), (_, b) in pairs if np.array_equal(a, b)}


def test_the_loss_of_several_heads_is_their_weighted_sum():
    generator = np.random.default_rng(0)
    logits = {"a": generator.normal(size=(6, 5)), "b": generator.normal(size=(6, 3))}
    targets = {"a": np.eye(5)[np.arange(6) % 5], "b": np.eye(3)[np.arange(6) % 3]}
    wanted = {
        name: np.mean([np.log(np.exp(row).sum()) - row[place.argmax()] for row, place in zip(*pair, strict=True)])
        for name, pair in {name: (logits[name], targets[name]) for name in logits}.items()
    }
    arrays = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), (logits, targets))
    loss, metrics = losses.measure(*arrays, {"b": 0.25, "a": 2.0})
    assert loss == pytest.approx(2 * wanted["a"] + 0.25 * wanted["b"], rel=1e-5)
    assert metrics["a/loss"] == pytest.approx(wanted["a"], rel=1e-5)
    hits = (logits["b"].argmax(1) == targets["b"].argmax(1)).mean()
    assert metrics["accuracy"] == metrics["b/accuracy"] == pytest.approx(hits)  # b is named first


@pytest.mark.slow
def test_heads_trained_together_both_learn(toy, make_config):
    run = toy(make_config(data=TWO, train={"steps_per_dispatch": 250, "loss_weights": "label=1,parity=0.5"}))
    state, metrics = run.run(run.start(), 250)
    assert set(state.parameters["head"]) == {"label", "parity"}
    assert metrics["label/accuracy"] / 50 > 0.9 and metrics["parity/accuracy"] / 50 > 0.9
    total = metrics["label/loss"] + 0.5 * metrics["parity/loss"]
    assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 1])
def test_training_one_head_leaves_the_backbone_and_the_other_bitwise_untouched(toy, make_config, accumulation):
    pushing = {**PUSHING, "optimizer": {**PUSHING["optimizer"], "trained": "head/parity/*"}}
    run = toy(make_config(data=TWO, train={"accumulation": accumulation}, **pushing))
    before = shaken(run)
    kept = jax.tree.map(np.array, before)
    after, _ = run.run(before, 20)
    names = {trainable.name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(kept.parameters)}
    trained = {"head/parity/logits/kernel", "head/parity/logits/bias"}
    assert untouched(kept.parameters, after.parameters) == names - trained
    assert untouched(kept.averaged, after.averaged) == names - trained


@pytest.mark.slow
def test_frozen_parts_stay_and_the_rest_is_trained(toy, make_config):
    run = toy(make_config(data=TWO, optimizer={"frozen": "embedding/*,encoder/block_0/mlp/*"}))
    before = shaken(run)
    kept = jax.tree.map(np.array, before.parameters)
    after, _ = run.run(before, 5)
    same = untouched(kept, after.parameters)
    assert same and all(name.startswith(("embedding/", "encoder/block_0/mlp/")) for name in same)
    assert {name.split("/")[0] for name in same} == {"embedding", "encoder"}


def test_the_optimiser_keeps_nothing_for_frozen_parameters(toy, make_config):
    run = toy(make_config(optimizer={"trained": "head/*"}))
    sizes = [leaf.size for leaf in jax.tree.leaves(run.start().optimizer) if leaf.ndim]
    head = jax.tree.leaves(run.start().parameters["head"])
    assert sum(sizes) == 2 * sum(leaf.size for leaf in head)  # Adam's two moments


def gradients(run, parameters, mask):
    inputs = run.augment.normalize(jnp.asarray(run.source.images[:16]))
    targets = jax.nn.one_hot(run.source.labels[:16], 4)
    compiled = jax.jit(lambda p: step.accumulate(run.model, p, inputs, targets, jax.random.key(0), 1, None, mask))
    return compiled(parameters)[0]


def test_the_gradient_of_the_trained_part_is_that_of_the_whole(toy, make_config):
    run = toy(make_config(optimizer={"trained": "head/*,encoder/norm/*"}))
    parameters = shaken(run).parameters
    whole, part = gradients(run, parameters, None), gradients(run, parameters, run.mask)
    assert part["embedding"]["projection"]["kernel"] is None
    chex.assert_trees_all_close(part["head"], whole["head"], rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(part["encoder"]["norm"], whole["encoder"]["norm"], rtol=1e-5, atol=1e-7)


def test_below_heads_alone_there_is_no_dropout(toy, make_config):
    parts = []
    for rate in (0.0, 0.5):
        run = toy(make_config(model={"dropout": rate}, optimizer={"trained": "head/*"}))
        parts.append(gradients(run, shaken(run).parameters, run.mask))
    chex.assert_trees_all_equal(*parts)
    with_norm = trainable.trained(
        make_config(optimizer={"trained": "head/*,encoder/norm/*"}).optimizer, shaken(run).parameters
    )
    noisy = gradients(run, shaken(run).parameters, with_norm)
    assert not np.allclose(noisy["head"]["logits"]["kernel"], parts[1]["head"]["logits"]["kernel"])


def test_the_average_of_what_is_frozen_is_what_it_is():
    averaged = {"a": jnp.full(3, 0.1), "b": jnp.full(3, 0.7)}
    made = step.average(averaged, {"a": None, "b": jnp.full(3, 1.0)}, jnp.asarray(50), 0.9)
    chex.assert_trees_all_equal(made["a"], averaged["a"])
    decay = 51 / 60
    np.testing.assert_allclose(made["b"], decay * 0.7 + (1 - decay), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"trained": "heads/*"},
            "config.optimizer.trained: no parameter is named 'heads/*'\n  there are: class_token, ",
        ),
        ({"frozen": "encoder/block_7/*"}, "config.optimizer.frozen: no parameter is named 'encoder/block_7/*'"),
        ({"trained": "head/*", "frozen": "head/*"}, "which leaves nothing to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(toy, make_config, given, said):
    with pytest.raises(UserError) as caught:
        toy(make_config(optimizer=given))
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["label", "label=x", "coarse=1", "label=-1", "label=0,parity=0", "label=inf"])
def test_loss_weights_that_cannot_be_meant_are_refused(make_config, text):
    config = make_config(data=TWO, train={"loss_weights": text})
    with pytest.raises(UserError, match=r"config.train.loss_weights is .*\n  allowed: "):
        options.check(config)


@pytest.mark.slow
def test_adam_with_a_mask_is_adam_on_the_part_alone(toy, make_config):
    """Against optax on the head's parameters by themselves."""
    run = toy(make_config(optimizer={"trained": "head/*", "gradient_clip": 0.05}, train={"steps_per_dispatch": 1}))
    before = shaken(run)
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
