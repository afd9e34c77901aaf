"""Resampling of learned position embeddings to another grid of patches (arXiv 2010.11929, section 3.2)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_jax import arguments

METHODS = ("bilinear", "bicubic", "bicubic_no_antialias")


def resample(
    table: Float[Array, "*leading rows columns channels"], grid: tuple[int, int], method: str = "bilinear"
) -> Float[Array, "*leading new_rows new_columns channels"]:
    """A table of rows and columns resampled to `grid`, one axis at a time.

    'bilinear' aligns the corners of both grids and does not antialias, as the published code (scipy's `zoom` of order
    1). 'bicubic' (Keys' kernel, a = -1/2) aligns the edges of the outer patches and antialiases when the grid shrinks,
    as PyTorch's antialiased bicubic interpolation (timm). 'bicubic_no_antialias' (a = -3/4, the outer patches repeated
    beyond the edges) is PyTorch's other one (transformers).

    Raises:
        ValueError: `method` is unknown, or a grid without rows or columns.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: one of {', '.join(METHODS)}")
    if min(grid) < 1:
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} has no patches")
    if table.shape[-3:-1] == tuple(grid):
        return table
    if method == "bicubic":
        shape = (*table.shape[:-3], *grid, table.shape[-1])
        return jax.image.resize(table, shape, "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
    matrix = _aligned_corners if method == "bilinear" else _keys
    down, across = (matrix(old, new) for old, new in zip(table.shape[-3:-1], grid, strict=True))
    return jnp.einsum("nr,mc,...rcd->...nmd", down, across, table, precision=jax.lax.Precision.HIGHEST)


def _aligned_corners(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix that interpolates `old` points linearly at `new` ones; first and last points coincide."""
    points = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return np.maximum(0.0, 1.0 - np.abs(points[:, None] - np.arange(old))).astype(np.float32)


def _keys(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix that interpolates `old` points by Keys' cubic kernel with a = -3/4 at `new` ones, edges aligned."""
    points = (np.arange(new) + 0.5) * old / new - 0.5
    matrix, first = np.zeros((new, old)), np.floor(points).astype(int)
    for tap in range(-1, 3):
        x = np.abs(points - (first + tap))
        near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)


def resample_tokens(
    table: Float[Array, "*leading tokens width"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    method: str = "bilinear",
) -> Float[Array, "*leading new_tokens width"]:
    """A table with a row per token: rows of patches are resampled, those before them (class, registers) kept.

    Raises:
        ValueError: the table has fewer rows than `grid` has patches; or as in `resample`.
    """
    extra = table.shape[-2] - grid[0] * grid[1]
    if extra < 0:
        raise ValueError(f"a table with {table.shape[-2]} rows cannot be for a grid of {grid[0]}x{grid[1]} patches")
    leading, width = table.shape[:-2], table.shape[-1]
    patches = resample(table[..., extra:, :].reshape(*leading, *grid, width), new_grid, method)
    return jnp.concatenate([table[..., :extra, :], patches.reshape(*leading, -1, width)], axis=-2)


def resample_positions(
    parameters: Mapping[str, Any], grid: tuple[int, int], new_grid: tuple[int, int], method: str = "bilinear"
) -> dict[str, Any]:
    """Parameters in which every learned position embedding is resampled from `grid` (rows, columns) to `new_grid`.

    Position embeddings at the input and in blocks are resampled, stacked or not. All other arrays are returned
    unchanged.

    Raises:
        ValueError: a position embedding is not for `grid`; or as in `resample`.
    """
    grid, new_grid = arguments.pair("grid", grid), arguments.pair("new_grid", new_grid)

    def one(name: str, leaf: jax.Array) -> jax.Array:
        if name == "table":
            return resample_tokens(leaf, grid, new_grid, method)
        if name == "class":  # biases of the class token do not depend on the grid
            return leaf
        # Tables of rows only, of columns only, and of offsets (from minus to plus the last row or column).
        old, new, view = {
            "rows": ((grid[0], 1), (new_grid[0], 1), (*leaf.shape[:-1], 1, leaf.shape[-1])),
            "columns": ((1, grid[1]), (1, new_grid[1]), (*leaf.shape[:-2], 1, *leaf.shape[-2:])),
            "offsets": (tuple(2 * n - 1 for n in grid), tuple(2 * n - 1 for n in new_grid), (*leaf.shape, 1)),
        }[name]
        if tuple(view[-3:-1]) != old:
            raise ValueError(f"positions {name!r} of shape {leaf.shape} are not for a grid of {grid[0]}x{grid[1]}")
        resampled = resample(leaf.reshape(view), new, method)
        axis = {"rows": -2, "columns": -3, "offsets": -1}[name]
        return jnp.squeeze(resampled, axis)

    def walk(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: {name: one(name, leaf) for name, leaf in value.items()}
            if key == "positions"
            else (walk(value) if isinstance(value, Mapping) else value)
            for key, value in tree.items()
        }

    return walk(parameters)
