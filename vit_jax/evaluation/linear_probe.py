"""The linear probe: multinomial logistic regression on frozen features, its L2 constant chosen on held-out examples."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Integer

from vit_jax.evaluation import linear_classifier
from vit_jax.evaluation.linear_classifier import LinearClassifier

L2 = tuple(10.0**power for power in range(-6, 2))  # the grid
HELD_OUT = 0.1  # share of the training examples that it is chosen on
_BLOCK = 8192  # examples whose logits are in memory at a time
_TOLERANCE = 1e-6  # largest component of the gradient at which a fit is done
_PATIENCE = 5  # steps in a row without a decrease that float32 can see, after which it is done too
_ITERATIONS = 1000  # at most

Weights = tuple[Float[Array, "width classes"], Float[Array, " classes"]]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted classifier.

    Attributes:
        classifier: it.
        loss: what was minimised, at its end.
        iterations: of L-BFGS.
        gradient: largest component of the loss's gradient at its end.
    """

    classifier: LinearClassifier
    loss: float
    iterations: int
    gradient: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """An L2 constant, chosen.

    Attributes:
        l2: it.
        accuracies: on the held-out examples, of each of the grid.
    """

    l2: float
    accuracies: dict[float, float]


class Probe:
    """Logistic regressions on one set of features: standardised, on the device once, for many fits."""

    def __init__(
        self, features: Float[np.ndarray, "examples width"], labels: Integer[np.ndarray, " examples"], classes: int
    ):
        """Standardises the features by their own mean and deviation, and puts them on the device."""
        self.mean, self.std = linear_classifier.standardisation(features)
        self._features, self._labels, self._classes = features, labels, classes
        block = min(_BLOCK, len(labels))
        standardised = (np.asarray(features, np.float32) - self.mean) / self.std
        self._inputs = jnp.asarray(_blocks(standardised, block))
        self._targets = jnp.asarray(_blocks(labels.astype(np.int32), block))
        self._block = block

    def fit(self, l2: float, start: LinearClassifier | None = None, counted: np.ndarray | None = None) -> Fit:
        """Minimises mean cross-entropy + l2 / 2 * |kernel|^2 by L-BFGS; the bias is free.

        In the terms of scikit-learn, C = 1 / (l2 * examples) on standardised features.

        Args:
            l2: at least 0.
            start: where to start from, such as the solution for a neighbouring constant; None for zero.
            counted: [examples], True for those that are learned from; None for all.
        """
        width = self._inputs.shape[2]
        weights = np.ones(len(self._labels), np.float32) if counted is None else counted.astype(np.float32)
        shares = jnp.asarray(_blocks(weights / weights.sum(), self._block))
        first = (np.zeros((width, self._classes), np.float32), np.zeros(self._classes, np.float32))
        if start is not None:
            first = (start.kernel, start.bias)
        found = _minimise(first, self._inputs, self._targets, shares, np.float32(l2))
        (kernel, bias), loss, gradient, iterations = found
        classifier = LinearClassifier(self.mean, self.std, np.asarray(kernel), np.asarray(bias))
        return Fit(classifier, float(loss), int(iterations), float(gradient))

    def choose(self, grid: Sequence[float], seed: int, held_out: float = HELD_OUT) -> Choice:
        """The constant whose fit to a part of the examples is most accurate on the rest; of equals the largest.

        Args:
            grid: constants.
            seed: of the examples that are held out.
            held_out: share of each class that is, rounded down.
        """
        out = hold_out(self._labels, held_out, seed)
        accuracies: dict[float, float] = {}
        start = None
        # From the strongest on: each solution is close to the next one.
        for l2 in sorted(grid, reverse=True):
            start = self.fit(l2, start, counted=~out).classifier
            accuracies[l2] = float((start.predict(self._features[out]) == self._labels[out]).mean())
        return Choice(max(accuracies, key=lambda l2: (accuracies[l2], l2)), accuracies)


def hold_out(labels: Integer[np.ndarray, " examples"], share: float, seed: int) -> np.ndarray:
    """True for a share of the examples of each class, rounded down; which ones follows from the seed."""
    numbers = np.random.Philox(key=[seed, 0]).random_raw(len(labels))
    out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        out[places[np.argsort(numbers[places], kind="stable")[: int(share * len(places))]]] = True
    return out


def _blocks(array: np.ndarray, block: int) -> np.ndarray:
    """[blocks, block, ...], zeros behind the last example."""
    padded = np.pad(array, ((0, -len(array) % block), *[(0, 0)] * (array.ndim - 1)))
    return padded.reshape(-1, block, *array.shape[1:])


@jax.jit
def _minimise(
    start: Weights,
    inputs: Float[Array, "blocks block width"],
    labels: Int[Array, "blocks block"],
    shares: Float[Array, "blocks block"],
    l2: Float[Array, ""],
) -> tuple[Weights, Float[Array, ""], Float[Array, ""], Int[Array, ""]]:
    """Weights, loss, the gradient's largest component, and iterations; `shares` are what each example weighs."""

    # Logits are computed again for the gradient: no more of them than a block's are ever kept.
    @jax.checkpoint
    def block_loss(weights: Weights, inputs: jax.Array, labels: jax.Array, shares: jax.Array) -> jax.Array:
        logits = jnp.matmul(inputs, weights[0], precision=jax.lax.Precision.HIGHEST) + weights[1]
        return (optax.softmax_cross_entropy_with_integer_labels(logits, labels) * shares).sum()

    def loss(weights: Weights) -> jax.Array:
        add = lambda total, part: (total + block_loss(weights, *part), None)  # noqa: E731
        total, _ = jax.lax.scan(add, jnp.float32(0), (inputs, labels, shares))
        return total + l2 / 2 * jnp.square(weights[0]).sum()

    solver, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def largest(gradient: Weights) -> jax.Array:
        return jnp.maximum(jnp.abs(gradient[0]).max(), jnp.abs(gradient[1]).max())

    def go_on(carry: tuple) -> jax.Array:
        _, _, _, size, iteration, stuck = carry
        return (size > _TOLERANCE) & (iteration < _ITERATIONS) & (stuck < _PATIENCE)

    def step(carry: tuple) -> tuple:
        weights, state, value, _, iteration, stuck = carry
        _, gradient = value_and_grad(weights, state=state)
        updates, state = solver.update(gradient, state, weights, value=value, grad=gradient, value_fn=loss)
        weights = optax.apply_updates(weights, updates)
        after, gradient = value_and_grad(weights, state=state)
        stuck = jnp.where(after < value, 0, stuck + 1)
        return weights, state, after, largest(gradient), iteration + 1, stuck

    weights = jax.tree.map(jnp.asarray, start)
    value, gradient = jax.value_and_grad(loss)(weights)
    carry = (weights, solver.init(weights), value, largest(gradient), jnp.int32(0), jnp.int32(0))
    weights, _, value, size, iterations, _ = jax.lax.while_loop(go_on, step, carry)
    return weights, value, size, iterations
