"""Figures of matplotlib: sheets of tiles with captions, title and color bar, laid out in inches without overlap."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib import cm, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from vit_jax import fonts
from vit_jax.data import listing

HEAT = "inferno"  # of maps over images; its lightness rises steadily, so that it needs no color vision
SEQUENTIAL = "viridis"  # of matrices
RELATIVE = "from each map's minimum to its maximum"
BETWEEN = (0.82, 0.88, 0.94)  # of the gaps between tiles in one mosaic, which no grey of a tile is mistaken for
OPACITY = 0.65  # of a map over an image
TEXT, TITLE = 8, 11  # sizes, points
BOLD = 1.16  # width of bold text over that of the same text in regular
LINE = 0.15  # height of a line of text, inches
GAP, MARGIN = 0.08, 0.18  # inches
BAR = 2.3  # height of a color bar with its label, inches
WIDTH = 11.0  # of a sheet with many tiles, inches
Images = UInt8[np.ndarray, "images height width channels"]


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A figure, and the arrays that it shows.

    Attributes:
        figure: of matplotlib.
        arrays: by name, as documented with the function that computes them.
    """

    figure: Figure
    arrays: dict[str, np.ndarray]


class Sheet:
    """A figure of equal tiles in rows and columns, with lines of text below each."""

    def __init__(
        self,
        rows: int,
        columns: int,
        tile: tuple[float, float],
        title: str,
        subtitle: str,
        lines: int = 0,
        bar: bool = False,
    ):
        """Makes an empty figure.

        Args:
            rows: of tiles.
            columns: of tiles.
            tile: width and height of a tile, inches.
            title: the first line.
            subtitle: the second line, smaller.
            lines: number of lines below each tile.
            bar: whether there is room for a color bar at the right.
        """
        self._tile, self._below, self._lines = tile, LINE * lines + GAP, lines
        self.top = MARGIN + 0.22 + 0.2 + GAP
        content = columns * (tile[0] + GAP)
        title_width = max(_inches(title, TITLE) * BOLD, _inches(subtitle, TEXT))
        self.width = max(content + (0.75 if bar else 0.0), min(title_width, WIDTH)) + 2 * MARGIN - GAP
        content_height = rows * (tile[1] + self._below)
        self.height = self.top + max(content_height, BAR + GAP if bar else 0.0) + MARGIN - GAP
        self._right = MARGIN + content
        self.figure = Figure(figsize=(self.width, self.height), facecolor="white")
        put(self.figure, (MARGIN, MARGIN), title, TITLE, self.width - 2 * MARGIN, weight="bold")
        put(self.figure, (MARGIN, MARGIN + 0.24), subtitle, TEXT, self.width - 2 * MARGIN, color="0.35")

    def box(self, left: float, top: float, width: float, height: float, ticks: bool = False) -> Axes:
        """Returns axes in a box, in inches from the top left corner; by default without ticks and lines."""
        size = self.width, self.height
        axes = self.figure.add_axes((left / size[0], 1 - (top + height) / size[1], width / size[0], height / size[1]))
        if not ticks:
            axes.set_xticks([])
            axes.set_yticks([])
        for side, spine in axes.spines.items():
            spine.set_visible(ticks and side in ("left", "bottom"))
        return axes

    def tile(self, row: int, column: int, caption: str = "") -> Axes:
        """Returns the axes of a tile, with its caption of one or more lines below it."""
        left, top = MARGIN + column * (self._tile[0] + GAP), self.top + row * (self._tile[1] + self._below)
        self.caption((left, top + self._tile[1] + 0.03), caption, self._tile[0])
        return self.box(left, top, *self._tile)

    def caption(self, corner: tuple[float, float], caption: str, width: float) -> None:
        """Writes lines of text, each cut off where it is wider than `width` inches."""
        for index, line in enumerate(caption.split("\n")[: self._lines]):
            put(self.figure, (corner[0], corner[1] + index * LINE), line, TEXT - 1, width)

    def wide(self, row: int, column: int, columns: int, caption: str) -> None:
        """Writes the caption of several tiles side by side, as wide as all of them."""
        left, top = MARGIN + column * (self._tile[0] + GAP), self.top + row * (self._tile[1] + self._below)
        self.caption((left, top + self._tile[1] + 0.03), caption, columns * (self._tile[0] + GAP) - GAP)

    def bar(self, label: str, color: str, low: float = 0.0, high: float = 1.0, opacity: float = 1.0) -> None:
        """Draws a color bar at the right."""
        height = min(BAR, self.height - self.top - MARGIN)
        axes = self.box(self._right + 0.04, self.top, 0.14, height)
        scale = cm.ScalarMappable(colors.Normalize(low, high), color)
        bar = self.figure.colorbar(scale, cax=axes, alpha=opacity)
        bar.solids.set_edgecolor("face")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=TEXT - 1, length=2)
        bar.set_label(label, size=TEXT - 1)


