"""How well frozen features carry over: few-shot regression, nearest neighbours, a linear probe."""

import dataclasses
import statistics
import sys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from vit_jax.errors import UserError
from vit_jax.evaluation import fewshot, knn, linear_probe

METHODS = ("fewshot", "knn", "probe")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        methods: of `METHODS`.
        shots: examples a class that few-shot regression learns from.
        draws: of such examples, each its own.
        fewshot_l2: the constant of its regularisation; None for 4/3 of the width.
        neighbours: how many vote.
        temperature: of their votes.
        probe_l2: constants that the probe chooses from.
        held_out: share of each class of train that it chooses on.
        seed: of draws and held-out examples.
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


def check(settings: Settings, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Sees that a training split has examples enough; before its features are computed.

    Raises:
        UserError: a class has fewer examples than there are shots, or the split fewer than neighbours or held-out ones.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    if "fewshot" in settings.methods and max(settings.shots) > counts.min():
        few = int(counts.argmin())
        raise UserError(
            f"--shots={max(settings.shots)}: class {class_names[few]!r} has {counts[few]} training examples\n"
            f"  allowed: at most {counts.min()}, more data to train on, or --methods=knn,probe"
        )
    if "knn" in settings.methods and max(settings.neighbours) > len(labels):
        raise UserError(
            f"--neighbours={max(settings.neighbours)}: there are {len(labels)} training examples\n"
            f"  allowed: at most {len(labels)}"
        )
    if "probe" in settings.methods and not linear_probe.hold_out(labels, settings.held_out, settings.seed).any():
        raise UserError(
            f"--held_out={settings.held_out} of each class leaves no example to choose the probe's L2 constant on\n"
            "  give a larger share, more data to train on, or --methods=fewshot,knn"
        )


def evaluate(train: Examples, test: Examples, classes: int, settings: Settings) -> dict[str, object]:
    """All that is measured, by name: 'fewshot/5/accuracy', 'knn/20/accuracy', 'probe/accuracy', 'test/examples', ...

    Every test example is scored once by each method; nothing is chosen by them.
    """
    measured: dict[str, object] = {
        "train/examples": len(train.labels),
        "test/examples": len(test.labels),
        "classes": classes,
        "width": train.features.shape[1],
    }
    if "fewshot" in settings.methods:
        measured |= _few_shots(train, test, classes, settings)
    if "knn" in settings.methods:
        measured |= _neighbours(train, test, classes, settings)
    if "probe" in settings.methods:
        measured |= _probe(train, test, classes, settings)
    return measured


def _few_shots(train: Examples, test: Examples, classes: int, settings: Settings) -> dict[str, object]:
    l2 = settings.fewshot_l2 or fewshot.L2_A_FEATURE * train.features.shape[1]
    measured: dict[str, object] = {"fewshot/l2": l2}
    for shots in settings.shots:
        accuracies = []
        for number in range(settings.draws):
            places = fewshot.draw(train.labels, classes, shots, settings.seed, number)
            drawn = np.asarray(train.features[places], np.float32), train.labels[places]
            classifier = fewshot.fit(*drawn, classes, l2)
            accuracies.append(_accuracy(classifier.predict(test.features), test.labels))
        measured |= {
            f"fewshot/{shots}/accuracy": statistics.fmean(accuracies),
            f"fewshot/{shots}/std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            f"fewshot/{shots}/draws": accuracies,
        }
    return measured


def _neighbours(train: Examples, test: Examples, classes: int, settings: Settings) -> dict[str, object]:
    similarities, places = knn.nearest(train.features, test.features, max(settings.neighbours))
    labels = train.labels[places]
    measured: dict[str, object] = {"knn/temperature": settings.temperature}
    for count in settings.neighbours:
        for name, temperature in (("accuracy", settings.temperature), ("majority_accuracy", None)):
            votes = knn.votes(similarities[:, :count], labels[:, :count], classes, temperature)
            measured[f"knn/{count}/{name}"] = _accuracy(votes.argmax(axis=1), test.labels)
    return measured


def _probe(train: Examples, test: Examples, classes: int, settings: Settings) -> dict[str, object]:
    fits = linear_probe.Probe(train.features, train.labels, classes)
    choice = fits.choose(settings.probe_l2, settings.seed, settings.held_out)
    if len(settings.probe_l2) > 2 and choice.l2 in (min(settings.probe_l2), max(settings.probe_l2)):
        print(f"the probe's L2 constant, {choice.l2:g}, is at the end of its grid: see --probe_l2", file=sys.stderr)
    fit = fits.fit(choice.l2)
    return {
        "probe/accuracy": _accuracy(fit.classifier.predict(test.features), test.labels),
        "probe/l2": choice.l2,
        "probe/validation_accuracy": choice.accuracies[choice.l2],
        "probe/grid": [{"l2": l2, "validation_accuracy": value} for l2, value in sorted(choice.accuracies.items())],
        "probe/loss": fit.loss,
        "probe/iterations": fit.iterations,
    }


def _accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    return float((found == labels).mean())
