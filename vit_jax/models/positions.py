"""Position embeddings, each a small module.

A position embedding returns `Terms`: a table that is added to the tokens, a bias that is added to the attention scores,
or a rotation of queries and keys. Class and register tokens have no position in the image: they get a row of zeros, no
bias and no rotation. Only the learned 1-D table has a learned row for the class token, as the published one does.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Terms(NamedTuple):
    """The output of a position embedding; None for what it does not use.

    Attributes:
        table: added to the tokens.
        bias: added to the attention scores.
        rotation: cosines and sines of the angles by which pairs of channels of queries and keys are rotated.
    """

    table: Float[Array, "1 tokens width"] | None = None
    bias: Float[Array, "1 heads tokens tokens"] | None = None
    rotation: tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]] | None = None


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """The tokens that a position embedding is for: [class token] [registers] patches, in row-major order.

    Attributes:
        rows: number of rows of patches.
        columns: number of columns of patches.
        class_token: number of class tokens, 1 or 0.
        registers: number of register tokens.
        width: width of a table.
        head_size: channels per attention head.
        heads: number of attention heads.
        grid: rows (and columns) of the square grid whose coordinates the patches get; None for those of their own grid.
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
        """Number of tokens before the patches."""
        return self.class_token + self.registers


class Position(nn.Module):
    """Base class of the position embeddings.

    Attributes:
        layout: the tokens that it is for.

    A class says where its terms may be applied (`at`, the default first): 'input', 'layers' (each layer has its own) or
    'shared' (the same in every layer); whether it is `fixed`, without parameters; whether it `needs_grid`, rows and
    columns instead of only their product, `needs_class_token`, and `takes_grid`, a grid of its own for images of any
    size; and the number that must divide the width of its table or the head size. A rotary one has `angles`.
    """

    layout: TokenLayout
    at = ("input", "shared")
    fixed = False
    needs_grid = True
    needs_class_token = False
    takes_grid = False
    width_multiple = 1
    head_multiple = 1
    angles = None


class NoPosition(Position):
    """No position embedding."""

    at = ("input",)
    needs_grid = False

    def __call__(self) -> Terms:
        return Terms()


class Learned(Position):
    """A learned vector for every class token and patch (arXiv 2010.11929, eq. 1; '1-D' in appendix D.4)."""

    at = ("input", "layers", "shared")
    needs_grid = False

    @nn.compact
    def __call__(self) -> Terms:
        return Terms(table=_learned_table(self))


class Learned2d(Position):
    """A learned vector for every row and every column, half as wide each, concatenated ('2-D' in appendix D.4)."""

    at = ("input", "layers", "shared")
    width_multiple = 2

    @nn.compact
    def __call__(self) -> Terms:
        layout = self.layout
        normal, half = nn.initializers.normal(0.02), layout.width // 2
        rows = self.param("rows", normal, (layout.rows, half), jnp.float32)
        columns = self.param("columns", normal, (layout.columns, half), jnp.float32)
        shape = (layout.rows, layout.columns, half)
        pair = [jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)]
        return Terms(table=_for_tokens(jnp.concatenate(pair, axis=-1).reshape(-1, layout.width), layout))


class Sinusoidal(Position):
    """Sines and cosines of the patch's index in the sequence (arXiv 1706.03762, section 3.5)."""

    fixed = True
    needs_grid = False
    width_multiple = 2

    def __call__(self) -> Terms:
        layout = self.layout
        return Terms(table=_for_tokens(sinusoidal(layout.rows * layout.columns, layout.width), layout))


class SineCosine2d(Position):
    """Sines and cosines of column and row (arXiv 2104.02057, section 4; 2205.01580).

    With `layout.grid` the coordinates are scaled to a grid of that size, so that a model trained on such a grid sees no
    new coordinates at another image size: the counterpart of resampling a learned table.
    """

    fixed = True
    takes_grid = True
    width_multiple = 4

    def __call__(self) -> Terms:
        layout = self.layout
        return Terms(table=_for_tokens(sine_cosine_2d(layout.rows, layout.columns, layout.width, layout.grid), layout))