def put(figure: Figure, corner: tuple[float, float], text: str, size: float, width: float, **style: str) -> None:
    """Writes a line of text at a corner in inches from the top left; it is cut off where it is wider than `width`."""
    text, font = _drawable(listing.printable(text), size)
    if _inches(text, size, font) > width:
        count = bisect.bisect_right(range(len(text)), width, key=lambda n: _inches(f"{text[:n]}...", size, font))
        text = f"{text[: max(count - 1, 0)].rstrip()}..."
    full = figure.get_size_inches()
    x, y = corner[0] / full[0], 1 - corner[1] / full[1]
    figure.text(x, y, text, fontsize=size, va="top", ha="left", parse_math=False, fontproperties=font, **style)


def _inches(text: str, size: float, font: FontProperties | None = None) -> float:
    """Returns the width of a line of text."""
    if not text:
        return 0.0
    path = TextPath((0, 0), text.replace("$", "S").replace(" ", "n"), size=size, prop=font)
    return path.get_extents().width / 72 * 1.06


def _drawable(text: str, size: float) -> tuple[str, FontProperties]:
    """Returns a text and its font: the default one, or one of the machine's that has the characters."""
    if all(ord(character) < 0x250 for character in text):
        return text, FontProperties(size=size)
    font, text = fonts.fit(text, 12)
    return text, FontProperties(fname=font.path if isinstance(font.path, str) else None, size=size)


def maps(
    images: Images,
    found: Float[np.ndarray, "images maps rows columns"],
    titles: Sequence[str],
    captions: Sequence[str],
    title: str,
    subtitle: str,
    patch: tuple[int, int] | None = None,
) -> Figure:
    """Returns the images, each followed by its maps over it; each map is scaled from its minimum to its maximum.

    Args:
        images: as the model takes them, before normalization.
        found: values of each patch.
        titles: one per map; none if there is one map.
        captions: one per image.
        title: of the figure.
        subtitle: of the figure.
        patch: row and column of a patch to outline in the images.
    """
    count, num_maps = found.shape[:2]
    lines = max(caption.count("\n") + 1 for caption in captions)
    if count == 1 and num_maps > 3:
        return _one_image(images[0], found[0], titles, captions[0], title, subtitle, patch)
    per_row = 1 if num_maps > 1 else min(count, 4 if count > 2 else count)
    columns = per_row * (1 + num_maps)
    tile = _tile(images, columns)
    sheet = Sheet(math.ceil(count / per_row), columns, tile, title, subtitle, max(lines, 1), bar=True)
    for index in range(count):
        row, first = divmod(index, per_row)
        first *= 1 + num_maps
        _show(sheet.tile(row, first), images[index], found.shape[2:], patch)
        sheet.wide(row, first, 1 if num_maps > 1 else 2, captions[index])
        for number in range(num_maps):
            heading = titles[number] if titles else ""
            over(sheet.tile(row, first + 1 + number, heading), images[index], found[index, number])
    sheet.bar(RELATIVE, HEAT, opacity=OPACITY)
    return sheet.figure


def _one_image(
    image: UInt8[np.ndarray, "height width channels"],
    found: Float[np.ndarray, "maps rows columns"],
    titles: Sequence[str],
    caption: str,
    title: str,
    subtitle: str,
    patch: tuple[int, int] | None,
) -> Figure:
    """As `maps`, for many maps of one image: they are wrapped into rows."""
    columns = min(5, math.ceil(math.sqrt(len(found) + 1)))
    sheet = Sheet(
        math.ceil((len(found) + 1) / columns),
        columns,
        _tile(image[None], max(columns, 5)),
        title,
        subtitle,
        caption.count("\n") + 1,
        bar=True,
    )
    _show(sheet.tile(0, 0, caption), image, found.shape[1:], patch)
    for number, (one, heading) in enumerate(zip(found, titles, strict=True), start=1):
        over(sheet.tile(*divmod(number, columns), heading), image, one)
    sheet.bar(RELATIVE, HEAT, opacity=OPACITY)
    return sheet.figure


