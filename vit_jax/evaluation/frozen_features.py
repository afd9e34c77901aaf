"""Quality of frozen features: few-shot regression, nearest neighbours and a linear probe, on one pair of splits."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from vit_jax import terminal
from vit_jax.data import finite
from vit_jax.errors import UserError, few
from vit_jax.evaluation import fewshot, knn, linear_probe
from vit_jax.progress import Counter

METHODS = ("fewshot", "knn", "probe")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which methods to run, and their options.

    Attributes:
        methods: of `METHODS`.
        shots: examples per class for few-shot regression; one result for each value.
        draws: number of random draws of these examples.
        fewshot_l2: L2 constant of few-shot regression; None for 4/3 of the width.
        neighbours: number of neighbours that vote; one result for each value.
        temperature: of the neighbours' votes.
        probe_l2: L2 constants that the linear probe chooses from.
        held_out: fraction of each class of the training split on which the probe chooses.
        seed: of the draws and of the held-out examples.
    """

    methods: tuple[str, ...] = METHODS
    shots: tuple[int, ...] = (1, 5, 10)
    draws: int = 5
    fewshot_l2: float | None = None
    neighbours: tuple[int, ...] = (20,)
    temperature: float = knn.TEMPERATURE
    probe_l2: tuple[float, ...] = linear_probe.L2
    held_out: float = linear_probe.HELD_OUT
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Examples:
    """Features [examples, width] and labels [examples] of a split."""

    features: Float[np.ndarray, "examples width"]
    labels: Int[np.ndarray, " examples"]


def check(settings: Settings, labels: Int[np.ndarray, " examples"], class_names: Sequence[str]) -> None:
    """Checks, before any features are computed, that a training split has enough examples for the settings.

    Raises:
        UserError: a class has fewer examples than shots, or the split has fewer examples than neighbours, or the
            held-out fraction of every class is less than one example.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    if "fewshot" in settings.methods and max(settings.shots) > counts.min():
        rarest = int(counts.argmin())
        raise UserError(
            f"--shots={max(settings.shots)}: class {class_names[rarest]!r} has {counts[rarest]} training examples\n"
            f"  allowed: at most {counts.min()}, more training data, or --methods=knn,probe"
        )
    if "knn" in settings.methods and max(settings.neighbours) > len(labels):
        raise UserError(
            f"--neighbours={max(settings.neighbours)}: there are {len(labels)} training examples\n"
            f"  allowed: at most {len(labels)}"
        )
    if "probe" in settings.methods and not linear_probe.hold_out(labels, settings.held_out, settings.seed).any():
        raise UserError(
            f"--held_out={settings.held_out} of each class is less than one example: L2 cannot be chosen\n"
            "  allowed: a larger fraction, more training data, or --methods=fewshot,knn"
        )


def evaluate(train: Examples, test: Examples, classes: int, settings: Settings) -> dict[str, object]:
    """Returns all results by name: 'fewshot/5/accuracy', 'knn/20/accuracy', 'probe/accuracy', 'test/examples', ...

    Every method scores every test example once; no choice depends on the test split.

    Raises:
        UserError: a feature is not finite.
    """
    for role, examples in (("train", train), ("test", test)):
        if len(rows := finite.not_finite_rows(examples.features)):
            raise UserError(
                f"the features of {len(rows):,} examples of {role} are not finite: {few(map(str, rows))}\n"
                "  recompute them, or use another backbone"
            )
    results: dict[str, object] = {
        "train/examples": len(train.labels),
        "test/examples": len(test.labels),
        "classes": classes,
        "width": train.features.shape[1],
    }
    if "fewshot" in settings.methods:
        results |= _evaluate_fewshot(train, test, classes, settings)
    if "knn" in settings.methods:
        results |= _evaluate_knn(train, test, classes, settings)
    if "probe" in settings.methods:
        results |= _evaluate_probe(train, test, classes, settings)
    return results


def _evaluate_fewshot(train: Examples, test: Examples, classes: int, settings: Settings) -> dict[str, object]:
    l2 = settings.fewshot_l2 or fewshot.L2_PER_FEATURE * train.features.shape[1]
    results: dict[str, object] = {"fewshot/l2": l2}
    with Counter("few-shot:", len(settings.shots) * settings.draws, "fits") as counter:
        for shots in settings.shots:
            accuracies = []
            for draw_index in counter.over(range(settings.draws)):
                indices = fewshot.draw(train.labels, classes, shots, settings.seed, draw_index)
                features = np.asarray(train.features[indices], np.float32)
                classifier = fewshot.fit(features, train.labels[indices], classes, l2)
                accuracies.append(_accuracy(classifier.predict(test.features), test.labels))
            results |= {
                f"fewshot/{shots}/accuracy": statistics.fmean(accuracies),
                f"fewshot/{shots}/std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                f"fewshot/{shots}/draws": accuracies,
            }
    return results


def _evaluate_knn(train: Examples, test: Examples, classes: int, settings: Settings) -> dict[str, object]:
    similarities, indices = knn.nearest(train.features, test.features, max(settings.neighbours))
    labels = train.labels[indices]
    results: dict[str, object] = {"knn/temperature": settings.temperature}
    for count in settings.neighbours:
        for name, temperature in (("accuracy", settings.temperature), ("majority_accuracy", None)):
            votes = knn.votes(similarities[:, :count], labels[:, :count], classes, temperature)
            results[f"knn/{count}/{name}"] = _accuracy(votes.argmax(axis=1), test.labels)
    return results


def _evaluate_probe(train: Examples, test: Examples, classes: int, settings: Settings) -> dict[str, object]:
    probe = linear_probe.Probe(train.features, train.labels, classes)
    choice = probe.choose(settings.probe_l2, settings.seed, settings.held_out)
    if len(settings.probe_l2) > 2 and choice.l2 in (min(settings.probe_l2), max(settings.probe_l2)):
        message = f"linear probe: the chosen L2 constant, {choice.l2:g}, is at the end of the grid; see --probe_l2"
        terminal.warn(message)
    with Counter("fitting the linear probe"):
        fit = probe.fit(choice.l2)
    return {
        "probe/accuracy": _accuracy(fit.classifier.predict(test.features), test.labels),
        "probe/l2": choice.l2,
        "probe/validation_accuracy": choice.accuracies[choice.l2],
        "probe/grid": [{"l2": l2, "validation_accuracy": value} for l2, value in sorted(choice.accuracies.items())],
        "probe/loss": fit.loss,
        "probe/iterations": fit.iterations,
    }


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())
