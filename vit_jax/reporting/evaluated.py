"""The sections about the predictions of a run: test figures, classes, calibration, mistakes, samples, pictures."""

import dataclasses
import math
from typing import Any

import numpy as np

from vit_jax.evaluation.per_class import CALIBRATION_BINS, ClassRow, Predictions
from vit_jax.reporting import charts, images
from vit_jax.reporting.html import Html, details, element, join, scrolling, table, values
from vit_jax.reporting.images import Tile

Z = 1.959963984540054  # of the normal distribution, for intervals of 95 %
MAX_CELLS = 20  # classes of a matrix whose counts are written; of more, a picture is drawn
MAX_PAIRS = 12  # confusions that are listed
MAX_ROWS = 100  # classes that are listed
MAX_ASPECT = 1.6  # width over height of pictures that are side by side; wider ones have the width of the page


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """What the evaluation of a run gives.

    Attributes:
        split: that was evaluated.
        step: of the checkpoint.
        metrics: as `exact.evaluate` names them.
        heads: the predictions of each head; {} for a run without labels.
        matrices: of heads with many classes, the picture of the confusion matrix, an image file.
        mistakes: the most confident mistakes of each head.
        samples: images as the first training step receives them.
        pictures: of the model, by title: an image file and a sentence.
        missing: what could not be made, and why.
    """

    split: str
    step: int
    metrics: dict[str, Any]
    heads: dict[str, Predictions]
    matrices: dict[str, bytes] = dataclasses.field(default_factory=dict)
    mistakes: dict[str, list[Tile]] = dataclasses.field(default_factory=dict)
    samples: list[Tile] = dataclasses.field(default_factory=list)
    pictures: dict[str, tuple[bytes, str]] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of a share (doi:10.1080/01621459.1927.10502953)."""
    share, spread = correct / total, Z * Z / total
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return (0.0 if correct == 0 else low), (1.0 if correct == total else high)


def interval(accuracy: float, total: int) -> str:
    """Returns '97.00 to 99.00 %', the Wilson interval of an accuracy."""
    low, high = wilson(round(accuracy * total), total)
    return f"{100 * low:.2f} to {100 * high:.2f} %"


def classes(found: Evaluated) -> Html:
    """Returns the confusion matrix of each head and the results of its classes."""
    parts = []
    for head, predictions in found.heads.items():
        large = len(predictions.class_names) > MAX_CELLS
        title = "Confusion matrix" if len(found.heads) == 1 else f"Confusion matrix of {head}"
        parts.append(element("h3", title))
        if not large:
            parts.append(_matrix(predictions, title))
        elif head in found.matrices:
            text = (
                f"{title}: true classes in rows, predicted classes in columns; the most frequent ones are listed below"
            )
            parts.append(element("figure", images.picture(found.matrices[head], text), class_="wide"))
        parts.append(_confusions(predictions) if large else None)
        parts += _per_class(predictions, "" if len(found.heads) == 1 else f" of {head}")
    return join(parts)


def _matrix(predictions: Predictions, title: str) -> Html:
    """Returns the confusion matrix as a table, whose cells are the darker the larger their share of the row is."""
    counts, names = predictions.confusion(), predictions.class_names
    shares = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    rows = []
    for index, name in enumerate(names):
        cells = [element("th", name, scope="row")]
        for column, (count, share) in enumerate(zip(counts[index].tolist(), shares[index].tolist(), strict=True)):
            kind = "right" if index == column else "wrong"
            depth = {"class_": kind, "style": f"--share:{100 * share:.0f}%"}
            cells.append(element("td", f"{count:,}", **depth) if count else element("td", "0", class_="zero"))
        rows.append(element("tr", *cells))
    head = element(
        "tr", element("th", "true ↓ predicted →", scope="col"), *(element("th", n, scope="col") for n in names)
    )
    content = element("table", element("thead", head), element("tbody", *rows), class_="matrix")
    note = "Number of images by true class (row) and predicted class (column); the shade is the share of the row."
    return join([element("p", note, class_="note"), scrolling(title, content)])


def _confusions(predictions: Predictions) -> Html | None:
    """Returns the most frequent pairs of a true class and another that is predicted."""
    counts, names = predictions.confusion(), predictions.class_names
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:MAX_PAIRS]
    pairs = [divmod(int(index), len(names)) for index in order]
    rows = [
        [names[true], names[guess], f"{counts[true, guess]:,}", f"{predictions.images[true]:,}"]
        for true, guess in pairs
        if counts[true, guess]
    ]
    if not rows:
        return None
    header = ["true class", "predicted as", "images", "of"]
    return table("Most frequent confusions", header, rows, text=[1], title="Most frequent confusions")


def _per_class(predictions: Predictions, of_head: str) -> list[Html]:
    """Returns a table with the accuracy of each class; of many classes, the lowest ones."""
    rows = [row for row in predictions.rows() if row.images]
    note = None
    if len(rows) > MAX_ROWS:
        note = element("p", f"The {MAX_ROWS} of {len(rows):,} classes with the lowest accuracy.", class_="note")
        rows = sorted(rows, key=_recall)[:MAX_ROWS]
    cells = [
        [
            row.name,
            join([f"{100 * row.recall:.2f}", _bar(row.recall)]),
            f"{row.correct:,} of {row.images:,}",
            "–" if row.precision is None else f"{100 * row.precision:.2f}",
            f"{100 * row.f1:.2f}",
            f"{row.confused_with} ({row.confused:,})" if row.confused else "",
        ]
        for row in rows
    ]
    title = f"Accuracy per class{of_head}"
    header = ["class", "accuracy, %", "correct", "precision, %", "F1, %", "most confused with"]
    content = table(title, header, cells, text=[5])
    shown = content if len(rows) <= MAX_CELLS else details(f"{len(rows):,} classes", content)
    return [one for one in (element("h3", title), note, shown) if one is not None]


def _recall(row: ClassRow) -> float:
    return row.recall


def _bar(share: float) -> Html:
    return element("span", class_="share", style=f"--share:{100 * share:.2f}%", aria_hidden="true")


def calibration(found: Evaluated) -> Html:
    """Returns the reliability diagram of each head, and its calibration error."""
    parts = []
    for number, (head, predictions) in enumerate(found.heads.items()):
        rows, error = predictions.reliability(), predictions.calibration_error()
        parts.append(element("h3", head) if len(found.heads) > 1 else None)
        text = (
            f"Expected calibration error {percent(error)}: the mean difference between the probability of the "
            f"predicted class and the accuracy, over {CALIBRATION_BINS} bins. Bars below the diagonal: the model is "
            "overconfident. The dots are at the mean probability of each bin."
        )
        parts.append(element("p", text, class_="note"))
        cells = [
            [f"{100 * row.low:.1f} to {100 * row.high:.1f}", f"{row.examples:,}", percent(row.probability)]
            + [percent(row.accuracy)]
            for row in rows
        ]
        header = ["probability, %", "images", "mean probability", "accuracy"]
        diagram = element("figure", charts.reliability(f"calibration-{number}", rows), class_="chart")
        numbers_shown = values(f"calibration of {head}", table(f"Calibration of {head}", header, cells))
        parts.append(element("div", diagram, numbers_shown, class_="card square"))
    return join(parts)


def percent(share: float | None) -> str:
    """Returns a share as '97.50 %'; a dash for None and for values that are not finite."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.2f} %"


def mistakes(found: Evaluated) -> Html:
    """Returns the images of the most confident mistakes."""
    parts = []
    for head, shown in found.mistakes.items():
        wrong = int((found.heads[head].labels != found.heads[head].predicted).sum())
        of_head = f" of {head}" if len(found.heads) > 1 else ""
        text = f"{len(shown):,} of the {wrong:,} mistakes{of_head}, those with the highest probability first."
        parts.append(element("p", text if shown else f"There are no mistakes{of_head}.", class_="note"))
        parts.append(images.tiles(shown) if shown else None)
    return join(parts)


def samples(found: Evaluated) -> Html:
    """Returns images as the model receives them in training."""
    text = (
        f"{len(found.samples)} images of the first step as the model receives them: augmented and mixed with the "
        "random keys of that step, with their target probabilities."
    )
    return join([element("p", text, class_="note"), images.tiles(found.samples)])


def pictures(found: Evaluated) -> Html:
    """Returns the pictures of what the model has learned."""
    figures = []
    for title, (content, text) in found.pictures.items():
        caption = element("figcaption", element("h3", title), text)
        figures.append(element("figure", images.picture(content, f"{title}: {text}", MAX_ASPECT), caption))
    return element("div", *figures, class_="pictures")
