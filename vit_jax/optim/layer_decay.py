"""Layer-wise learning-rate decay: the lower a block, the smaller its learning rate."""

import re
from typing import Any

import jax
import numpy as np
import optax

from vit_jax.optim.trainable import name_of

# Parameters below the first block; the names of all others are those of blocks, or of what follows the last block.
BELOW_BLOCKS = ("stem/", "embedding/", "positions/", "class_token", "registers", "norm_input")


def factors(decay: float, parameters: Any, depth: int) -> Any:
    """Returns the factor of each parameter's learning rate, in a tree with the structure of the parameters.

    decay^(depth - i) for block i of the encoder, counted from 0; decay^(depth + 1) for everything below the blocks
    (stem, embedding, positions, class token, registers); 1 for everything after them (BEiT, arXiv 2106.08254,
    appendix; MAE, arXiv 2111.06377, appendix A.1). A leaf is a number or, for stacked blocks, float32
    [depth, 1, ..., 1].

    Args:
        decay: ratio of a block's learning rate to that of the next higher one.
        parameters: arrays or shapes of the backbone and its head.
        depth: number of encoder blocks.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> float | np.ndarray:
        name = name_of(path)
        block = re.match(r"encoder/block_(\d+)/", name)
        if block:
            return decay ** (depth - int(block[1]))
        if name.startswith("encoder/blocks/"):
            per_block = np.array([decay ** (depth - index) for index in range(depth)], np.float32)
            return per_block.reshape(depth, *[1] * (len(leaf.shape) - 1))
        return decay ** (depth + 1) if name.startswith(BELOW_BLOCKS) else 1.0

    return jax.tree_util.tree_map_with_path(one, parameters)


def scale(factors: Any) -> optax.GradientTransformation:
    """Multiplies each parameter's update, decoupled weight decay included, by its factor; it has no state.

    Args:
        factors: result of `factors`, with None for frozen parameters.
    """

    def update(updates: Any, state: optax.EmptyState, _: Any = None) -> tuple[Any, optax.EmptyState]:
        return jax.tree.map(lambda step, factor: step * factor, updates, factors), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