class Relative(Position):
    """A learned bias per head and per offset in rows and columns between query and key (arXiv 2106.08254, 2.1)."""

    at = ("layers", "shared")

    @nn.compact
    def __call__(self) -> Terms:
        return Terms(bias=_relative_bias(self))


class RelativeWithClass(Position):
    """As `Relative`, and a learned bias per head each for the class token as a query, as a key, and as both.

    BEiT (arXiv 2106.08254, section 2.1, and its code). Registers have no bias.
    """

    at = ("layers", "shared")
    needs_class_token = True

    @nn.compact
    def __call__(self) -> Terms:
        bias = _relative_bias(self)
        query, key, both = self.param("class", nn.initializers.normal(0.02), (self.layout.heads, 3), jnp.float32).T
        return Terms(
            bias=bias.at[0, :, 0].set(query[:, None]).at[0, :, :, 0].set(key[:, None]).at[0, :, 0, 0].set(both)
        )


@dataclasses.dataclass(frozen=True)
class Angles:
    """How the angles of a rotary position embedding follow from row and column.

    The angle of pair i of the first half of the channel pairs is x / temperature^(i / (size / 4)), where size is the
    head size and x the patch's coordinate along the first axis; the second half is for the other axis.

    Attributes:
        temperature: ratio of the largest frequency to that one step below the smallest.
        rows_first: whether the first axis is that of rows.
        coordinates: 'index' (row and column, plus `offset`); 'grid' (these, scaled to `TokenLayout.grid` rows and
            columns); or 'centres' (of patches, 2 pi times their place from -1 to 1 in the image).
        offset: added to row and column.
    """

    temperature: float = 100.0
    rows_first: bool = False
    coordinates: str = "index"
    offset: float = 0.0

    def rotation(self, layout: TokenLayout) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
        """Cosines and sines of the angles of all tokens; those before the patches are rotated by zero."""
        row, column = _rows_and_columns(layout)
        if self.coordinates == "centres":
            row, column = (
                2 * np.pi * (2 * (x + 0.5) / n - 1) for x, n in ((row, layout.rows), (column, layout.columns))
            )
        else:
            row, column = row + self.offset, column + self.offset
        if self.coordinates == "grid" and layout.grid is not None:
            row, column = row * layout.grid / layout.rows, column * layout.grid / layout.columns
        count = layout.head_size // 4
        frequencies = self.temperature ** (-np.arange(count) / count)
        axes = (row, column) if self.rows_first else (column, row)
        angles = np.concatenate([np.outer(axis, frequencies) for axis in axes], axis=1)
        angles = np.pad(angles, ((layout.extra, 0), (0, 0)))
        return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


class Rotary(Position):
    """Rotates queries and keys by angles proportional to column and row (arXiv 2403.13298, section 3.1: axial).

    Scores then depend only on the offset between two patches.
    """

    at = ("layers", "shared")  # equivalent, as it has no parameters
    fixed = True
    head_multiple = 4
    angles = Angles()

    def __call__(self) -> Terms:
        return Terms(rotation=self.angles.rotation(self.layout))


class Dinov3(Rotary):
    """Rotates by the place of the patch's centre in the image (arXiv 2508.10104, section 3.2)."""

    angles = Angles(rows_first=True, coordinates="centres")


class Eva02(Rotary):
    """Rotates by row and column, scaled to the grid of training (arXiv 2303.11331)."""

    takes_grid = True
    angles = Angles(temperature=10_000.0, rows_first=True, coordinates="grid")


class PerceptionEncoder(Rotary):
    """As `Eva02`, with rows and columns counted from 1, and columns first (arXiv 2504.13181)."""

    takes_grid = True
    angles = Angles(temperature=10_000.0, coordinates="grid", offset=1.0)


class LearnedRotary(Position):
    """The learned table at the input, and a rotation in all layers."""

    at = ("input",)
    head_multiple = 4
    angles = Rotary.angles

    @nn.compact
    def __call__(self) -> Terms:
        return Terms(table=_learned_table(self), rotation=self.angles.rotation(self.layout))