def over(
    axes: Axes, image: UInt8[np.ndarray, "height width channels"], values: Float[np.ndarray, "rows columns"]
) -> None:
    """Draws a map over an image in grey; the map is interpolated between the centres of the patches."""
    extent = (0, image.shape[1], image.shape[0], 0)
    axes.imshow(rgb(image).mean(axis=-1), cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest")
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, np.finfo(np.float32).tiny)
    style = {"cmap": HEAT, "vmin": 0, "vmax": 1, "alpha": OPACITY}
    axes.imshow(scaled, extent=extent, interpolation="bilinear", aspect="auto", **style)
    axes.set_aspect("equal")


def rgb(image: UInt8[np.ndarray, "height width channels"]) -> UInt8[np.ndarray, "height width 3"]:
    """Returns an image of any number of channels in RGB: of one channel in grey, of several the first three."""
    return np.broadcast_to(image[..., :1] if image.shape[-1] < 3 else image[..., :3], (*image.shape[:2], 3))


def _show(
    axes: Axes,
    image: UInt8[np.ndarray, "height width channels"],
    grid: Sequence[int] = (),
    patch: tuple[int, int] | None = None,
) -> None:
    """Draws an image in its own colors, with an outline around a patch."""
    axes.imshow(rgb(image), interpolation="nearest")
    if patch is not None:
        height, width = image.shape[0] / grid[0], image.shape[1] / grid[1]
        corner = patch[1] * width - 0.5, patch[0] * height - 0.5
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=2.5))
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="black", linewidth=1))


def _tile(images: Images, columns: int) -> tuple[float, float]:
    """Returns width and height of a tile in inches, of which `columns` are as wide as a sheet."""
    height, width = images.shape[1:3]
    side = max(0.75, min(2.6, WIDTH / columns - GAP))
    return side * min(1.0, width / height), side * min(1.0, height / width)


def features(
    images: Images,
    components: Float[np.ndarray, "images rows columns components"],
    captions: Sequence[str],
    title: str,
    subtitle: str,
) -> Figure:
    """Returns pairs of an image and its components as colors, from the 2nd to the 98th percentile of all images."""
    low, high = np.percentile(components, [2, 98], axis=(0, 1, 2))
    shown = np.clip((components - low) / np.maximum(high - low, np.finfo(np.float32).tiny), 0, 1)
    missing = np.zeros((*shown.shape[:-1], 3 - shown.shape[-1]))
    return _pairs(images, np.concatenate([shown, missing], axis=-1), captions, title, subtitle)


def _pairs(images: Images, others: np.ndarray, captions: Sequence[str], title: str, subtitle: str) -> Figure:
    per_row = min(len(images), 4 if len(images) > 2 else 2)
    tile = _tile(images, 2 * per_row)
    lines = max(caption.count("\n") + 1 for caption in captions)
    sheet = Sheet(math.ceil(len(images) / per_row), 2 * per_row, tile, title, subtitle, lines)
    for index, (image, other, caption) in enumerate(zip(images, others, captions, strict=True)):
        row, pair = divmod(index, per_row)
        _show(sheet.tile(row, 2 * pair), image)
        sheet.wide(row, 2 * pair, 2, caption)
        axes = sheet.tile(row, 2 * pair + 1)
        axes.imshow(other, interpolation="nearest", extent=(0, image.shape[1], image.shape[0], 0))
    return sheet.figure


