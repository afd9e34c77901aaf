"""Conversion between the parameters of a scanned encoder (one tree with an axis of layers) and of an unrolled one."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def stack_blocks(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a model with `scan=True`, from those of a model with or without it.

    `encoder/block_0/...`, `encoder/block_1/...` become `encoder/blocks/...`, with a leading axis of layers. The tree
    may also hold gradients, Adam's moments or averaged parameters.

    Raises:
        ValueError: the tree has no encoder or an encoder without blocks.
    """
    encoder = _encoder(parameters)
    if "blocks" in encoder:
        return parameters
    names = sorted((name for name in encoder if name.startswith("block_")), key=lambda name: int(name[6:]))
    rest = {name: value for name, value in encoder.items() if name not in names}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(encoder[name] for name in names))
    return {**parameters, "encoder": {**rest, "blocks": stacked}}


def unstack_blocks(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a model with `scan=False`, from those of a model with or without it.

    Raises:
        ValueError: the tree has no encoder or an encoder without blocks.
    """
    encoder = _encoder(parameters)
    if "blocks" not in encoder:
        return parameters
    depth = len(jax.tree.leaves(encoder["blocks"])[0])
    rest = {name: value for name, value in encoder.items() if name != "blocks"}
    blocks = {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], encoder["blocks"]) for i in range(depth)}
    return {**parameters, "encoder": {**rest, **blocks}}


def _encoder(parameters: dict[str, Any]) -> dict[str, Any]:
    encoder = parameters.get("encoder", {})
    if "blocks" not in encoder and "block_0" not in encoder:
        raise ValueError(
            f"the tree has no encoder blocks, only {', '.join(parameters) or 'nothing'}: it must have "
            "'encoder/block_0' or 'encoder/blocks', as model.init(...)['params'] does"
        )
    return encoder


def stacked_path(path: str) -> str:
    """The path of a parameter after stacking: 'encoder/block_3/mlp/...' becomes 'encoder/blocks/mlp/...'."""
    return re.sub(r"^encoder/block_\d+/", "encoder/blocks/", path)


def stack_flat(flat: dict[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """`stack_blocks` of NumPy arrays by path, in place: at most one parameter is in memory twice."""
    first = "encoder/block_0/"
    for rest in [path[len(first) :] for path in flat if path.startswith(first)]:
        flat[f"encoder/blocks/{rest}"] = np.stack([flat.pop(f"encoder/block_{i}/{rest}") for i in range(depth)])
    return flat
