"""The command python -m vit_jax.preview --config=FILE[:ARG] --out=batch.png: draws the augmented images of a step."""

import argparse
import dataclasses
import math
import sys

import numpy as np
from jaxtyping import Float, UInt8

from vit_jax import commands, paths, terminal
from vit_jax.data import listing
from vit_jax.errors import UserError, one_line

DESCRIPTION = """\
Draws the images of one training step exactly as the model receives them: augmented and mixed with the random keys of
that step. Below each image are its classes and their target probabilities.

  %(prog)s --config=cifar10 --out=batch.png
  %(prog)s --config=cifar10 --out=batch.png --step=1000 --count=64
  %(prog)s --config=cifar10 --out=patches.png --patches --count=8
  %(prog)s --config=cifar10 --out=batch.png --config.augment.policy=rand_augment
"""

TILE = 96  # minimum width and height of a tile, pixels
LINE = 13  # height of a line of text, pixels
GAP = 6  # pixels between tiles


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the overrides as 'section.key=value'; exits with status 2 on a mistake."""
    overrides, rest = commands.take_overrides(arguments)
    parser = commands.parser("preview", DESCRIPTION)
    parser.add_argument("--config", metavar="CONFIG[:ARG]", required=True, help="config, as for training")
    parser.add_argument("--out", metavar="PNG", required=True, help="image file to write")
    parser.add_argument("--step", type=int, default=0, help="training step to draw (default: %(default)s)")
    parser.add_argument("--count", type=int, default=32, help="number of images to draw (default: %(default)s)")
    parser.add_argument("--patches", action="store_true", help="draw gaps between the model's patches")
    return parser.parse_args(rest), overrides


def batch(
    config, step: int
) -> tuple[UInt8[np.ndarray, "batch height width channels"], Float[np.ndarray, "batch classes"], tuple[str, ...], int]:
    """Returns a step's augmented images converted back to 8 bits, target probabilities, class names and patch size."""
    import jax
    import optax

    from vit_jax.data import order, pipeline
    from vit_jax.training import setup

    mesh = setup.check_data(config, [config.data.train])
    config = config.copy_and_resolve_references()
    config.model.attention_kernel = "plain"  # the model is not applied, so no attention backend has to be timed
    run = setup.assemble(config, mesh, setup.load_sources(config, {"train": config.data.train}), training=False)
    source, train = run.sources["train"], config.train
    repeats = config.augment.repeats
    indices = pipeline.train_indices(train.seed, train.batch_size, step, 1, 1, len(source), repeats)[0]
    key, _ = order.keys(train.seed, step)
    augment = dataclasses.replace(run.augment, arrange=None, dtype="float32")
    targets = optax.smooth_labels(
        jax.nn.one_hot(source.labels[indices], len(source.class_names)), train.label_smoothing
    )
    inputs, probabilities = jax.jit(augment)(key, source.read(indices), targets)
    pixels = 255 * (np.asarray(inputs) * np.array(augment.std, np.float32) + np.array(augment.mean, np.float32))
    return (
        np.clip(np.round(pixels), 0, 255).astype(np.uint8),
        np.asarray(probabilities),
        source.class_names,
        run.model.patch_size,
    )


def sheet(
    images: UInt8[np.ndarray, "count height width channels"], captions: list[list[str]], patch_size: int | None
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Returns one image with all `images` in rows, enlarged by pixel repetition, with their captions below.

    With a `patch_size`, white lines separate the patches.
    """
    from PIL import Image, ImageDraw

    from vit_jax import fonts

    tiles = [_tile(image, patch_size) for image in images]
    height, width = tiles[0].shape[:2]
    columns = min(len(tiles), max(1, min(8, 1280 // (width + GAP))))
    rows = math.ceil(len(tiles) / columns)
    below = LINE * max(map(len, captions)) + GAP
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + below) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        left, top = GAP + index % columns * (width + GAP), GAP + index // columns * (height + below)
        canvas.paste(Image.fromarray(tile), (left, top))
        for row, line in enumerate(lines):
            font, line = fonts.fit(line, LINE - 2)
            pen.text((left, top + height + LINE * row), _truncate(pen, font, line, width), fill="black", font=font)
    return np.asarray(canvas)


def _tile(image: UInt8[np.ndarray, "height width channels"], patch_size: int | None) -> UInt8[np.ndarray, "h w 3"]:
    image = np.broadcast_to(image[..., :3], (*image.shape[:2], 3))
    factor = math.ceil(TILE / max(image.shape[:2]))
    tile = image.repeat(factor, 0).repeat(factor, 1)
    if patch_size is None:
        return tile
    for axis in (0, 1):
        cuts = np.arange(patch_size * factor, tile.shape[axis], patch_size * factor)
        tile = np.insert(tile, np.repeat(cuts, 2), 255, axis=axis)
    return tile


def _truncate(pen, font, text: str, width: int) -> str:
    while text and pen.textlength(text, font=font) > width:
        text = text[:-1]
    return text


def caption(probabilities: Float[np.ndarray, " classes"], names: tuple[str, ...], smoothing: float) -> list[str]:
    """Returns up to two lines: the most probable classes above what label smoothing gives to every class."""
    minimum = smoothing / len(names) + 1e-3
    found = [k for k in np.argsort(-probabilities, kind="stable")[:2] if probabilities[k] > minimum]
    return [f"{100 * probabilities[k]:.0f} %  {listing.printable(names[k])}" for k in found]


def preview(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Draws the sheet and writes it to `flags.out`.

    Raises:
        UserError: a wrong flag or config, unreadable data, or a file that cannot be written.
    """
    from PIL import Image

    out = paths.expand(flags.out, "--out")
    if out.suffix.lower() not in Image.registered_extensions() or out.is_dir() or not out.parent.is_dir():
        raise UserError(
            f"--out={flags.out} cannot be written\n  use a file name that ends in .png, in an existing directory"
        )
    config = commands.make_config(flags.config, overrides)
    from vit_jax.training import multi_seed  # imports JAX, which --help must not wait for

    if config.data.features is not None:
        raise UserError(
            "config.data.features: a run on stored features reads no images\n  draw a config without data.features"
        )
    if config.train.batch_size == "auto":
        raise UserError(
            "config.train.batch_size is 'auto', which depends on the device\n"
            "  pass the batch size of the run: --config.train.batch_size=NUMBER"
        )
    if not flags.step >= 0 or not 1 <= flags.count <= config.train.batch_size:
        raise UserError(
            f"--step={flags.step} --count={flags.count}\n"
            f"  allowed: a step of at least 0, and 1 to {config.train.batch_size} images (config.train.batch_size)"
        )
    seeds = multi_seed.seeds_of(config)
    config.train.seed = seeds[0] if seeds else config.train.seed
    images, probabilities, names, patch_size = batch(config, flags.step)
    smoothing = config.train.label_smoothing
    captions = [caption(row, names, smoothing) for row in probabilities[: flags.count]]
    drawn = sheet(images[: flags.count], captions, patch_size if flags.patches else None)
    try:
        Image.fromarray(drawn).save(out, optimize=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--out={flags.out} cannot be written: {one_line(error)}\n  use a file name that ends in .png"
        ) from error
    which = f"step {flags.step}" + (f" of seed {seeds[0]}" if seeds else "")
    terminal.say(f"wrote {flags.out}: {flags.count} images of {which}, {drawn.shape[1]}x{drawn.shape[0]} pixels")


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: preview(*parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
