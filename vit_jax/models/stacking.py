"""Between the parameters of a scanned encoder (one tree with an axis of layers) and of an unrolled one."""

from typing import Any

import jax
import jax.numpy as jnp


def stack_blocks(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters as a model with `scan=True` has them; what is stacked already is returned as it is.

    `encoder/block_0/...`, `encoder/block_1/...` become `encoder/blocks/...`, with a leading axis of layers. It works on
    any tree that has the structure of the parameters: gradients, Adam's moments, averaged parameters.

    Raises:
        ValueError: there is no encoder in the tree, or one without blocks.
    """
    encoder = _encoder(parameters)
    if "blocks" in encoder:
        return parameters
    names = sorted((name for name in encoder if name.startswith("block_")), key=lambda name: int(name[6:]))
    rest = {name: value for name, value in encoder.items() if name not in names}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(encoder[name] for name in names))
    return {**parameters, "encoder": {**rest, "blocks": stacked}}


def unstack_blocks(parameters: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_blocks`: the parameters as a model with `scan=False` has them.

    Raises:
        ValueError: there is no encoder in the tree, or one without blocks.
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
            f"no encoder's parameters: {', '.join(parameters) or 'nothing'} at the top; expected is a tree with "
            "'encoder/block_0' or 'encoder/blocks', as model.init(...)['params'] is"
        )
    return encoder
