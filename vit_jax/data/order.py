"""The order of the examples and the random keys of each step: pure functions of the seed and the step."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray


def keys(seed: int | Int[Array, ""], step: int | Int[Array, ""]) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Returns the random keys of the batch at `step` of the input sequence: for augmentation and for dropout."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return augment_key, dropout_key


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " num_examples"]:
    """Returns the order in which an epoch visits the examples.

    It sorts the raw output of Philox (Salmon et al. 2011) instead of calling a library's shuffle: the bit stream of
    Philox is specified, while the result of a shuffle may change between versions.
    """
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    order = np.argsort(raw, kind="stable")
    order.setflags(write=False)
    return order


def indices(seed: int, start: int, count: int, num_examples: int) -> Int[np.ndarray, " count"]:
    """Returns the examples at positions start to start + count of the infinite sequence of shuffled epochs.

    Every example occurs once per epoch; a batch that reaches the end of an epoch continues with the next one.
    """
    positions = np.arange(start, start + count)
    epochs = positions // num_examples
    examples = np.empty(count, np.int32)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        examples[here] = permutation(seed, int(epoch), num_examples)[positions[here] % num_examples]
    return examples
