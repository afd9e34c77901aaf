"""Where a patch stands in the image: every kind of position embedding, each a small module.

A kind contributes `Terms`: a table that is added to the tokens, a bias that is added to the attention's scores, or a
rotation of queries and keys. What has no place in the image (class and register tokens) gets a zero row, no bias and
no rotation; only the learned 1-D table has a row for the class token, as the published one does.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Terms(NamedTuple):
    """What positions contribute to a model or a block; None for nothing.

    Attributes:
        table: added to the tokens.
        bias: added to the scores.
        rotation: cosines and sines of the angles by which pairs of channels of queries and keys are turned.
    """

    table: Float[Array, "1 tokens width"] | None = None
    bias: Float[Array, "1 heads tokens tokens"] | None = None
    rotation: tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]] | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """What a position embedding has to know about the tokens: [class token] [registers] patches, row by row.

    Attributes:
        rows: of patches.
        columns: of patches.
        class_token: 1 where there is one, else 0.
        registers: number of register tokens.
        width: of the table's rows.
        head_size: channels of a query.
        heads: attention heads.
        grid: rows and columns (equally many) of the grid whose coordinates the patches have; None for their own.
    """

    rows: int
    columns: int
    class_token: int
    registers: int
    width: int
    head_size: int
    heads: int
    grid: int | None = None

    @property
    def extra(self) -> int:
        """Tokens that stand before the patches."""
        return self.class_token + self.registers


class Position(nn.Module):
    """A kind of position embedding.

    Attributes:
        place: the tokens it is for.

    A class says where its terms may act, the usual place first: 'input', 'layers' (each layer has its own), 'shared'
    (the same in every layer); whether it is `fixed`, that is, has no parameters; whether it `needs_grid`, rows and
    columns and not the number of patches alone; and of what the table's width or the head size must be a multiple.
    """

    place: Place
    at = ("input", "shared")
    fixed = False
    needs_grid = True
    width_multiple = 1
    head_multiple = 1


class NoPosition(Position):
    """Tokens in no order."""

    at = ("input",)
    needs_grid = False

    def __call__(self) -> Terms:
        return Terms()


class Learned(Position):
    """A learned vector for every token, in one dimension (arXiv 2010.11929, eq. 1 and appendix D.4)."""

    at = ("input", "layers", "shared")
    needs_grid = False

    @nn.compact
    def __call__(self) -> Terms:
        place = self.place
        count = place.class_token + place.rows * place.columns
        table = self.param("table", nn.initializers.normal(0.02), (1, count, place.width), jnp.float32)
        if place.registers:
            none = jnp.zeros((1, place.registers, place.width), jnp.float32)
            table = jnp.concatenate([table[:, : place.class_token], none, table[:, place.class_token :]], axis=1)
        return Terms(table=table)


class Learned2d(Position):
    """A learned vector for every row and every column, each half as wide, side by side (appendix D.4)."""

    at = ("input", "layers", "shared")
    width_multiple = 2

    @nn.compact
    def __call__(self) -> Terms:
        place = self.place
        normal, half = nn.initializers.normal(0.02), place.width // 2
        rows = self.param("rows", normal, (place.rows, half), jnp.float32)
        columns = self.param("columns", normal, (place.columns, half), jnp.float32)
        shape = (place.rows, place.columns, half)
        pair = [jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)]
        return Terms(table=_for_tokens(jnp.concatenate(pair, axis=-1).reshape(-1, place.width), place))


class Sinusoidal(Position):
    """Sines and cosines of the patch's number in the sequence (arXiv 1706.03762, section 3.5)."""

    fixed = True
    needs_grid = False
    width_multiple = 2

    def __call__(self) -> Terms:
        place = self.place
        return Terms(table=_for_tokens(sinusoidal(place.rows * place.columns, place.width), place))


class SineCosine2d(Position):
    """Sines and cosines of column and row (arXiv 2104.02057, section 4; 2205.01580).

    With `place.grid` the patches stand where they would on a grid of that size, so that a model which has learned from
    one sees no coordinates that are new to it: what resampling is to a learned table.
    """

    fixed = True
    width_multiple = 4

    def __call__(self) -> Terms:
        place = self.place
        return Terms(table=_for_tokens(sine_cosine_2d(place.rows, place.columns, place.width, place.grid), place))


