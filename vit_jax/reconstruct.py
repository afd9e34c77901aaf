"""The command: python -m vit_jax.reconstruct --workdir=DIR [--out=FILE.png] [--count=8]."""

import argparse
import sys
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from vit_jax import commands
from vit_jax.errors import UserError

DESCRIPTION = """\
Draws what a masked autoencoder makes of hidden patches: in the first row images of a split, in the second what the
encoder sees of them, in the third its reconstruction, with the patches that it saw as they are.

  python -m vit_jax.reconstruct --workdir=runs/pretrain-mae --out=reconstructions.png
  python -m vit_jax.reconstruct --workdir=runs/pretrain-mae --split=train --count=12

The patches are hidden as in evaluation. Where the model was trained on pixels that are normalised within their patch
(decoder.normalize_patches), the true patch's own mean and standard deviation turn them into pixels again, as the
published demonstration does: brightness and contrast of a hidden patch are then not the model's.
"""

TILE = 96  # pixels of a tile's side, at least
GAP = 6
HIDDEN = 128  # grey


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's flags; --help and mistakes end the process, the latter with status 2."""
    parser = commands.parser("reconstruct", DESCRIPTION)
    commands.add_flags(parser)
    parser.add_argument("--out", metavar="PNG", help="the file to write (default: DIR/reconstructions.png)")
    parser.add_argument("--count", type=int, default=8, help="images, from the split's first (default: %(default)s)")
    return parser.parse_args(arguments)


def reconstruct(
    trained: commands.Trained, split: str, count: int
) -> tuple[UInt8[np.ndarray, "rows count height width channels"], float]:
    """Images, what is seen of them, and what is made of it, in 8 bits; and the mean loss over them, as in evaluation.

    Raises:
        UserError: the run is that of no masked autoencoder.
    """
    import jax
    import jax.numpy as jnp

    from vit_jax.models.masked_autoencoder import MaskedAutoencoder
    from vit_jax.models.patches import patchify, unpatchify
    from vit_jax.objectives import masked

    run, parameters = trained.run, trained.state.for_evaluation()
    if not isinstance(run.module, MaskedAutoencoder):
        raise UserError(
            f"{trained.folder} is a run of objective {run.config.train.objective!r}, which has nothing to draw\n"
            "  train one with --config.train.objective=masked_autoencoder, as configs/pretrain.py:mae does"
        )
    source, size = run.sources[split], run.module.backbone.patch_size
    images = source.read(np.arange(count))

    def predict(images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        inputs = run.augment.normalize(images)
        patches = inputs if inputs.ndim == 3 else patchify(inputs, size)
        outputs, hidden = run.module.apply({"params": parameters}, inputs, masked.evaluation_keys(jnp.arange(count)))
        loss = masked.hidden_mean(run.objective.each(run.module, outputs, patches)["loss"], hidden).mean()
        return unpatchify(run.objective.pixels(outputs, patches), size, run.image_shape[:2]), hidden, loss

    pixels, hidden, loss = jax.device_get(jax.jit(predict)(jnp.asarray(images)))
    told = np.clip(np.round(255 * (pixels * np.float32(source.std) + np.float32(source.mean))), 0, 255).astype(np.uint8)
    unseen = _of_pixels(hidden, size, run.image_shape[:2])
    return np.stack([images, np.where(unseen, np.uint8(HIDDEN), images), np.where(unseen, told, images)]), float(loss)


def _of_pixels(
    hidden: Bool[np.ndarray, "count patches"], size: int, image_size: tuple[int, int]
) -> Bool[np.ndarray, "count height width 1"]:
    """Of patches, for each of their pixels."""
    rows, columns = image_size[0] // size, image_size[1] // size
    return hidden.reshape(-1, rows, columns).repeat(size, 1).repeat(size, 2)[..., None]


def sheet(
    rows: UInt8[np.ndarray, "rows count height width channels"],
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """The images in rows, enlarged without smoothing, on white."""
    factor = -(-TILE // max(rows.shape[2:4]))
    tiles = rows.repeat(factor, 2).repeat(factor, 3)
    count, across, height, width = tiles.shape[:4]
    canvas = np.full((GAP + count * (height + GAP), GAP + across * (width + GAP), 3), 255, np.uint8)
    for row in range(count):
        for column in range(across):
            top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
            canvas[top : top + height, left : left + width] = tiles[row, column][..., :3]
    return canvas


def draw(flags: argparse.Namespace) -> str:
    """Writes the picture; returns a line that says what and where.

    Raises:
        UserError: as `commands.open_run` and `reconstruct`; or more images than there are, or a file that cannot be
            written.
    """
    from PIL import Image

    trained = commands.open_run(flags)
    there = len(trained.run.sources[flags.split])
    if not 1 <= flags.count <= there:
        raise UserError(f"--count={flags.count}\n  allowed: 1 to {there:,}, the images of {flags.split}")
    rows, loss = reconstruct(trained, flags.split, flags.count)
    out = Path(flags.out).expanduser() if flags.out else trained.folder / "reconstructions.png"
    drawn = sheet(rows)
    try:
        Image.fromarray(drawn).save(out, optimize=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--out={out} cannot be written: {error}") from error
    step = int(trained.state.step)
    return f"{flags.count} images of {flags.split} at step {step:,}, loss {loss:.4f} on them: {out}"


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    flags = parse(arguments)
    return commands.finish(lambda: print(draw(flags)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
