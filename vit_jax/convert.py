"""The command: python -m vit_jax.convert IN OUT [--image_size=384] [--classes=N] [--patch_size=N] ..."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from vit_jax import commands, paths, terminal
from vit_jax.errors import UserError

DESCRIPTION = """\
Converts the weights of a Vision Transformer and reports what happened to every array.

  %(prog)s --list                           the published models and their names
  %(prog)s --list=b16                       those with b16 in their names
  %(prog)s runs/cifar10 cifar10/model.safetensors
  %(prog)s augreg-b16-224 vit-b16/model.safetensors
  %(prog)s facebook/dinov2-base dinov2.npz --image_size=224
  %(prog)s augreg-b16-in21k wide.safetensors --image_size=160x256 --classes=10
  %(prog)s dino.pth teacher.safetensors --prefix=teacher

IN is anything that vit_jax.weights.load reads (docs/weights.md): a file of Google, timm or Hugging Face (.npz,
.safetensors, .pth, .pt, .bin, .ckpt, .msgpack), a directory with one, a URL, the name of a published model, or a run
directory. OUT ends in .npz (Google's published names) or .safetensors (timm's names; a config.json is written to the
same directory).
"""
PLAIN = ("patch_size", "channels", "heads", "gelu", "pooling", "layer_norm_epsilon", "prefix")
KEYWORDS = (*PLAIN, "classes", "image_size")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("convert", DESCRIPTION)
    parser.add_argument("source", metavar="IN", nargs="?", help="the weights to read")
    parser.add_argument("target", metavar="OUT", nargs="?", help="the file to write")
    parser.add_argument(
        "--list",
        metavar="TEXT",
        nargs="?",
        const="",
        help="print the published models, or those with this text in their names, and end",
    )
    parser.add_argument("--to", choices=("google", "timm"), help="names of the arrays in OUT (default: by its suffix)")
    parser.add_argument(
        "--classes", metavar="N", help="number of classes; a new head of zeros if it differs from IN; none: no head"
    )
    parser.add_argument(
        "--image_size", help="pixels (384) or height x width (160x256); position embeddings are resampled"
    )
    parser.add_argument("--patch_size", type=int, metavar="N", help="pixels; the patch embedding is resampled")
    parser.add_argument("--channels", type=int, metavar="N", help="image channels; the patch embedding is adapted")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads, if IN does not specify them")
    parser.add_argument(
        "--gelu", choices=("tanh", "exact", "quick"), help="form of the GELU, if IN does not specify it"
    )
    parser.add_argument(
        "--pooling", choices=("token", "mean", "none"), help="input of the head, if IN does not specify it"
    )
    parser.add_argument("--layer_norm_epsilon", type=float, metavar="X", help="if IN does not specify it")
    parser.add_argument(
        "--prefix",
        "--tower",
        metavar="NAME",
        help="start of the names of the model to read, if IN has several: teacher, model_ema, ...",
    )
    parser.may_be_empty = ("prefix", "list")  # the model whose names have no prefix; all published models
    parser.add_argument("--step", help="checkpoint of a run directory: a step, or best (default: the newest)")
    parser.add_argument("--verbose", action="store_true", help="list all arrays, not only those that changed")
    flags = parser.parse_args(arguments)
    if flags.list is None and flags.target is None:
        parser.error("IN and OUT are required, or --list")
    return flags


def overrides(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `vit_jax.weights.load`.

    Raises:
        UserError: a flag has an invalid value.
    """
    result = {name: getattr(flags, name) for name in PLAIN if getattr(flags, name) is not None}
    if flags.classes is not None:
        if flags.classes.lower() != "none" and not flags.classes.isdecimal():
            raise UserError(f"--classes={flags.classes}\n  allowed: an integer, or none")
        result["classes"] = None if flags.classes.lower() == "none" else int(flags.classes)
    if flags.image_size is not None:
        size = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", flags.image_size)
        if size is None:
            raise UserError(
                f"--image_size={flags.image_size}\n  allowed: pixels, such as 384, or height x width, such as 160x256"
            )
        result["image_size"] = int(size[1]), int(size[2] or size[1])
    if flags.step is not None:
        result["step"] = commands.parse_step(flags.step)
    return result


@contextlib.contextmanager
def _flags_named() -> Iterator[None]:
    """Writes the keyword arguments in messages of `vit_jax.weights` as the flags of this command."""
    try:
        yield
    except UserError as error:
        message = re.sub(rf"(?<![-\w.])({'|'.join(KEYWORDS)})=", r"--\1=", str(error))
        message = message.replace("--image_size=(height, width)", "--image_size=HEIGHTxWIDTH")
        raise UserError(message) from error


def convert(flags: argparse.Namespace) -> str:
    """Converts the weights; returns the text that the command prints.

    Raises:
        UserError: IN cannot be read, or the format of OUT cannot express its model.
    """
    options = overrides(flags)
    from vit_jax import weights
    from vit_jax.weights.save import format_of

    paths.check_source(flags.source, "IN")
    commands.start_jax()
    target = paths.expand(flags.target, "OUT")
    format_of(target, flags.to)
    model, parameters, report = weights.load(flags.source, **options)
    if os.path.exists(target) and os.path.exists(report.source) and os.path.samefile(report.source, target):
        raise UserError(f"{target} is both IN and OUT, and what is not converted would be lost\n  give another OUT")
    has_same_channels = report.statistics is not None and len(report.statistics[0]) == report.channels
    has_same_classes = report.class_names is not None and len(report.class_names) == model.classes
    notes = weights.save(
        target,
        model,
        parameters,
        report.image_size,
        report.channels,
        statistics=report.statistics if has_same_channels else None,
        class_names=report.class_names if has_same_classes else None,
        evaluation=report.evaluation,
    )
    return "\n".join([report.table(flags.verbose), f"written: {target}", *(f"note: {note}" for note in notes)])


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""

    def run() -> None:
        flags = parse(arguments)
        if flags.list is None:
            with _flags_named():
                terminal.say(convert(flags))
        else:
            from vit_jax.weights import published

            terminal.output(published.table(flags.list))

    return commands.finish(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
