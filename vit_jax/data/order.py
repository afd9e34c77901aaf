"""Which example stands at which place, and what is random there: pure functions of the seed and the place alone."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray


def keys(seed: int | Int[Array, ""], place: int | Int[Array, ""]) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """The keys of the batch at a place of the run: of its augmentation, and of the dropout in the model."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), place))
    return augment_key, dropout_key


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, examples: int) -> Int[np.ndarray, " examples"]:
    """The order in which an epoch visits the examples.

    Sorting raw Philox output (Salmon et al. 2011) rather than calling a library's shuffle: the bit stream of Philox is
    specified, what a shuffle makes of it may change between versions.
    """
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(examples)
    order = np.argsort(raw, kind="stable")
    order.setflags(write=False)
    return order


def indices(seed: int, start: int, count: int, examples: int) -> Int[np.ndarray, " count"]:
    """The examples at the places start .. start + count of the endless sequence of shuffled epochs.

    Every example comes once an epoch: a batch that reaches over an epoch's end takes its rest from the next.
    """
    places = np.arange(start, start + count)
    epochs = places // examples
    taken = np.empty(count, np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        taken[here] = permutation(seed, int(epoch), examples)[places[here] % examples]
    return taken
