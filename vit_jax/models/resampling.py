"""Learned positions for another grid of patches: another image size, ratio or patch (arXiv 2010.11929, section 3.2)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

METHODS = ("bilinear", "bicubic")


def resample(
    table: Float[Array, "*leading rows columns channels"], grid: tuple[int, int], method: str = "bilinear"
) -> Float[Array, "*leading new_rows new_columns channels"]:
    """A table of rows and columns resampled to `grid`, up or down, each axis by itself.

    'bilinear' puts the corners of both grids on each other and smooths nothing, as the published code does (scipy's
    `zoom` of order 1). 'bicubic' (Keys' kernel, a = -1/2) puts the edges of the outer patches on each other and widens
    the kernel where the grid shrinks, so that no row is passed over; it is what PyTorch has as antialiased bicubic.

    Raises:
        ValueError: no such method, or a grid without rows or columns.
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
    down, across = (_aligned_corners(old, new) for old, new in zip(table.shape[-3:-1], grid, strict=True))
    return jnp.einsum("nr,mc,...rcd->...nmd", down, across, table, precision=jax.lax.Precision.HIGHEST)


def _aligned_corners(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix that interpolates `old` points linearly at `new` ones, first on first and last on last."""
    places = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(old))).astype(np.float32)


def resample_tokens(
    table: Float[Array, "*leading tokens width"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    method: str = "bilinear",
) -> Float[Array, "*leading new_tokens width"]:
    """A table with a row for every token: those of the patches resampled, any before them (class, registers) kept.

    Raises:
        ValueError: the table has fewer rows than `grid` has patches, or as in `resample`.
    """
    extra = table.shape[-2] - grid[0] * grid[1]
    if extra < 0:
        raise ValueError(f"a table of {table.shape[-2]} rows is none of a grid of {grid[0]}x{grid[1]} patches")
    leading, width = table.shape[:-2], table.shape[-1]
    patches = resample(table[..., extra:, :].reshape(*leading, *grid, width), new_grid, method)
    return jnp.concatenate([table[..., :extra, :], patches.reshape(*leading, -1, width)], axis=-2)


def resample_positions(
    parameters: dict[str, Any], grid: tuple[int, int], new_grid: tuple[int, int], method: str = "bilinear"
) -> dict[str, Any]:
    """A model's parameters with every learned position embedding resampled from `grid` (rows, columns) to `new_grid`.

    It is found wherever it is: at the input, in every block, stacked or not. Anything else stays the same array, and a
    model whose positions are fixed needs none of this.

    Raises:
        ValueError: the parameters are not those of a model with that grid, or as in `resample`.
    """

    def one(name: str, leaf: jax.Array) -> jax.Array:
        if name == "table":
            return resample_tokens(leaf, grid, new_grid, method)
        # Tables of rows alone, of columns alone, and of offsets (from minus to plus the last row, and column).
        old, new, view = {
            "rows": ((grid[0], 1), (new_grid[0], 1), (*leaf.shape[:-1], 1, leaf.shape[-1])),
            "columns": ((1, grid[1]), (1, new_grid[1]), (*leaf.shape[:-2], 1, *leaf.shape[-2:])),
            "offsets": (tuple(2 * n - 1 for n in grid), tuple(2 * n - 1 for n in new_grid), (*leaf.shape, 1)),
        }[name]
        if tuple(view[-3:-1]) != old:
            raise ValueError(f"positions {name!r} of shape {leaf.shape} are none of a grid of {grid[0]}x{grid[1]}")
        resampled = resample(leaf.reshape(view), new, method)
        axis = {"rows": -2, "columns": -3, "offsets": -1}[name]
        return jnp.squeeze(resampled, axis)

    def walk(tree: dict[str, Any]) -> dict[str, Any]:
        return {
            key: {name: one(name, leaf) for name, leaf in value.items()}
            if key == "positions"
            else (walk(value) if isinstance(value, dict) else value)
            for key, value in tree.items()
        }

    return walk(parameters)
