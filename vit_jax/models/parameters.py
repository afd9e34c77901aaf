"""The shapes of a model's parameters by path, such as 'encoder/block_0/mlp/up/kernel'."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.models.vit import VisionTransformer, pixels_per_patch

Shapes = dict[str, tuple[int, ...]]
BLOCK = "encoder/block_0/"


def parameter_shapes(model: VisionTransformer, grid: tuple[int, int] | None, channels: int) -> Shapes:
    """The shape of every parameter by its path, of a scanned model with blocks one by one too.

    Args:
        model: the model.
        grid: rows and columns of patches; None if no parameter depends on them.
        channels: number of channels of the images.
    """
    shapes = {}
    one_block = model.clone(depth=1, scan=False, remat=False)
    for path, shape in _traced_shapes(one_block, grid or (1, 1), channels).items():
        blocks = range(model.depth) if path.startswith(BLOCK) else range(1)
        shapes |= {path.replace(BLOCK, f"encoder/block_{index}/"): shape for index in blocks}
    return shapes


@functools.lru_cache(maxsize=64)  # loading a file needs the same shapes several times
def _traced_shapes(model: VisionTransformer, grid: tuple[int, int], channels: int) -> Shapes:
    side = pixels_per_patch(model)
    images = jax.ShapeDtypeStruct((1, grid[0] * side, grid[1] * side, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree of parameters by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of parameters with these leaves by path; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def heads(classes: int | Mapping[str, int] | None) -> dict[str, int]:
    """The number of classes of every head by its name; the name of a single, unnamed head is ''."""
    if classes is None:
        return {}
    return dict(classes) if isinstance(classes, Mapping) else {"": classes}
