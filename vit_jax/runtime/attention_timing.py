"""Checks on a device that an attention backend computes what plain attention does, then measures its time."""

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
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.positions import Terms

MAX_TOKENS = 65_536  # in a timed batch; larger batches take proportionally longer
CHECKED = 2  # examples whose results are compared
# Relative error against float32, by bytes per element: float32 matmuls on a GPU use TF32.
TOLERANCE = {2: 0.03, 4: 0.01}
COMPARED = (
    "the output",
    "the gradient of the tokens",
    "the gradient of the parameters",
    "the gradient of the bias",
)
ROUNDS, SECONDS = 5, 0.03  # number of timing rounds, and their total duration, per backend and shape


class IncorrectBackend(Exception):
    """A backend computes something other than plain attention."""


class Probe:
    """Attention of one shape on a device: random arguments, and the results of plain attention in float32."""

    def __init__(self, shape: Shape, device: Any, training: bool):
        """Draws the arguments and computes the reference results.

        Args:
            shape: shape of the calls; its batch is reduced to at most `MAX_TOKENS` tokens.
            device: a `jax.Device`.
            training: whether the backward pass is checked and timed too.
        """
        self.shape = dataclasses.replace(shape, batch=max(1, min(shape.batch, MAX_TOKENS // shape.tokens)))
        self.device, self.training = device, training
        with jax.default_device(device):
            parameters, tokens, self.gradient, *more = self._draw()
            self.arguments = (parameters, tokens, *more)
            few = [jax.tree.map(lambda array: array[:CHECKED], part) for part in (tokens, self.gradient, more[1])]
            few[:2] = [array.astype(jnp.float32) for array in few[:2]]
            with jax.default_matmul_precision("highest"):
                run = self._compiled(FALLBACK, "float32")
                self.reference = jax.device_get(run(few[1], parameters, few[0], more[0], few[2]))

    def seconds(self, backend: str) -> float:
        """Returns the seconds that one attention layer takes with a backend, projections included.

        Raises:
            IncorrectBackend: outputs or gradients differ from plain attention in float32.
            Exception: anything that the backend, the compiler or the driver raises.
        """
        with jax.default_device(self.device):
            run = self._compiled(backend, self.shape.dtype)
            # Gradients of the compared examples only, so that parameter gradients are those of the reference.
            examples = jnp.arange(len(self.gradient))[:, None, None]
            output, of_tokens, *rest = run(jnp.where(examples < CHECKED, self.gradient, 0), *self.arguments)
            if not bool(jnp.isfinite(output).all()):
                raise IncorrectBackend("the output is not finite")
            self._compare((output[:CHECKED], None if of_tokens is None else of_tokens[:CHECKED], *rest))
            return median_seconds(lambda: run(self.gradient, *self.arguments))

    def _layer(self, backend: str, dtype: str) -> Attention:
        shape = self.shape
        options = {"dtype": jnp.dtype(dtype), "qk_norm": shape.transformed, "attention_kernel": backend}
        return Attention(BlockConfig(heads=shape.heads, mlp_width=1, **options))

    def _draw(self) -> tuple[Any, ...]:
        """Returns parameters, tokens, the gradient of the output, and bias and lengths (None if the shape has none)."""
        shape, draw = self.shape, np.random.default_rng(0)
        size = (max(shape.batch, CHECKED), shape.tokens, shape.heads * shape.size)
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
                raise IncorrectBackend(f"{name} has a relative error of {error:.2g}")


def _passes(
    layer: Attention, training: bool, gradient: Any, parameters: Any, tokens: Any, bias: Any, lengths: Any
) -> tuple[Any, ...]:
    """Returns the arrays named in `COMPARED`; without `training`, None for all but the output."""

    def apply(parameters: Any, tokens: jax.Array, bias: jax.Array | None) -> jax.Array:
        return layer.apply({"params": parameters}, tokens, lengths, positions=Terms(bias=bias))

    if not training:
        return apply(parameters, tokens, bias), None, None, None
    output, pull = jax.vjp(apply, parameters, tokens, bias)
    of_parameters, of_tokens, of_bias = pull(gradient.astype(output.dtype))
    return output, of_tokens, of_parameters, of_bias


def _joined(tree: Any) -> np.ndarray:
    """Returns all leaves as one vector: alone, the keys' bias has a gradient that is zero but for rounding."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def median_seconds(run: Callable[[], Any]) -> float:
    """Returns the seconds per call: the median over rounds of back-to-back asynchronous calls."""

    def round_of(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            results = run()
        jax.block_until_ready(results)
        return (time.perf_counter() - began) / count

    count = max(1, int(SECONDS / ROUNDS / max(round_of(2), 1e-6)))
    return statistics.median(round_of(count) for _ in range(ROUNDS))
