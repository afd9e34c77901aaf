import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import sharding
from vit_jax.data import pipeline
from vit_jax.data.augment import Augment
from vit_jax.data.sources import Source
from vit_jax.evaluation import exact
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives import losses
from vit_jax.objectives.classification import Classification

CLASSES = 7
CLASSIFY = Classification()


def expected_metrics(logits, labels):
    """Returns top-1 accuracy, top-5 accuracy and loss, computed in float64 by sorting."""
    logits = logits.astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    return (order[:, 0] == labels).mean(), (order[:, :5] == labels[:, None]).any(1).mean(), loss.mean()


def test_score_agrees_with_sorting():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, CLASSES)).astype(np.float32)
    logits[:40] = logits[:40].round()  # ties
    labels = generator.integers(0, CLASSES, 200).astype(np.int32)
    sums = losses.eval_sums(jnp.asarray(logits), jnp.asarray(labels), jnp.ones(200, bool))
    accuracy, top5, loss = expected_metrics(logits, labels)
    assert sums["correct"] == round(200 * accuracy)
    assert sums["top5"] == round(200 * top5)
    assert float(sums["loss"]) / 200 == pytest.approx(loss, rel=1e-5)


def test_score_counts_nan_logits_as_wrong_and_ignores_padding():
    logits = jnp.asarray([[1.0, np.nan, 0], [3, 1, 0], [3, 1, 0], [np.inf, 0, 0]])
    sums = losses.eval_sums(logits, jnp.asarray([0, 0, 0, 0], jnp.int32), jnp.asarray([True, True, False, True]))
    assert {name: int(sums[name]) for name in ("examples", "correct", "top5")} == {
        "examples": 3,
        "correct": 1,
        "top5": 1,
    }


@pytest.fixture(scope="module")
def trained():
    """Returns images, a model with a random head, and the expected metrics."""
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (83, 4, 4, 1), np.uint8)
    labels = generator.integers(0, CLASSES, 83).astype(np.int32)
    source = Source("toy", "test", images, labels, tuple("abcdefg"), (0.5,), (0.3,))
    model = VisionTransformer(classes=CLASSES, patch_size=2, width=8, depth=1, heads=2, mlp_width=8)
    augment = Augment(source.mean, source.std)
    parameters = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    parameters["head"]["logits"]["kernel"] = jax.random.normal(jax.random.key(1), (8, CLASSES))
    logits = model.apply({"params": parameters}, augment.normalize(jnp.asarray(images)))
    return source, model, augment, parameters, expected_metrics(np.asarray(logits), labels)


@pytest.mark.slow
def test_probabilities_of_views_are_averaged(trained):
    source, model, augment, parameters, _ = trained
    augment = dataclasses.replace(augment, test_flip=True, test_shift=1)
    views = [np.asarray(model.apply({"params": parameters}, v)) for v in augment.views(jnp.asarray(source.images))]
    exponentials = [np.exp(view.astype(np.float64)) for view in views]
    probabilities = [view / view.sum(1, keepdims=True) for view in exponentials]
    assert len(probabilities) == 10
    accuracy, top5, loss = expected_metrics(np.log(np.mean(probabilities, axis=0)), source.labels)
    mesh = sharding.make_mesh(1)
    scorer = exact.make_scorer(model, augment, mesh, CLASSIFY)
    metrics, _ = exact.evaluate(scorer, parameters, pipeline.make(source, mesh), 83, "test", CLASSIFY)
    assert (metrics["test/accuracy"], metrics["test/top5"]) == (accuracy, top5)
    assert metrics["test/loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch_size, devices, resident",
    [(83, 1, "always"), (16, 1, "always"), (16, 8, "always"), (8, 2, "never"), (1, 1, "never")],
)
def test_metrics_do_not_depend_on_batch_size_devices_or_residency(trained, batch_size, devices, resident):
    source, model, augment, parameters, (accuracy, top5, loss) = trained
    mesh = sharding.make_mesh(devices)
    scorer = exact.make_scorer(model, augment, mesh, CLASSIFY)
    parameters = jax.device_put(parameters, sharding.replicated(mesh))
    batches = pipeline.make(source, mesh, resident)
    metrics, _ = exact.evaluate(scorer, parameters, batches, batch_size, "test", CLASSIFY)
    assert metrics["test/examples"] == 83
    assert metrics["test/accuracy"] == accuracy
    assert metrics["test/top5"] == top5
    assert metrics["test/loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_evaluation_stops_on_request(trained):
    source, model, augment, parameters, _ = trained
    mesh = sharding.make_mesh(1)
    scorer, batches = exact.make_scorer(model, augment, mesh, CLASSIFY), pipeline.make(source, mesh)
    answers = iter([False, True])
    with pytest.raises(exact.Interrupted):
        exact.evaluate(scorer, parameters, batches, 4, "test", CLASSIFY, should_stop=lambda: next(answers))
