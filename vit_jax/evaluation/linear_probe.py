"""Linear probe: multinomial logistic regression on frozen features; L2 is chosen on held-out training examples."""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from vit_jax import arguments
from vit_jax.errors import UserError
from vit_jax.evaluation import linear_classifier
from vit_jax.evaluation.linear_classifier import LinearClassifier
from vit_jax.progress import Counter

L2 = tuple(10.0**power for power in range(-6, 2))  # the default grid
HELD_OUT = 0.1  # fraction of the training examples on which L2 is chosen
_BLOCK = 8192  # examples whose logits are in memory at a time
_TOLERANCE = 1e-6  # a fit has converged when no component of the gradient is larger
_PATIENCE = 5  # a fit also ends after this many steps in a row that do not lower the loss in float32
_MAX_ITERATIONS = 1000

Weights = tuple[Float[Array, "width classes"], Float[Array, " classes"]]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted classifier.

    Attributes:
        classifier: the result.
        loss: the final value of the minimized loss.
        iterations: of L-BFGS.
        gradient: largest absolute component of the final gradient.
    """

    classifier: LinearClassifier
    loss: float
    iterations: int
    gradient: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """The L2 constant that was chosen from a grid.

    Attributes:
        l2: the constant.
        accuracies: accuracy on the held-out examples for each constant of the grid.
    """

    l2: float
    accuracies: dict[float, float]


class Probe:
    """Logistic regressions on one set of features, which is standardized and sent to the device once."""

    def __init__(
        self,
        features: Num[Array | np.ndarray, "examples width"] | Sequence[Sequence[float]],
        labels: Integer[Array | np.ndarray, " examples"] | Sequence[int],
        classes: int | np.integer,
    ):
        """Standardizes the features by their own mean and standard deviation, and sends them to the device.

        Raises:
            UserError: an argument has the wrong type or shape, or a label is no class.
        """
        features, classes = arguments.matrix("features", features), arguments.integer("classes", classes)
        labels = arguments.labels("labels", labels, len(features), classes)
        self.mean, self.std = linear_classifier.standardization(features)
        self._features, self._labels, self._classes = features, labels, classes
        self._block = min(_BLOCK, len(labels))
        standardized = (np.asarray(features, np.float32) - self.mean) / self.std
        self._inputs = jnp.asarray(_to_blocks(standardized, self._block))
        self._targets = jnp.asarray(_to_blocks(labels.astype(np.int32), self._block))

    def fit(
        self,
        l2: float | np.floating,
        start: LinearClassifier | None = None,
        included: Bool[Array | np.ndarray, " examples"] | Sequence[bool] | None = None,
    ) -> Fit:
        """Minimizes mean cross-entropy + l2 / 2 * |kernel|^2 by L-BFGS; the bias is not regularized.

        This is scikit-learn's LogisticRegression with C = 1 / (l2 * examples), on standardized features.

        Args:
            l2: at least 0.
            start: initial value, such as the solution for a similar constant; None for zeros.
            included: True for the examples to train on; None for all.

        Raises:
            UserError: an argument has the wrong type or shape.
        """
        l2 = arguments.number("l2", l2)
        if included is not None:
            included = arguments.mask("included", included, len(self._labels))
        width = self._inputs.shape[2]
        weights = np.ones(len(self._labels), np.float32) if included is None else included.astype(np.float32)
        weights = jnp.asarray(_to_blocks(weights / weights.sum(), self._block))
        initial = (np.zeros((width, self._classes), np.float32), np.zeros(self._classes, np.float32))
        if start is not None:
            initial = (start.kernel, start.bias)
        result = _minimize(initial, self._inputs, self._targets, weights, np.float32(l2))
        (kernel, bias), loss, gradient, iterations = result
        classifier = LinearClassifier(self.mean, self.std, np.asarray(kernel), np.asarray(bias))
        return Fit(classifier, float(loss), int(iterations), float(gradient))

    def choose(self, grid: Iterable[float | np.floating], seed: int | np.integer, held_out: float = HELD_OUT) -> Choice:
        """Returns the constant with the highest accuracy on held-out examples; among equals, the largest.

        Args:
            grid: constants.
            seed: of the choice of the held-out examples.
            held_out: fraction of each class that is held out, rounded down.

        Raises:
            UserError: an argument has the wrong type, or nothing is held out.
        """
        grid = [arguments.number("grid", l2) for l2 in grid]
        is_held_out = hold_out(self._labels, held_out, seed)
        if not grid or not is_held_out.any():
            raise UserError(f"grid has {len(grid)} constants, held_out is {held_out}\n  allowed: at least one of each")
        accuracies: dict[float, float] = {}
        start = None
        # From strong to weak regularization: each solution is a good initial value for the next fit.
        with Counter("linear probe:", len(grid), "values of L2") as counter:
            for l2 in counter.over(sorted(grid, reverse=True)):
                start = self.fit(l2, start, included=~is_held_out).classifier
                correct = start.predict(self._features[is_held_out]) == self._labels[is_held_out]
                accuracies[l2] = float(correct.mean())
        return Choice(max(accuracies, key=lambda l2: (accuracies[l2], l2)), accuracies)


def hold_out(
    labels: Integer[Array | np.ndarray, " examples"] | Sequence[int], fraction: float, seed: int | np.integer
) -> Bool[np.ndarray, " examples"]:
    """Returns True for a fraction of the examples of each class, rounded down; they are determined by the seed."""
    labels, seed = arguments.labels("labels", labels), arguments.integer("seed", seed, minimum=0)
    fraction = arguments.number("fraction", fraction)
    random = np.random.Philox(key=[seed, 0]).random_raw(len(labels))
    is_held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        shuffled = indices[np.argsort(random[indices], kind="stable")]
        is_held_out[shuffled[: int(fraction * len(indices))]] = True
    return is_held_out


def _to_blocks(array: np.ndarray, block: int) -> np.ndarray:
    """Returns [blocks, block, ...], padded with zeros after the last example."""
    padded = np.pad(array, ((0, -len(array) % block), *[(0, 0)] * (array.ndim - 1)))
    return padded.reshape(-1, block, *array.shape[1:])


def _largest(gradient: Weights) -> Float[Array, ""]:
    return jnp.maximum(jnp.abs(gradient[0]).max(), jnp.abs(gradient[1]).max())


@jax.jit
def _minimize(
    start: Weights,
    inputs: Float[Array, "blocks block width"],
    labels: Int[Array, "blocks block"],
    example_weights: Float[Array, "blocks block"],
    l2: Float[Array, ""],
) -> tuple[Weights, Float[Array, ""], Float[Array, ""], Int[Array, ""]]:
    """Returns the weights, the loss, the gradient's largest absolute component, and the number of iterations."""

    # Rematerialized in the backward pass, so that the logits of only one block are in memory at a time.
    @jax.checkpoint
    def block_loss(weights: Weights, inputs: jax.Array, labels: jax.Array, example_weights: jax.Array) -> jax.Array:
        logits = jnp.matmul(inputs, weights[0], precision=jax.lax.Precision.HIGHEST) + weights[1]
        return (optax.softmax_cross_entropy_with_integer_labels(logits, labels) * example_weights).sum()

    def loss(weights: Weights) -> jax.Array:
        def add_block(total: jax.Array, block: tuple) -> tuple[jax.Array, None]:
            return total + block_loss(weights, *block), None

        total, _ = jax.lax.scan(add_block, jnp.float32(0), (inputs, labels, example_weights))
        return total + l2 / 2 * jnp.square(weights[0]).sum()

    solver, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def is_unfinished(carry: tuple) -> jax.Array:
        _, _, _, gradient_size, iteration, stuck = carry
        return (gradient_size > _TOLERANCE) & (iteration < _MAX_ITERATIONS) & (stuck < _PATIENCE)

    def step(carry: tuple) -> tuple:
        weights, state, value, _, iteration, stuck = carry
        _, gradient = value_and_grad(weights, state=state)
        updates, state = solver.update(gradient, state, weights, value=value, grad=gradient, value_fn=loss)
        weights = optax.apply_updates(weights, updates)
        new_value, gradient = value_and_grad(weights, state=state)
        stuck = jnp.where(new_value < value, 0, stuck + 1)
        return weights, state, new_value, _largest(gradient), iteration + 1, stuck

    weights = jax.tree.map(jnp.asarray, start)
    value, gradient = jax.value_and_grad(loss)(weights)
    carry = (weights, solver.init(weights), value, _largest(gradient), jnp.int32(0), jnp.int32(0))
    weights, _, value, gradient_size, iterations, _ = jax.lax.while_loop(is_unfinished, step, carry)
    return weights, value, gradient_size, iterations