class Relative(Position):
    """A learned bias for every head and every offset in rows and columns from query to key (arXiv 2106.08254, 2.1)."""

    at = ("layers", "shared")

    @nn.compact
    def __call__(self) -> Terms:
        place = self.place
        shape = (place.heads, 2 * place.rows - 1, 2 * place.columns - 1)
        offsets = self.param("offsets", nn.initializers.normal(0.02), shape, jnp.float32)
        row, column = _rows_and_columns(place)
        down = row[None, :] - row[:, None] + place.rows - 1
        right = column[None, :] - column[:, None] + place.columns - 1
        return Terms(bias=jnp.pad(offsets[:, down, right], ((0, 0), (place.extra, 0), (place.extra, 0)))[None])


class Rotary(Position):
    """Queries and keys turned by angles in proportion to column (first half of the pairs) and row (second half).

    The axial form of arXiv 2403.13298 (section 3.1), so that scores depend on the offset between two patches alone.
    """

    at = ("layers", "shared")  # the same: it has no parameters
    fixed = True
    head_multiple = 4

    def __call__(self) -> Terms:
        place = self.place
        row, column = _rows_and_columns(place)
        count = place.head_size // 4
        frequencies = 100.0 ** (-np.arange(count) / count)
        angles = np.concatenate([np.outer(column, frequencies), np.outer(row, frequencies)], axis=1)
        # An angle of zero: class and register tokens stay as they are.
        angles = np.pad(angles, ((place.extra, 0), (0, 0)))
        return Terms(rotation=(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)))


POSITIONS: dict[str, type[Position]] = {
    "none": NoPosition,
    "learned": Learned,
    "learned_2d": Learned2d,
    "sinusoidal": Sinusoidal,
    "sincos_2d": SineCosine2d,
    "relative": Relative,
    "rotary": Rotary,
}


def sinusoidal(count: int, width: int) -> Float[np.ndarray, "count width"]:
    """Row p holds sin(p / 10000^(2i / width)) at channel 2i and the cosine at channel 2i + 1."""
    angles = np.outer(np.arange(count), 10_000.0 ** (-np.arange(0, width, 2) / width))
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(count, width).astype(np.float32)


def sine_cosine_2d(rows: int, columns: int, width: int, side: int | None = None) -> Float[np.ndarray, "patches width"]:
    """A quarter each: sine and cosine of the column, sine and cosine of the row, at frequencies from 1 to 1/10000.

    This is big_vision's form, whose frequencies end at 1/10000 itself; MoCo v3's stop one step short of it. Rows and
    columns are counted from 0; with `side`, their centres are brought to those of a grid of side x side.
    """
    row, column = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    if side is not None:
        row, column = ((axis + 0.5) * side / count - 0.5 for axis, count in ((row, rows), (column, columns)))
    frequencies = 10_000.0 ** -np.linspace(0, 1, width // 4)
    right, down = np.outer(column, frequencies), np.outer(row, frequencies)
    return np.concatenate([np.sin(right), np.cos(right), np.sin(down), np.cos(down)], axis=1).astype(np.float32)


def rotate(
    vectors: Float[Array, "batch tokens heads size"],
    cosines: Float[Array, "tokens half"],
    sines: Float[Array, "tokens half"],
) -> Float[Array, "batch tokens heads size"]:
    """Turns channels i and i + size / 2 of each vector, taken as a point in the plane, by its token's angle i."""
    cosines, sines = cosines[:, None], sines[:, None]
    x, y = jnp.split(vectors.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x * cosines - y * sines, x * sines + y * cosines], axis=-1).astype(vectors.dtype)


def _rows_and_columns(place: Place) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.mgrid[: place.rows, : place.columns]
    return row.ravel(), column.ravel()


def _for_tokens(table: Float[Array | np.ndarray, "patches width"], place: Place) -> Float[Array, "1 tokens width"]:
    table = jnp.asarray(table)
    return (jnp.pad(table, ((place.extra, 0), (0, 0))) if place.extra else table)[None]
