"""The command `python -m vit_jax.reconstruct`."""

import argparse
import sys

import numpy as np
from jaxtyping import Bool, UInt8

from vit_jax import commands, paths, terminal
from vit_jax.errors import UserError

DESCRIPTION = """\
Draws the reconstructions of a masked autoencoder as a PNG file with three rows: images of a split, the patches that the
encoder sees, and the reconstructions of the hidden patches together with the visible ones.

  %(prog)s --workdir=runs/pretrain-mae --out=reconstructions.png
  %(prog)s --workdir=runs/pretrain-mae --split=train --count=12

The same patches are hidden as in evaluation. If the model predicts normalized patches (decoder.normalize_patches), its
outputs are converted to pixels with the mean and standard deviation of the true patch, as in the demonstration of the
original authors: brightness and contrast of a hidden patch are then not predictions of the model.
"""

MIN_TILE = 96  # side of an enlarged image, pixels
GAP = 6
GREY = 128  # of hidden patches


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("reconstruct", DESCRIPTION)
    commands.add_flags(parser)
    parser.add_argument("--out", metavar="PNG", help="output file (default: DIR/reconstructions.png)")
    parser.add_argument(
        "--count", type=int, default=8, help="number of images, from the start of the split (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def reconstruct(
    trained: commands.Trained, split: str, count: int
) -> tuple[UInt8[np.ndarray, "rows count height width channels"], float]:
    """Returns images, visible patches and reconstructions in 8 bits; and the mean loss over them, as in evaluation.

    Raises:
        UserError: the run did not train a masked autoencoder, or its outputs are not finite.
    """
    import jax
    import jax.numpy as jnp

    from vit_jax.models.masked_autoencoder import MaskedAutoencoder
    from vit_jax.models.patches import patchify, unpatchify
    from vit_jax.objectives import masked

    run, parameters = trained.run, trained.state.for_evaluation()
    if not isinstance(run.module, MaskedAutoencoder):
        raise UserError(
            f"{trained.workdir}: config.train.objective is {run.config.train.objective!r}, which reconstructs no images"
            "\n  allowed: a run with masked_autoencoder, such as pretrain:mae"
        )
    source, size = run.sources[split], run.module.backbone.patch_size
    images = source.read(np.arange(count))

    def predict(images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        inputs = run.augment.normalize(images)
        patches = inputs if inputs.ndim == 3 else patchify(inputs, size)
        outputs, hidden = run.module.apply({"params": parameters}, inputs, masked.evaluation_keys(jnp.arange(count)))
        loss = masked.hidden_mean(run.objective.patch_metrics(run.module, outputs, patches)["loss"], hidden).mean()
        return unpatchify(run.objective.pixels(outputs, patches), size, run.image_shape[:2]), hidden, loss

    pixels, hidden, loss = jax.device_get(jax.jit(predict)(jnp.asarray(images)))
    if not np.isfinite(pixels).all():
        raise UserError(f"{trained.workdir}: the outputs of the model are not finite\n  use another --step")
    pixels = np.round(255 * (pixels * np.float32(run.augment.std) + np.float32(run.augment.mean)))
    predicted = np.clip(pixels, 0, 255).astype(np.uint8)
    is_hidden = _patches_to_pixels(hidden, size, run.image_shape[:2])
    visible = np.where(is_hidden, np.uint8(GREY), images)
    return np.stack([images, visible, np.where(is_hidden, predicted, images)]), float(loss)


def _patches_to_pixels(
    flags: Bool[np.ndarray, "count patches"], size: int, image_size: tuple[int, int]
) -> Bool[np.ndarray, "count height width 1"]:
    """Returns the flag of each patch for each of its pixels."""
    rows, columns = image_size[0] // size, image_size[1] // size
    return flags.reshape(-1, rows, columns).repeat(size, 1).repeat(size, 2)[..., None]


def sheet(
    rows: UInt8[np.ndarray, "rows count height width channels"],
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Returns rows of images as one image, each enlarged without interpolation, on white."""
    factor = -(-MIN_TILE // max(rows.shape[2:4]))
    tiles = rows.repeat(factor, 2).repeat(factor, 3)
    num_rows, num_columns, height, width = tiles.shape[:4]
    canvas = np.full((GAP + num_rows * (height + GAP), GAP + num_columns * (width + GAP), 3), 255, np.uint8)
    for row in range(num_rows):
        for column in range(num_columns):
            top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
            canvas[top : top + height, left : left + width] = tiles[row, column][..., :3]
    return canvas


def draw(flags: argparse.Namespace) -> str:
    """Writes the PNG file; returns one line about what was written.

    Raises:
        UserError: as `commands.open_run` and `reconstruct`; or the split has fewer images, or the file cannot be
            written.
    """
    from PIL import Image

    trained = commands.open_run(flags)
    num_images = len(trained.run.sources[flags.split])
    if not 1 <= flags.count <= num_images:
        raise UserError(
            f"--count is {flags.count}\n  allowed: 1 to {num_images:,}, the number of images in {flags.split}"
        )
    rows, loss = reconstruct(trained, flags.split, flags.count)
    out = paths.expand(flags.out, "--out") if flags.out else trained.workdir / "reconstructions.png"
    try:
        Image.fromarray(sheet(rows)).save(out, optimize=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--out={out} cannot be written: {error}\n  use another --out") from error
    step = int(trained.state.step)
    return f"{out}: {flags.count} images of {flags.split} at step {step:,}, loss {loss:.4f}"


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: terminal.say(draw(parse(arguments))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
