"""Layer-wise decay of the learning rate: the lower a layer, the smaller its steps."""

import re
from typing import Any

import jax
import numpy as np
import optax

from vit_jax.optim.trainable import name_of

BEFORE = ("stem/", "embedding/", "positions/", "class_token", "registers")  # parameters below the blocks


def factors(decay: float, parameters: Any, depth: int) -> Any:
    """What the learning rate of each parameter is multiplied by, in a tree of the structure of the parameters.

    decay^(depth - i) for block i of the encoder, counted from 0; decay^(depth + 1) for all before the blocks (stem,
    embedding, positions, class token, registers); 1 for all behind them (BEiT, arXiv 2106.08254, appendix; MAE,
    arXiv 2111.06377, appendix A.1). A leaf is a number, or for stacked blocks float32 [depth, 1, ..., 1].

    Args:
        decay: from each block to the one below it.
        parameters: arrays or shapes.
        depth: blocks of the encoder.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> float | np.ndarray:
        name = name_of(path)
        block = re.match(r"encoder/block_(\d+)/", name)
        if block:
            return decay ** (depth - int(block[1]))
        if name.startswith("encoder/blocks/"):
            each = np.array([decay ** (depth - index) for index in range(depth)], np.float32)
            return each.reshape(depth, *[1] * (len(leaf.shape) - 1))
        return decay ** (depth + 1) if name.startswith(BEFORE) else 1.0

    return jax.tree_util.tree_map_with_path(one, parameters)


def scale(factors: Any) -> optax.GradientTransformation:
    """Multiplies each parameter's update, decoupled weight decay included, by its factor; it keeps no state.

    Args:
        factors: as `factors` makes them, with None for the parameters that are frozen.
    """

    def update(updates: Any, state: optax.EmptyState, _: Any = None) -> tuple[Any, optax.EmptyState]:
        return jax.tree.map(lambda step, factor: step * factor, updates, factors), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