class LearnedEva02(LearnedRotary):
    """The learned table and the rotation of `Eva02`."""

    takes_grid = True
    angles = Eva02.angles


class LearnedPerceptionEncoder(LearnedRotary):
    """The learned table and the rotation of `PerceptionEncoder`."""

    takes_grid = True
    angles = PerceptionEncoder.angles


POSITIONS: dict[str, type[Position]] = {
    "none": NoPosition,
    "learned": Learned,
    "learned_2d": Learned2d,
    "sinusoidal": Sinusoidal,
    "sincos_2d": SineCosine2d,
    "relative": Relative,
    "relative_class": RelativeWithClass,
    "rotary": Rotary,
    "dinov3": Dinov3,
    "eva02": Eva02,
    "pe": PerceptionEncoder,
    "learned_rotary": LearnedRotary,
    "learned_eva02": LearnedEva02,
    "learned_pe": LearnedPerceptionEncoder,
}


def where_applied(position: str, at: str | None) -> str:
    """Where a kind of position embedding is applied: at `at`, or by default at the first of its options."""
    return at or POSITIONS[position].at[0]


def sinusoidal(count: int, width: int) -> Float[np.ndarray, "count width"]:
    """A table: row p has sin(p / 10000^(2i / width)) in channel 2i and the cosine in channel 2i + 1."""
    angles = np.outer(np.arange(count), 10_000.0 ** (-np.arange(0, width, 2) / width))
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(count, width).astype(np.float32)


def sine_cosine_2d(rows: int, columns: int, width: int, side: int | None = None) -> Float[np.ndarray, "patches width"]:
    """A table with, a quarter of the width each, sine and cosine of the column and sine and cosine of the row.

    Frequencies go from 1 to 1/10000 inclusive, as in big_vision; MoCo v3's stop one step before. Rows and columns are
    counted from 0; with `side`, the patches' centres are scaled to a grid of side x side.
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
    """Rotates channels i and i + size / 2 of each vector, as a point in the plane, by its token's angle i."""
    cosines, sines = cosines[:, None], sines[:, None]
    x, y = jnp.split(vectors.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x * cosines - y * sines, x * sines + y * cosines], axis=-1).astype(vectors.dtype)


def _learned_table(module: Position) -> Float[Array | np.ndarray, "1 tokens width"]:
    """The parameter 'table' of a module, with rows of zeros for registers."""
    layout = module.layout
    count = layout.class_token + layout.rows * layout.columns
    table = module.param("table", nn.initializers.normal(0.02), (1, count, layout.width), jnp.float32)
    if layout.registers:
        none = jnp.zeros((1, layout.registers, layout.width), jnp.float32)
        table = jnp.concatenate([table[:, : layout.class_token], none, table[:, layout.class_token :]], axis=1)
    return table


def _relative_bias(module: Position) -> Float[Array | np.ndarray, "1 heads tokens tokens"]:
    """The bias by the parameter 'offsets' of a module; zero for tokens before the patches."""
    layout = module.layout
    shape = (layout.heads, 2 * layout.rows - 1, 2 * layout.columns - 1)
    offsets = module.param("offsets", nn.initializers.normal(0.02), shape, jnp.float32)
    row, column = _rows_and_columns(layout)
    down = row[None, :] - row[:, None] + layout.rows - 1
    right = column[None, :] - column[:, None] + layout.columns - 1
    return jnp.pad(offsets[:, down, right], ((0, 0), (layout.extra, 0), (layout.extra, 0)))[None]


def _rows_and_columns(layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.mgrid[: layout.rows, : layout.columns]
    return row.ravel(), column.ravel()


def _for_tokens(
    table: Float[Array | np.ndarray, "patches width"], layout: TokenLayout
) -> Float[Array, "1 tokens width"]:
    table = jnp.asarray(table)
    return (jnp.pad(table, ((layout.extra, 0), (0, 0))) if layout.extra else table)[None]
