"""Few-shot accuracy of frozen features: least squares on a few examples per class (arXiv 2010.11929, section 4.1)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int, Integer, Num

from vit_jax import arguments
from vit_jax.errors import UserError
from vit_jax.evaluation import linear_classifier
from vit_jax.evaluation.linear_classifier import LinearClassifier

# The default L2 constant is proportional to the width, as is the squared norm of standardized features. At width 768
# it is 1024, the constant that big_vision uses for every width.
L2_PER_FEATURE = 4 / 3


def draw(
    labels: Integer[Array | np.ndarray, " examples"] | Sequence[int],
    classes: int | np.integer,
    shots: int | np.integer,
    seed: int | np.integer,
    draw_index: int | np.integer,
) -> Int[np.ndarray, " drawn"]:
    """Returns the indices of `shots` random examples of each class, without replacement, ordered by class.

    They depend on the labels, `seed` and `draw_index` alone. A draw of more shots contains the same draw of fewer.
    NumPy guarantees the output of its Philox generator, so that the draws never change.

    Args:
        labels: of all examples.
        classes: number of classes.
        shots: examples per class.
        seed: shared by all draws.
        draw_index: which draw.

    Raises:
        UserError: a class has fewer than `shots` examples, or an argument has the wrong type.
    """
    classes, shots = arguments.integer("classes", classes), arguments.integer("shots", shots)
    seed, draw_index = (
        arguments.integer(name, value, minimum=0) for name, value in (("seed", seed), ("draw_index", draw_index))
    )
    labels = arguments.labels("labels", labels, classes=classes)
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < shots:
        rarest = int(counts.argmin())
        raise UserError(
            f"{shots} shots per class were requested, but class {rarest} has {counts[rarest]} training examples\n"
            f"  allowed: at most {counts.min()} shots, or more training data"
        )
    random = np.random.Philox(key=[seed, draw_index]).random_raw(len(labels))
    shuffled = np.argsort(random, kind="stable")
    return np.concatenate([shuffled[labels[shuffled] == label][:shots] for label in range(classes)])


def fit(
    features: Num[Array | np.ndarray, "examples width"] | Sequence[Sequence[float]],
    labels: Integer[Array | np.ndarray, " examples"] | Sequence[int],
    classes: int | np.integer,
    l2: float | np.floating | None = None,
) -> LinearClassifier:
    """Returns the regularized least-squares fit of standardized features to targets in {-1, 1}^classes.

    It minimizes |X W + b - Y|^2 + l2 |W|^2 in closed form, in float64; the bias is not regularized. Since X is centred,
    b is the mean of Y. The linear system has as many unknowns as there are features or examples, whichever is fewer.

    Args:
        features: of the training examples.
        labels: of the training examples.
        classes: number of classes.
        l2: above 0; None for `L2_PER_FEATURE` times the width.

    Raises:
        UserError: an argument has the wrong type or shape, or a label is no class.
    """
    features, classes = arguments.matrix("features", features), arguments.integer("classes", classes)
    labels = arguments.labels("labels", labels, len(features), classes)
    l2 = L2_PER_FEATURE * features.shape[1] if l2 is None else arguments.number("l2", l2)
    mean, std = linear_classifier.standardization(features)
    inputs = (np.asarray(features, np.float64) - mean) / std
    targets = 2.0 * (labels[:, None] == np.arange(classes)) - 1.0
    # `mean` is rounded to float32: the rest of the mean is removed here, so that it does not affect the kernel.
    offset, bias = inputs.mean(axis=0), targets.mean(axis=0)
    inputs, targets = inputs - offset, targets - bias
    examples, width = inputs.shape
    if examples <= width:
        kernel = inputs.T @ np.linalg.solve(inputs @ inputs.T + l2 * np.eye(examples), targets)
    else:
        kernel = np.linalg.solve(inputs.T @ inputs + l2 * np.eye(width), inputs.T @ targets)
    return LinearClassifier(mean, std, kernel.astype(np.float32), (bias - offset @ kernel).astype(np.float32))
