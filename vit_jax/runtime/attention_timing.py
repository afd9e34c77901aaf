"""Measures attention backends on a device: first whether their numbers are right, then how long they take."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.attention import Attention
from vit_jax.models.attention_backends import FALLBACK, Shape
from vit_jax.models.positions import Terms

MAX_TOKENS = 65_536  # of a batch that is timed: more take proportionally longer
FEW = 2  # examples whose numbers are compared
TOLERANCE = {2: 0.03, 4: 0.01}  # relative error compared with float32, by bytes per number (GPUs multiply in TF32)
COMPARED = (
    "the output",
    "the gradient of the tokens",
    "the gradient of the parameters",
    "the gradient of the bias",
)
ROUNDS, SECONDS = 5, 0.03  # of timing, per backend and shape


class Wrong(Exception):
    """A backend's numbers are not those of plain attention."""


class Probe:
    """One shape of attention on a device: random arguments, and what plain attention in float32 computes of them."""

    def __init__(self, shape: Shape, device: Any, training: bool):
        """Draws the arguments and computes the reference.

        Args:
            shape: batches of more than `MAX_TOKENS` tokens are cut.
            device: a `jax.Device`.
            training: whether the backward pass is compared and timed as well.
        """
        self.shape = dataclasses.replace(shape, batch=max(1, min(shape.batch, MAX_TOKENS // shape.tokens)))
        self.device, self.training = device, training
        with jax.default_device(device):
            parameters, tokens, self.gradient, *more = self._draw()
            self.arguments = (parameters, tokens, *more)
            few = [jax.tree.map(lambda array: array[:FEW], part) for part in (tokens, self.gradient, more[1])]
            few[:2] = [array.astype(jnp.float32) for array in few[:2]]
            with jax.default_matmul_precision("highest"):
                run = self._compiled(FALLBACK, "float32")
                self.reference = jax.device_get(run(few[1], parameters, few[0], more[0], few[2]))

    def seconds(self, backend: str) -> float:
        """Seconds of one attention layer by a backend, its projections included.

        Raises:
            Wrong: outputs or gradients differ from plain attention in float32.
            Exception: whatever the backend, the compiler or the driver raise.
        """
        with jax.default_device(self.device):
            run = self._compiled(backend, self.shape.dtype)
            # The gradient of a few examples alone, so that all that comes of it is that of the reference.
            examples = jnp.arange(len(self.gradient))[:, None, None]
            output, of_tokens, *rest = run(jnp.where(examples < FEW, self.gradient, 0), *self.arguments)
            if not bool(jnp.isfinite(output).all()):
                raise Wrong("the output is not finite")
            self._compare((output[:FEW], None if of_tokens is None else of_tokens[:FEW], *rest))
            return median_seconds(lambda: run(self.gradient, *self.arguments))

    def _layer(self, backend: str, dtype: str) -> Attention:
        shape = self.shape
        return Attention(shape.heads, dtype=jnp.dtype(dtype), qk_norm=shape.transformed, kernel=backend)

    def _draw(self) -> tuple[Any, ...]:
        """Parameters, tokens, the gradient of the output, and bias and lengths (None for none)."""
        shape, draw = self.shape, np.random.default_rng(0)
        size = (max(shape.batch, FEW), shape.tokens, shape.heads * shape.size)
        tokens, gradient = (draw.standard_normal(size, np.float32) for _ in range(2))
        bias = draw.standard_normal((1, shape.heads, shape.tokens, shape.tokens), np.float32) if shape.bias else None
        lengths = draw.integers(1, shape.tokens + 1, size[0], np.int32) if shape.lengths else None
        layer = self._layer(FALLBACK, "float32")
        parameters = jax.jit(layer.init)(jax.random.key(0), jnp.asarray(tokens[:1]))["params"]
        tokens, gradient = (jnp.asarray(array).astype(shape.dtype) for array in (tokens, gradient))
        return jax.device_put((parameters, tokens, gradient, bias, lengths))

    def _compiled(self, backend: str, dtype: str) -> Callable[..., tuple[Any, ...]]:
        return jax.jit(functools.partial(_passes, self._layer(backend, dtype), self.training))

    def _compare(self, results: tuple[Any, ...]) -> None:
        for name, one, other in zip(COMPARED, results, self.reference, strict=True):
            one, other = (_joined(tree) for tree in (one, other))
            norm = np.linalg.norm(other)
            error = np.linalg.norm(one - other) / norm if norm else np.linalg.norm(one)
            if not error <= TOLERANCE[jnp.dtype(self.shape.dtype).itemsize]:
                raise Wrong(f"{name} is off by {error:.2g} (relative norm)")


def _passes(
    layer: Attention, training: bool, gradient: Any, parameters: Any, tokens: Any, bias: Any, lengths: Any
) -> tuple[Any, ...]:
    """What is `COMPARED`; without `training`, None for all but the output."""

    def apply(parameters: Any, tokens: jax.Array, bias: jax.Array | None) -> jax.Array:
        return layer.apply({"params": parameters}, tokens, lengths, positions=Terms(bias=bias))

    if not training:
        return apply(parameters, tokens, bias), None, None, None
    output, pull = jax.vjp(apply, parameters, tokens, bias)
    of_parameters, of_tokens, of_bias = pull(gradient.astype(output.dtype))
    return output, of_tokens, of_parameters, of_bias


def _joined(tree: Any) -> np.ndarray:
    """All leaves as one vector: some parameters, as the keys' bias, have a gradient of zero but for rounding."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def median_seconds(run: Callable[[], Any]) -> float:
    """Seconds of a call, the median of several rounds; calls of a round follow each other without waiting."""

    def round_of(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            results = run()
        jax.block_until_ready(results)
        return (time.perf_counter() - began) / count

    count = max(1, int(SECONDS / ROUNDS / max(round_of(2), 1e-6)))
    return statistics.median(round_of(count) for _ in range(ROUNDS))
