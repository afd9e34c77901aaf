"""What the predictions for every example of a split say about each class: recall, precision, F1 and confusions."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32

CALIBRATION_BINS = 15  # as in arXiv 1706.04599
UNBALANCED = 1.5  # ratio of the sizes of the largest and the smallest class from which balanced accuracy is shown
NOT_FINITE = -1  # predicted index of an example whose logits are not finite


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """The result of one class.

    Attributes:
        name: of the class.
        images: number of images of this class.
        correct: number of them that are predicted as this class.
        recall: correct / images; None without images.
        precision: correct / number of predictions of this class; None if it is never predicted.
        f1: harmonic mean of the two, 0 without a correct prediction; None without images and predictions.
        confused_with: the most frequent wrong prediction for its images, the first of several; None without one.
        confused: number of these predictions.
    """

    name: str
    images: int
    correct: int
    recall: float | None
    precision: float | None
    f1: float | None
    confused_with: str | None
    confused: int


class ReliabilityRow(NamedTuple):
    """The examples whose predicted class has a probability from `low` to `high`.

    Attributes:
        low: smallest probability.
        high: the probability below which the next row begins.
        examples: number of these examples.
        probability: mean of these probabilities; None without examples.
        accuracy: share of correct predictions; None without examples.
    """

    low: float
    high: float
    examples: int
    probability: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of one head for every example of a split.

    Attributes:
        labels: true class index of each example.
        predicted: index of the most probable class; `NOT_FINITE` if the logits are not finite.
        probability: of that class.
        class_names: one name per class.
        true_probability: of the true class.
        rank: of the true class by probability; 1 if the prediction is correct.
        nll: negative log-likelihood of the true class; NaN if the logits are not finite.
    """

    labels: Int32[np.ndarray, " examples"]
    predicted: Int32[np.ndarray, " examples"]
    probability: Float32[np.ndarray, " examples"]
    class_names: tuple[str, ...]
    true_probability: Float32[np.ndarray, " examples"]
    rank: Int32[np.ndarray, " examples"]
    nll: Float32[np.ndarray, " examples"]

    @functools.cached_property
    def images(self) -> Int[np.ndarray, " classes"]:
        """Number of examples per class."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    @functools.cached_property
    def correct(self) -> Int[np.ndarray, " classes"]:
        """Number of examples per class whose prediction is correct."""
        return np.bincount(self.labels[self.labels == self.predicted], minlength=len(self.class_names))

    @functools.cached_property
    def predictions(self) -> Int[np.ndarray, " classes"]:
        """Number of examples that are predicted as each class."""
        return np.bincount(self.predicted[self.predicted != NOT_FINITE], minlength=len(self.class_names))

    def confusion(self) -> Int[np.ndarray, "classes classes"]:
        """Returns the number of examples by true class (row) and predicted class (column)."""
        count, finite = len(self.class_names), self.predicted != NOT_FINITE
        pairs = self.labels[finite].astype(np.int64) * count + self.predicted[finite]
        return np.bincount(pairs, minlength=count * count).reshape(count, count)

    def rows(self) -> list[ClassRow]:
        """Returns the result of every class, in the order of the classes."""
        confused = self._most_confused()
        return [self._row(index, *confused.get(index, (None, 0))) for index in range(len(self.class_names))]

    def _row(self, index: int, confused_with: int | None, confused: int) -> ClassRow:
        images, correct, predicted = (int(a[index]) for a in (self.images, self.correct, self.predictions))
        return ClassRow(
            self.class_names[index],
            images,
            correct,
            correct / images if images else None,
            correct / predicted if predicted else None,
            2 * correct / (images + predicted) if images + predicted else None,
            None if confused_with is None else self.class_names[confused_with],
            confused,
        )

    def _most_confused(self) -> dict[int, tuple[int, int]]:
        """Class -> the class that most of its wrongly predicted examples are taken for, and their number."""
        wrong = (self.labels != self.predicted) & (self.predicted != NOT_FINITE)
        pairs, counts = np.unique(np.stack([self.labels[wrong], self.predicted[wrong]]), axis=1, return_counts=True)
        found: dict[int, tuple[int, int]] = {}
        for label, predicted, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            if count > found.get(label, (0, 0))[1]:
                found[label] = predicted, count
        return found

    def balanced_accuracy(self) -> float:
        """Returns the mean recall of the classes that have examples."""
        present = self.images > 0
        return float((self.correct[present] / self.images[present]).mean())

    def macro_f1(self) -> float:
        """Returns the mean F1 of the classes that have examples or are predicted."""
        return float(np.mean([row.f1 for row in self.rows() if row.f1 is not None]))

    def calibration_error(self) -> float:
        """Returns the expected calibration error (arXiv 1706.04599, eq. 3) with 15 bins of equal width.

        It is the mean difference between the probability of the predicted class and the accuracy, over bins of
        examples with similar probabilities. NaN if the logits of an example are not finite.
        """
        if (self.predicted == NOT_FINITE).any():
            return float("nan")
        rows = [row for row in self.reliability() if row.examples]
        return sum(row.examples * abs(row.probability - row.accuracy) for row in rows) / len(self.labels)

    def reliability(self) -> list[ReliabilityRow]:
        """Returns 15 bins of equal width, by the probability of the predicted class; the last one includes 1.

        Examples whose logits are not finite are left out.
        """
        finite = self.predicted != NOT_FINITE
        probability, correct = self.probability[finite].astype(np.float64), (self.labels == self.predicted)[finite]
        bins = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        counts, *sums = (np.bincount(bins, of, CALIBRATION_BINS) for of in (None, probability, correct))
        return [
            ReliabilityRow(
                index / CALIBRATION_BINS,
                (index + 1) / CALIBRATION_BINS,
                int(count),
                *(float(of[index] / count) if count else None for of in sums),
            )
            for index, count in enumerate(counts)
        ]

    def metrics(self) -> dict[str, float]:
        """Returns 'balanced_accuracy', 'macro_f1', 'nll' (the mean) and 'calibration_error'."""
        return {
            "balanced_accuracy": self.balanced_accuracy(),
            "macro_f1": self.macro_f1(),
            "nll": float(self.nll.astype(np.float64).mean()),
            "calibration_error": self.calibration_error(),
        }

    def is_unbalanced(self) -> bool:
        """Returns whether the largest class has at least 1.5 times as many examples as the smallest one present."""
        present = self.images[self.images > 0]
        return bool(present.max() >= UNBALANCED * present.min())

    def worst(self, count: int) -> list[ClassRow]:
        """Returns up to `count` classes of the lowest recall, below 1, the lowest first."""
        wrong = [row for row in self.rows() if row.recall is not None and row.recall < 1]
        return sorted(wrong, key=_recall_and_size)[:count]


def _recall_and_size(row: ClassRow) -> tuple[float, int]:
    """The order of `worst`: of two classes with the same recall, the one with more images first."""
    return row.recall, -row.images
