"""Every objective there is: its loss against NumPy, one device beside eight, evaluation of a split, and learning."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config, sharding
from vit_jax.data import pipeline
from vit_jax.evaluation import exact
from vit_jax.models import masked_patches, variants
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives import OBJECTIVES, classification, losses, masked

# Options with which each learns on the toy set, and a loss that it then comes below.
OPTIONS = {
    "classify": ({}, 0.5),
    "masked_patches": ({"optimizer": {"learning_rate": 2e-2}}, 1.2),
    "masked_autoencoder": ({"decoder": {"width": 8, "depth": 1, "heads": 2, "mlp_width": 8}}, 0.95),
}


def options_of(name, **sections):
    required, _ = OPTIONS[name]
    return {**required, **sections, "train": {"objective": name, **sections.get("train", {})}}


def test_every_objective_is_tested():
    assert set(OPTIONS) == set(OBJECTIVES) == set(config.OPTIONS["train"]["objective"].choices)


def all_but_one_slow(names, quick):
    """Parameters of a test: each takes a compilation, and one of them shows what is the same in all."""
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_one_slow(OBJECTIVES, "masked_autoencoder"))
def test_its_loss_falls(toy, make_config, name):
    run = toy(make_config(**options_of(name, train={"steps_per_dispatch": 300}, log={"every": 100})))
    _, first = run.run(run.start(), 1)
    _, last = run.run(run.start(), 300)
    assert last["loss"] / last["count"] < OPTIONS[name][1] < first["loss"]
    assert set(last) >= set(run.objective.metrics)


MASKED = [name for name, kind in OBJECTIVES.items() if issubclass(kind, masked.Masked)]


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but_one_slow(MASKED, "masked_patches"))
def test_eight_devices_make_the_losses_of_one(toy, make_config, name):
    ends = []
    for devices in (1, 8):
        config = make_config(**options_of(name, model={"dropout": 0.1}, log={"every": 1}))
        run = toy(config, devices)
        state, found = run.start(), []
        for _ in range(5):
            state, metrics = run.run(state, 1)
            found.append(float(metrics["loss"]))
        ends.append(found)
    assert np.ptp(ends[0]) > 0.01
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_the_whole_split_is_scored_whatever_the_batch_size_or_devices(toy, make_config, name):
    """Against the mean over all images, each asked for what follows from its place in the split."""
    run = toy(make_config(**options_of(name)))
    parameters = run.start().parameters
    inputs = run.augment.normalize(jnp.asarray(run.source.images))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(100))
    outputs, hidden = (np.asarray(array) for array in jax.jit(run.module.apply)({"params": parameters}, inputs, keys))
    wanted = np.mean([by_hand(name, run, np.asarray(inputs)[i], outputs[i], hidden[i]) for i in range(100)])
    for batch_size, devices, resident in ((100, 1, "always"), (7, 1, "never"), (16, 8, "always")):
        mesh = sharding.make_mesh(devices)
        scorer = exact.make_scorer(run.module, run.augment, mesh, run.objective)
        here = jax.device_put(parameters, sharding.replicated(mesh))
        batches = pipeline.make(run.source, mesh, resident)
        metrics, _ = exact.evaluate(scorer, here, batches, batch_size, "test", objective=run.objective)
        assert metrics["test/examples"] == 100
        assert metrics["test/loss"] == pytest.approx(wanted, rel=1e-5)
        assert not any("accuracy" in key for key in metrics if key != "test/colour_accuracy")


def by_hand(name, run, image, outputs, hidden):
    """The loss of one image in float64: the mean over its hidden patches alone."""
    values = []
    for patch in np.flatnonzero(hidden):
        top, left = 2 * (patch // 2), 2 * (patch % 2)
        pixels = image[top : top + 2, left : left + 2].reshape(-1).astype(np.float64)
        predicted = outputs[patch].astype(np.float64)
        if name == "masked_autoencoder":
            wanted = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            values.append(np.mean((predicted - wanted) ** 2))
        else:
            mean = round(255 * (pixels * run.source.std[0] + run.source.mean[0]).mean(), 3)
            values.append(np.log(np.exp(predicted).sum()) - predicted[int(mean) >> 5])
    return np.mean(values)


@pytest.mark.slow
def test_the_loss_of_a_batch_is_that_of_its_hidden_patches(toy, make_config):
    """Predictions for visible patches do not count; the targets may also be pixels that are not normalized."""
    decoder = {**OPTIONS["masked_autoencoder"][0]["decoder"], "normalize_patches": False}
    run = toy(make_config(train={"objective": "masked_autoencoder"}, decoder=decoder))
    parameters, key = run.start().parameters, jax.random.key(4)
    inputs, loss = loss_of(run, parameters)
    keys = jax.random.split(jax.random.fold_in(key, 1), 16)
    outputs, hidden = (np.asarray(array) for array in jax.jit(run.module.apply)({"params": parameters}, inputs, keys))
    errors = []
    for image, patch in np.argwhere(hidden):
        top, left = 2 * (patch // 2), 2 * (patch % 2)
        pixels = np.asarray(inputs)[image, top : top + 2, left : left + 2].reshape(-1)
        errors.append(np.mean((outputs[image, patch].astype(np.float64) - pixels) ** 2))
    assert len(errors) == 16 * 3
    assert float(loss(key)) == pytest.approx(np.mean(errors), rel=1e-5)


def loss_of(run, parameters):
    """Sixteen images, and the function from a key to the loss on them."""
    inputs = run.augment.normalize(jnp.asarray(run.source.images[:16]))
    return inputs, jax.jit(
        lambda key: run.objective.loss_and_metrics(run.module, parameters, inputs, {}, key, False)[0]
    )


@pytest.mark.slow
def test_each_step_hides_other_patches(toy, make_config):
    run = toy(make_config(**options_of("masked_patches", log={"every": 1})))
    _, loss = loss_of(run, run.start().parameters)
    seen = [float(loss(jax.random.key(seed))) for seed in (1, 1, 2)]
    assert seen[0] == seen[1] != seen[2]


def test_colours_are_read_from_what_is_normalised(toy, make_config):
    run = toy(make_config(**options_of("masked_patches")))
    assert (run.module.mean, run.module.std) == (run.source.mean, run.source.std)
    patches = jnp.asarray([[[1.0] * 4]])  # one deviation above the mean: 0.5, or 127.5
    assert masked_patches.mean_colours(patches, run.module.mean, run.module.std).tolist() == [[3]]


def sigmoid_by_hand(logits, targets):
    share = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return -(targets * np.log(share) + (1 - targets) * np.log(1 - share)).sum(axis=1)


def test_the_sigmoid_loss_is_the_sum_over_classes():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(6, 5)).astype(np.float32), np.arange(6) % 5
    targets = 0.9 * np.eye(5)[labels] + 0.1 / 5
    wanted = sigmoid_by_hand(logits, targets)
    made = losses.sigmoid_cross_entropy(jnp.asarray(logits), jnp.asarray(targets, jnp.float32))
    np.testing.assert_allclose(made, wanted, rtol=1e-5)
    arrays = {"a": jnp.asarray(logits), "b": jnp.asarray(logits)}, {"a": jnp.eye(5)[labels], "b": jnp.eye(5)[labels]}
    total, metrics = losses.loss_and_metrics(*arrays, {"a": 1.0, "b": 0.5}, "sigmoid")
    plain = sigmoid_by_hand(logits, np.eye(5)[labels]).mean()
    assert metrics["b/loss"] == pytest.approx(plain, rel=1e-5) and total == pytest.approx(1.5 * plain, rel=1e-5)
    sums = losses.eval_sums(arrays[0]["a"], jnp.asarray(labels, jnp.int32), jnp.arange(6) != 2, "sigmoid")
    kept = np.delete(sigmoid_by_hand(logits, np.eye(5)[labels]), 2)
    assert float(sums["loss"]) == pytest.approx(kept.sum(), rel=1e-5)


def test_views_are_averaged_as_the_loss_takes_them():
    views = [np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32) for seed in (0, 1)]
    share = np.mean([1 / (1 + np.exp(-view.astype(np.float64))) for view in views], axis=0)
    mean = losses.mean_probability([jnp.asarray(view) for view in views], "sigmoid")
    np.testing.assert_allclose(mean, np.log(share / (1 - share)), rtol=1e-5)


@pytest.mark.slow
def test_a_run_is_trained_and_evaluated_by_the_same_loss(toy, make_config):
    """From a bias of -10 the loss of a head of zeros is known: 10 for the class that is there, nothing for others."""
    run = toy(make_config(train={"loss": "sigmoid"}, model={"head_bias": -10.0}, log={"every": 1}))
    wanted = np.log1p(np.exp(10.0)) + 3 * np.log1p(np.exp(-10.0))
    start = run.start()
    np.testing.assert_array_equal(start.parameters["head"]["logits"]["bias"], np.full(4, -10.0))
    parameters = jax.tree.map(jnp.copy, start.parameters)
    _, metrics = run.run(start, 1)
    assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-6)
    scorer = exact.make_scorer(run.module, run.augment, run.mesh, run.objective)
    made, _ = exact.evaluate(scorer, parameters, run.feeds, 32, "test", objective=run.objective)
    assert made["test/loss"] == pytest.approx(wanted, rel=1e-6)


def test_the_default_objective_is_classification_by_softmax():
    assert classification.Classification({"label": 1.0}, "softmax", 0.0) == classification.Classification()


def test_parameters_of_a_backbone_take_their_place_in_a_module():
    objective, own = masked.Autoencoding(), {"backbone": {"a": 1}, "decoder": {"b": 2}}
    adopted = objective.init_from_backbone({"a": 3}, lambda: own)
    chex.assert_trees_all_equal(adopted, {"backbone": {"a": 3}, "decoder": {"b": 2}})
    assert objective.backbone(adopted) == {"a": 3}


@pytest.mark.parametrize("classes, shown", [(2, False), (5, False), (6, True), ({"label": 4, "parity": 9}, False)])
def test_the_top_5_accuracy_is_printed_for_more_than_five_classes_alone(classes, shown):
    heads = classes if isinstance(classes, dict) else {"label": classes}
    objective = classification.Classification(dict.fromkeys(heads, 1.0))
    names = [*heads][1:]
    metrics = {"test/accuracy": 0.5, "test/top5": 0.75, "test/loss": 1.25, "test/examples": 1200}
    metrics |= {f"test/{name}/accuracy": 0.25 for name in names}
    line = objective.describe("test", metrics, VisionTransformer(classes=classes, **variants.fields("Ti/4")))
    top5, others = ", top-5 75.00 %" if shown else "", "".join(f", {name}: accuracy 25.00 %" for name in names)
    assert line == f"accuracy 50.00 %{top5}, loss 1.2500{others} on 1,200 examples"
