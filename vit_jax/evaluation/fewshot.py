"""Few-shot accuracy of frozen features: least squares from a few examples a class (arXiv 2010.11929, section 4.1)."""

import numpy as np
from jaxtyping import Float, Int, Integer

from vit_jax.errors import UserError
from vit_jax.evaluation import linear_classifier
from vit_jax.evaluation.linear_classifier import LinearClassifier

# Of the L2 constant, a feature: what standardised features add up to grows with their width. At a width of 768 it is
# 1024, which big_vision takes for every width.
L2_A_FEATURE = 4 / 3


def draw(
    labels: Integer[np.ndarray, " examples"], classes: int, shots: int, seed: int, number: int
) -> Int[np.ndarray, " drawn"]:
    """Places of so many examples of each class, drawn without replacement: class by class, fixed by seed and number.

    More shots of the same draw add examples to those of fewer. Philox's stream is one that NumPy promises not to
    change, so that the draws are the same for ever.

    Args:
        labels: of all examples.
        classes: how many there are.
        shots: examples a class.
        seed: of all draws.
        number: which draw.

    Raises:
        UserError: a class has fewer examples.
    """
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < shots:
        few = int(counts.argmin())
        raise UserError(
            f"{shots} shots of each class are asked for, and class {few} has {counts[few]} training examples\n"
            f"  allowed: at most {counts.min()} shots, or more data to train on"
        )
    numbers = np.random.Philox(key=[seed, number]).random_raw(len(labels))
    shuffled = np.argsort(numbers, kind="stable")
    return np.concatenate([shuffled[labels[shuffled] == label][:shots] for label in range(classes)])


def fit(
    features: Float[np.ndarray, "examples width"],
    labels: Integer[np.ndarray, " examples"],
    classes: int,
    l2: float | None = None,
) -> LinearClassifier:
    """Regularised least squares from standardised features to targets in {-1, 1}^classes, in closed form.

    Minimised is |X W + b - Y|^2 + l2 |W|^2; the bias is free. X being centred, b is the mean of Y, and W is solved for
    in as many unknowns as there are features or examples, whichever are fewer; in float64.

    Args:
        features: of the examples to learn from.
        labels: theirs.
        classes: how many there are.
        l2: above 0; None for `L2_A_FEATURE` times the width.
    """
    l2 = L2_A_FEATURE * features.shape[1] if l2 is None else l2
    mean, std = linear_classifier.standardisation(features)
    inputs = (np.asarray(features, np.float64) - mean) / std
    targets = 2.0 * (labels[:, None] == np.arange(classes)) - 1.0
    # The float32 mean may be off by a rounding: what is left of it must not leak into the kernel.
    left, bias = inputs.mean(axis=0), targets.mean(axis=0)
    inputs, targets = inputs - left, targets - bias
    examples, width = inputs.shape
    if examples <= width:
        kernel = inputs.T @ np.linalg.solve(inputs @ inputs.T + l2 * np.eye(examples), targets)
    else:
        kernel = np.linalg.solve(inputs.T @ inputs + l2 * np.eye(width), inputs.T @ targets)
    return LinearClassifier(mean, std, kernel.astype(np.float32), (bias - left @ kernel).astype(np.float32))
