"""The command: python -m vit_jax.convert IN OUT [--image_size=384] [--classes=N] [--patch_size=N] [--verbose]."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from vit_jax import commands
from vit_jax.errors import UserError

DESCRIPTION = """\
Converts the weights of a Vision Transformer, and says what became of every array.

  python -m vit_jax.convert ViT-B_16.npz vit-b16/model.safetensors
  python -m vit_jax.convert facebook/dinov2-base dinov2.npz --image_size=224
  python -m vit_jax.convert runs/cifar10 cifar10.npz --verbose
  python -m vit_jax.convert ViT-B_16.npz wide.safetensors --image_size=160x256 --classes=10

IN is what vit_jax.weights.load reads (docs/weights.md): a .npz of Google's, a .safetensors of timm's or Hugging Face's,
a folder of one, a URL, a published model's name, or the workdir of a run. OUT ends in .npz (Google's published naming)
or .safetensors (timm's naming; its config.json is written beside it).
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's flags; --help and mistakes end the process, the latter with status 2."""
    parser = commands.parser("convert", DESCRIPTION)
    parser.add_argument("source", metavar="IN", help="what to read")
    parser.add_argument("target", metavar="OUT", help="the file to write")
    parser.add_argument("--to", choices=("google", "timm"), help="OUT's naming (default: as its ending says)")
    parser.add_argument("--classes", metavar="N", help="a new zero head where the number is another; none: no head")
    parser.add_argument("--image_size", help="pixels, as 384, or height x width, as 160x256: positions are resampled")
    parser.add_argument("--patch_size", type=int, metavar="N", help="pixels: the patches' kernel is resampled")
    parser.add_argument("--channels", type=int, metavar="N", help="values a pixel: the first layer's kernel is adapted")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads, where the file does not tell")
    parser.add_argument("--gelu", choices=("tanh", "exact"), help="form of the GELU, where the file does not tell")
    parser.add_argument(
        "--pooling", choices=("token", "mean", "none"), help="what the head reads, where the file does not tell"
    )
    parser.add_argument("--layer_norm_epsilon", type=float, metavar="X", help="where the file does not tell")
    parser.add_argument("--step", help="of a workdir: a number, or best (default: the newest)")
    parser.add_argument("--verbose", action="store_true", help="list every array, not only what was changed")
    return parser.parse_args(arguments)


def overrides(flags: argparse.Namespace) -> dict[str, Any]:
    """What `vit_jax.weights.load` is asked for.

    Raises:
        UserError: a flag's value is none that it can have.
    """
    plain = ("patch_size", "channels", "heads", "gelu", "pooling", "layer_norm_epsilon")
    asked = {name: getattr(flags, name) for name in plain if getattr(flags, name) is not None}
    if flags.classes is not None:
        if flags.classes.lower() != "none" and not flags.classes.isdecimal():
            raise UserError(f"--classes={flags.classes}\n  allowed: a whole number, or none")
        asked["classes"] = None if flags.classes.lower() == "none" else int(flags.classes)
    if flags.image_size is not None:
        size = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", flags.image_size)
        if size is None:
            raise UserError(
                f"--image_size={flags.image_size}\n  allowed: pixels, as 384, or height x width, as 160x256"
            )
        asked["image_size"] = int(size[1]), int(size[2] or size[1])
    if flags.step is not None:
        asked["step"] = commands.step_of(flags.step)
    return asked


def convert(flags: argparse.Namespace) -> str:
    """Reads, writes, and returns what the command prints.

    Raises:
        UserError: IN cannot be read, or its model has what OUT has no place for.
    """
    asked = overrides(flags)
    from vit_jax import weights
    from vit_jax.weights.save import format_of

    target = Path(flags.target).expanduser()
    format_of(target, flags.to)
    model, parameters, report = weights.load(flags.source, **asked)
    notes = weights.save(target, model, parameters, report.image_size, report.channels)
    return "\n".join([report.table(flags.verbose), f"written: {target}", *(f"note: {note}" for note in notes)])


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    flags = parse(arguments)
    return commands.finish(lambda: print(convert(flags)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
