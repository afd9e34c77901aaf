"""The command: python -m vit_jax.data.show --config=FILE[:ARG] --out=batch.png, a sheet of what the model will see."""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from vit_jax import config as options
from vit_jax.errors import UserError

DESCRIPTION = """\
Draws the images that a training step sees: augmented and mixed, by the very random numbers of that step, each with its
classes and their shares.

  python -m vit_jax.data.show --config=configs/cifar10.py --out=batch.png
  python -m vit_jax.data.show --config=configs/cifar10.py --out=batch.png --step=1000 --count=64
  python -m vit_jax.data.show --config=configs/cifar10.py --out=patches.png --patches --count=8
  python -m vit_jax.data.show --config=configs/cifar10.py --out=batch.png --config.augment.policy=rand_augment
"""

TILE = 96  # pixels of a tile's side, at least
LINE = 12  # pixels of a line of text
GAP = 6


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's flags, and the overrides as 'section.key=value'; mistakes end the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.data.show",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", required=True, help="as for training")
    parser.add_argument("--out", metavar="PNG", required=True, type=Path, help="the file to write")
    parser.add_argument("--step", type=int, default=0, help="the step whose batch is drawn (default: %(default)s)")
    parser.add_argument("--count", type=int, default=32, help="images of it (default: %(default)s)")
    parser.add_argument("--patches", action="store_true", help="cut into the model's patches")
    overrides = [argument.removeprefix("--config.") for argument in arguments if argument.startswith("--config.")]
    return parser.parse_args([a for a in arguments if not a.startswith("--config.")]), overrides


def batch(
    config, step: int
) -> tuple[UInt8[np.ndarray, "batch height width channels"], Float[np.ndarray, "batch classes"], tuple[str, ...], int]:
    """The images of a step as the model gets them, in 8 bits again; class shares, class names, the patch size."""
    import dataclasses

    import jax
    import optax

    from vit_jax.data import order, pipeline
    from vit_jax.training import setup

    mesh = setup.check_data(config, [config.data.train])
    config = config.copy_and_resolve_references()
    config.model.attention_kernel = "plain"  # the model is not applied: nothing is to be timed for it
    run = setup.build(config, mesh, {"train": config.data.train}, training=False)
    source, train = run.sources["train"], config.train
    repeats = config.augment.repeats
    indices = pipeline.train_indices(train.seed, train.batch_size, step, 1, 1, len(source), repeats)[0]
    key, _ = order.keys(train.seed, step)
    augment = dataclasses.replace(run.augment, arrange=None, dtype="float32")
    targets = optax.smooth_labels(
        jax.nn.one_hot(source.labels[indices], len(source.class_names)), train.label_smoothing
    )
    inputs, shares = jax.jit(augment)(key, source.read(indices), targets)
    pixels = 255 * (np.asarray(inputs) * np.array(augment.std, np.float32) + np.array(augment.mean, np.float32))
    return (
        np.clip(np.round(pixels), 0, 255).astype(np.uint8),
        np.asarray(shares),
        source.class_names,
        run.model.patch_size,
    )


def sheet(
    images: UInt8[np.ndarray, "count height width channels"], captions: list[list[str]], patch_size: int | None
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """The images in rows, enlarged without smoothing, lines of text below each; with gaps between patches if given."""
    from PIL import Image, ImageDraw, ImageFont

    tiles = [_tile(image, patch_size) for image in images]
    height, width = tiles[0].shape[:2]
    columns = min(len(tiles), max(1, min(8, 1280 // (width + GAP))))
    rows = math.ceil(len(tiles) / columns)
    below = LINE * max(map(len, captions)) + GAP
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + below) + GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(LINE - 2)
    for place, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        left, top = GAP + place % columns * (width + GAP), GAP + place // columns * (height + below)
        canvas.paste(Image.fromarray(tile), (left, top))
        for number, line in enumerate(lines):
            pen.text((left, top + height + LINE * number), _fit(pen, font, line, width), fill="black", font=font)
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


def _fit(pen, font, text: str, width: int) -> str:
    while text and pen.textlength(text, font=font) > width:
        text = text[:-1]
    return text


def caption(shares: Float[np.ndarray, " classes"], names: tuple[str, ...], smoothed: float) -> list[str]:
    """One or two lines: the classes that have more than label smoothing gives every class, and their shares."""
    found = [k for k in np.argsort(-shares, kind="stable")[:2] if shares[k] > smoothed / len(names) + 1e-3]
    return [f"{100 * shares[k]:.0f}% {names[k]}" for k in found]


def show(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Draws the sheet and writes it.

    Raises:
        UserError: a config, data or a file that will not do.
    """
    from PIL import Image

    from vit_jax.training import init_from

    config = options.load(flags.config)
    for assignment in overrides:
        options.override(config, assignment)
    init_from.take_model(config)
    options.check(config)
    if config.train.batch_size == "auto":
        raise UserError("config.train.batch_size is 'auto'\n  give the run's own: --config.train.batch_size=NUMBER")
    if not flags.step >= 0 or not 1 <= flags.count <= config.train.batch_size:
        raise UserError(
            f"--step={flags.step} --count={flags.count}\n"
            f"  allowed: a step of at least 0, and 1 to {config.train.batch_size} images (config.train.batch_size)"
        )
    images, shares, names, patch_size = batch(config, flags.step)
    smoothing = config.train.label_smoothing
    captions = [caption(share, names, smoothing) for share in shares[: flags.count]]
    drawn = sheet(images[: flags.count], captions, patch_size if flags.patches else None)
    try:
        Image.fromarray(drawn).save(flags.out, optimize=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--out={flags.out} cannot be written: {error}") from error
    print(f"{flags.count} images of step {flags.step}, {drawn.shape[1]}x{drawn.shape[0]} pixels: {flags.out}")


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    flags, overrides = parse(arguments)
    try:
        show(flags, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