def patches(
    parts: UInt8[np.ndarray, "images rows columns height width channels"],
    first: int,
    captions: Sequence[str],
    title: str,
    subtitle: str,
) -> Figure:
    """Returns the images and, beside each, its patches with gaps, numbered as tokens from `first` on."""
    count, rows, columns, height, width = parts.shape[:5]
    tiles = parts.reshape(count, rows * columns, height, width, -1)
    sheets = [_mosaic(np.stack([rgb(tile) for tile in image]) / 255, columns) for image in tiles]
    images = parts.swapaxes(2, 3).reshape(count, rows * height, columns * width, -1)
    figure = _pairs(images, np.stack(sheets), captions, title, subtitle)
    across = max(1, math.ceil(columns / 8)) if count == 1 else columns  # numbers only where there is room for them
    down = max(1, math.ceil(rows / 8))
    size = (rows * height, columns * width), _mosaic_size(tiles.shape[1:4], columns)
    for axes in figure.axes[1::2]:
        for row in range(0, rows, down):
            for column in range(0, columns, across):
                corner = [k * (side + _gap(height)) for k, side in ((row, height), (column, width))]
                y, x = (pixel * full / drawn for pixel, full, drawn in zip(corner, *size, strict=True))
                box = {"facecolor": "white", "alpha": 0.75, "pad": 0.4, "linewidth": 0}
                text = {"size": 6 if count == 1 else 5, "va": "top", "ha": "left", "bbox": box}
                axes.text(x, y, str(first + row * columns + column), **text)
    return figure


def filters(
    components: Float[np.ndarray, "components height width channels"],
    kernels: Float[np.ndarray, "kernels height width channels"],
    variance: Float[np.ndarray, " components"],
    num_kernels: int,
    title: str,
    subtitle: str,
) -> Figure:
    """Returns principal components and kernels, of `num_kernels`; each is scaled by its largest entry."""
    panels = [(components, 7, f"{len(components)} principal components, {100 * variance.sum():.0f} % of the variance")]
    some = "all" if len(kernels) == num_kernels else "of the largest norm,"
    panels.append((kernels, 14, f"kernels: {some} {len(kernels)} of {num_kernels}"))
    rows = max(math.ceil(len(components) / 7), math.ceil(len(kernels) / 14) / 2)
    sheet = Sheet(1, 2, (5.4, 5.2 * rows / 7), title, subtitle, lines=1)
    for column, (tiles, per_row, caption) in enumerate(panels):
        axes = sheet.tile(0, column, caption)
        scaled = 0.5 + tiles / (2 * np.maximum(np.abs(tiles).max(axis=(1, 2, 3), keepdims=True), 1e-30))
        axes.imshow(_mosaic(scaled, per_row), interpolation="nearest", cmap="gray", vmin=0, vmax=1)
        axes.set_anchor("NW")
    return sheet.figure


