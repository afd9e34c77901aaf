"""k nearest neighbours among frozen features, by cosine, as DINO judges them (arXiv 2104.14294, section 4.1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

TEMPERATURE = 0.07  # DINO's
# What is in memory at a time: similarities of so many queries with so many examples of the bank.
_QUERIES = 512
_BANK = 16384


def nearest(
    bank: Float[np.ndarray, "examples width"],
    queries: Float[np.ndarray, "queries width"],
    count: int,
    block: int = _BANK,
) -> tuple[Float[np.ndarray, "queries count"], Int[np.ndarray, "queries count"]]:
    """The most similar examples of the bank for each query: cosines, largest first, and places in the bank.

    Every pair is compared, in float32; of equal cosines the first example counts as the nearer. The bank is sent to the
    device a block at a time, once; the queries stay there.

    Args:
        bank: features to look among; may be memory-mapped.
        queries: features to look for.
        count: how many of the nearest, at most as many as the bank has.
        block: examples of the bank at a time; changes no result.
    """
    rows = min(_QUERIES, len(queries))
    padded = np.pad(np.asarray(queries, np.float32), ((0, -len(queries) % rows), (0, 0)))
    asked = _unit(jnp.asarray(padded)).reshape(-1, rows, queries.shape[1])
    best = (jnp.full((*asked.shape[:2], count), -jnp.inf), jnp.zeros((*asked.shape[:2], count), jnp.int32))
    block = min(block, len(bank))
    for start in range(0, len(bank), block):
        part = np.asarray(bank[start : start + block], np.float32)
        padded = np.pad(part, ((0, block - len(part)), (0, 0)))
        best = _look_among(best, asked, padded, np.int32(start), np.int32(len(part)))
    similarities, places = (np.asarray(one).reshape(-1, count)[: len(queries)] for one in best)
    return similarities, places


def _unit(features: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
    norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)


@functools.partial(jax.jit, donate_argnums=0)
def _look_among(
    best: tuple[Float[Array, "blocks rows count"], Int[Array, "blocks rows count"]],
    queries: Float[Array, "blocks rows width"],
    bank: Float[Array | np.ndarray, "block width"],
    start: Int[Array | np.ndarray, ""],
    real: Int[Array | np.ndarray, ""],
) -> tuple[Float[Array, "blocks rows count"], Int[Array, "blocks rows count"]]:
    """The best so far and those of one block of the bank, of which the first `real` are examples, merged."""
    bank, present = _unit(jnp.asarray(bank)), jnp.arange(len(bank)) < real

    def one(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        similarities, places, asked = rows
        found = jnp.matmul(asked, bank.T, precision=jax.lax.Precision.HIGHEST)
        found, at = jax.lax.top_k(jnp.where(present, found, -jnp.inf), min(similarities.shape[1], len(bank)))
        # What came first stands first, so that it wins a tie here too.
        found = jnp.concatenate([similarities, found], axis=1)
        at = jnp.concatenate([places, start + at], axis=1)
        found, chosen = jax.lax.top_k(found, similarities.shape[1])
        return found, jnp.take_along_axis(at, chosen, axis=1)

    return jax.lax.map(one, (*best, queries))


def votes(
    similarities: Float[np.ndarray, "queries count"],
    labels: Integer[np.ndarray, "queries count"],
    classes: int,
    temperature: float | None = TEMPERATURE,
) -> Float[np.ndarray, "queries classes"]:
    """What the neighbours of each query give each class; a query is of the class that has most, of equals the first.

    Args:
        similarities: of the neighbours, largest first.
        labels: of the neighbours.
        classes: how many there are.
        temperature: each gives exp(similarity / temperature), here divided by what the nearest gives, which changes no
            order; None: each gives 1 (the majority).
    """
    weights = np.ones(labels.shape)
    if temperature is not None:
        weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
    given = np.zeros((len(labels), classes))
    np.add.at(given, (np.arange(len(labels))[:, None], labels), weights)
    return given
