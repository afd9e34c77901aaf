"""k-nearest-neighbour classification of frozen features by cosine similarity (DINO, arXiv 2104.14294, section 4.1)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Num

from vit_jax import arguments
from vit_jax.errors import UserError
from vit_jax.progress import Counter

TEMPERATURE = 0.07  # as in DINO
# Sizes of the blocks of queries and bank examples whose similarities are in memory at a time.
_QUERIES = 512
_BANK = 16384


def nearest(
    bank: Num[Array | np.ndarray, "examples width"] | Sequence[Sequence[float]],
    queries: Num[Array | np.ndarray, "queries width"] | Sequence[Sequence[float]],
    count: int | np.integer,
    block: int | np.integer = _BANK,
) -> tuple[Float[np.ndarray, "queries count"], Int[np.ndarray, "queries count"]]:
    """Returns the `count` most similar bank examples of each query: cosine similarities, largest first, and indices.

    Every pair is compared, in float32; of equal similarities the lower index comes first. The queries stay on the
    device, and the bank is sent once, one block at a time.

    Args:
        bank: features of the candidates; may be memory-mapped.
        queries: features to find neighbours for.
        count: number of neighbours, at most the size of the bank.
        block: bank examples per block; does not change the result.

    Raises:
        UserError: an argument has the wrong type or shape, or `count` is larger than the bank.
    """
    bank, queries = arguments.matrix("bank", bank), arguments.matrix("queries", queries)
    count, block = arguments.integer("count", count), arguments.integer("block", block)
    if count > len(bank) or queries.shape[1] != bank.shape[1]:
        raise UserError(
            f"count is {count}, bank is {arguments.shown(bank)}, queries is {arguments.shown(queries)}\n"
            "  allowed: a count of at most the size of the bank, and features of the same width"
        )
    rows = min(_QUERIES, len(queries))
    padded = np.pad(np.asarray(queries, np.float32), ((0, -len(queries) % rows), (0, 0)))
    query_blocks = _normalize(jnp.asarray(padded)).reshape(-1, rows, queries.shape[1])
    shape = (*query_blocks.shape[:2], count)
    best = (jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32))
    block = min(block, len(bank))
    with Counter("comparing with", len(bank), "examples") as counter:
        for start in counter.over(range(0, len(bank), block), block):
            part = np.asarray(bank[start : start + block], np.float32)
            padded = np.pad(part, ((0, block - len(part)), (0, 0)))
            best = _merge_block(best, query_blocks, padded, np.int32(start), np.int32(len(part)))
            jax.block_until_ready(best)  # what is counted is done
    similarities, indices = (np.asarray(array).reshape(-1, count)[: len(queries)] for array in best)
    return similarities, indices


def _normalize(features: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
    norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)


@functools.partial(jax.jit, donate_argnums=0)
def _merge_block(
    best: tuple[Float[Array, "blocks rows count"], Int[Array, "blocks rows count"]],
    queries: Float[Array, "blocks rows width"],
    bank: Float[Array | np.ndarray, "block width"],
    start: Int[Array | np.ndarray, ""],
    num_real: Int[Array | np.ndarray, ""],
) -> tuple[Float[Array, "blocks rows count"], Int[Array, "blocks rows count"]]:
    """Merges one block of the bank into the nearest neighbours so far; its first `num_real` rows are not padding."""
    bank, is_real = _normalize(jnp.asarray(bank)), jnp.arange(len(bank)) < num_real

    def merge(block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        similarities, indices, queries = block
        found = jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
        found, rows = jax.lax.top_k(jnp.where(is_real, found, -jnp.inf), min(similarities.shape[1], len(bank)))
        # top_k prefers the first of equal values: earlier blocks come first.
        found = jnp.concatenate([similarities, found], axis=1)
        candidates = jnp.concatenate([indices, start + rows], axis=1)
        found, chosen = jax.lax.top_k(found, similarities.shape[1])
        return found, jnp.take_along_axis(candidates, chosen, axis=1)

    return jax.lax.map(merge, (*best, queries))


def votes(
    similarities: Num[Array | np.ndarray, "queries count"] | Sequence[Sequence[float]],
    labels: Integer[Array | np.ndarray, "queries count"] | Sequence[Sequence[int]],
    classes: int | np.integer,
    temperature: float | np.floating | None = TEMPERATURE,
) -> Float[np.ndarray, "queries classes"]:
    """Returns the sum of the neighbours' votes for each class; the prediction is its argmax.

    Args:
        similarities: of the neighbours, largest first.
        labels: of the neighbours.
        classes: number of classes.
        temperature: the weight of a vote is exp(similarity / temperature), divided here by that of the nearest
            neighbour, which does not change the argmax and cannot overflow; None for equal weights (majority vote).

    Raises:
        UserError: an argument has the wrong type or shape, or a label is no class.
    """
    similarities, classes = arguments.matrix("similarities", similarities), arguments.integer("classes", classes)
    flat = arguments.labels("labels", np.ravel(labels), similarities.size, classes)
    labels = flat.reshape(similarities.shape)
    weights = np.ones(labels.shape)
    if temperature is not None:
        weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
    sums = np.zeros((len(labels), classes))
    np.add.at(sums, (np.arange(len(labels))[:, None], labels), weights)
    return sums