def _mosaic(tiles: Float[np.ndarray, "tiles height width channels"], per_row: int) -> np.ndarray:
    """Returns tiles in rows with gaps between them, [height, width, 3]."""
    gap, (height, width) = _gap(tiles.shape[1]), tiles.shape[1:3]
    canvas = np.full((*_mosaic_size(tiles.shape[:3], per_row), 3), BETWEEN)
    for index, tile in enumerate(tiles):
        top, left = (index // per_row) * (height + gap), index % per_row * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def _mosaic_size(shape: Sequence[int], per_row: int) -> tuple[int, int]:
    """Returns height and width of a mosaic of tiles [tiles, height, width]."""
    count, height, width = shape
    gap = _gap(height)
    return math.ceil(count / per_row) * (height + gap) - gap, min(count, per_row) * (width + gap) - gap


def _gap(height: int) -> int:
    return max(1, round(height / 8))


MAX_TILES = 14  # along an axis


def positions(
    similarity: Float[np.ndarray, "rows columns rows columns"], kind: str, title: str, subtitle: str
) -> Figure:
    """Returns a tile for each position, at its place: how it is related to all positions."""
    rows, columns = similarity.shape[:2]
    chosen = [np.unique(np.linspace(0, size - 1, min(size, MAX_TILES)).round().astype(int)) for size in (rows, columns)]
    gap = max(1, round(rows / 10))
    pitch = rows + gap, columns + gap
    canvas = np.full((len(chosen[0]) * pitch[0] - gap, len(chosen[1]) * pitch[1] - gap), np.nan)
    for i, row in enumerate(chosen[0]):
        for j, column in enumerate(chosen[1]):
            top, left = i * pitch[0], j * pitch[1]
            canvas[top : top + rows, left : left + columns] = similarity[row, column]
    side = 4.6
    tile = side * min(1.0, canvas.shape[1] / canvas.shape[0]), side * min(1.0, canvas.shape[0] / canvas.shape[1])
    sheet = Sheet(1, 1, (tile[0] + 0.5, tile[1] + 0.4), title, subtitle, bar=True)
    axes = sheet.box(MARGIN + 0.5, sheet.top, *tile)
    low, high = float(similarity.min()), float(similarity.max())
    axes.imshow(canvas, cmap=SEQUENTIAL, vmin=low, vmax=high, interpolation="nearest")
    for index, (size, set_ticks) in enumerate(zip(pitch, (axes.set_yticks, axes.set_xticks), strict=True)):
        centres = [k * size + (size - gap - 1) / 2 for k in range(len(chosen[index]))]
        set_ticks(centres, [str(one) for one in chosen[index]], size=TEXT - 1)
    axes.tick_params(length=0)
    axes.set_xlabel("column of the patch", size=TEXT)
    axes.set_ylabel("row of the patch", size=TEXT)
    sheet.bar(kind, SEQUENTIAL, low, high)
    return sheet.figure


def distance(found: Float[np.ndarray, "depth heads"], uniform: float, title: str, subtitle: str) -> Figure:
    """Returns the distances of all heads against depth, with their mean, and that of uniform attention."""
    depth, heads = found.shape
    sheet = Sheet(1, 1, (6.2, 3.8), title, subtitle)
    axes = sheet.box(MARGIN + 0.5, sheet.top + 0.02, 5.6, 3.3, ticks=True)
    layers = np.arange(depth)
    axes.axhline(uniform, color="0.5", linestyle="--", linewidth=1, label=f"uniform attention: {uniform:.1f}")
    axes.plot(np.repeat(layers, heads), found.ravel(), "o", color="#0072b2", alpha=0.55, markersize=4.5, label="a head")
    axes.plot(layers, found.mean(axis=1), "-", color="#d55e00", linewidth=2, label="mean over heads")
    axes.set_xticks(layers if depth <= 16 else layers[:: math.ceil(depth / 12)])
    axes.set_ylim(0, 1.08 * max(uniform, float(found.max())))
    axes.set_xlabel("layer", size=TEXT)
    axes.set_ylabel("mean attention distance (pixels)", size=TEXT)
    axes.tick_params(labelsize=TEXT - 1)
    axes.legend(fontsize=TEXT - 1, frameon=False, loc="lower right")
    return sheet.figure


def masks(
    images: Images,
    visible: Bool[np.ndarray, "rows columns"],
    allowed: Bool[np.ndarray, "tokens tokens"],
    without: Float[np.ndarray, "images tokens tokens"],
    found: Float[np.ndarray, "images tokens tokens"],
    captions: Sequence[str],
    masked: Sequence[str],
    patch: tuple[int, int],
    title: str,
    subtitle: str,
) -> Figure:
    """Returns a row per image: the image, what a query may attend to, the mask, the attention without and with it."""
    tile = _tile(images, 5)
    lines = max(caption.count("\n") + 1 for caption in captions)
    sheet = Sheet(len(images), 5, tile, title, subtitle, max(lines, 2), bar=True)
    for row, image in enumerate(images):
        _show(sheet.tile(row, 0, captions[row]), image)
        size = image.shape[0] // visible.shape[0], image.shape[1] // visible.shape[1]
        is_visible = visible.repeat(size[0], 0).repeat(size[1], 1)[..., None]
        line = f"\n{masked[row]} with mask" if masked else ""
        shown = np.where(is_visible, rgb(image), np.uint8(128))
        _show(sheet.tile(row, 1, f"keys of the outlined patch{line}"), shown, visible.shape, patch)
        axes = sheet.tile(row, 2, "mask: white = may attend")
        axes.imshow(allowed, cmap="gray", interpolation="nearest", vmin=0)
        for spine in axes.spines.values():
            spine.set(visible=True, color="0.6", linewidth=0.6)
        high = max(float(np.percentile(found[row], 99.5)), np.finfo(np.float32).tiny)
        for column, (values, heading) in enumerate(
            ((without[row], "without mask"), (found[row], "with mask")), start=3
        ):
            axes = sheet.tile(row, column, f"attention {heading}")
            axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=high, interpolation="nearest")
    sheet.bar("weight / its 99.5th percentile with mask", SEQUENTIAL)
    return sheet.figure
