"""The command: python -m vit_jax.summary VARIANT [--image_size=224] [--classes=1000] [--batch_size=N]."""

import argparse
import re
import sys
from typing import TYPE_CHECKING

from vit_jax import commands, terminal
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.models.summary import Layer

DESCRIPTION = """\
Prints a model's layers and its cost: every layer's output shape for one image, its parameters and the floating-point
operations of its forward pass (matmuls and convolutions; a multiply-add is two operations).

  %(prog)s B/16
  %(prog)s Ti/4 --image_size=32 --classes=10
  %(prog)s R50+L/32 --image_size=384x512 --batch_size=64
  %(prog)s B/16 --set pooling=map --set class_token=False --set registers=4

VARIANT is a size (Ti, S, B, L, H), a slash and a patch size in pixels, or a hybrid: R+Ti/16, R26+S/32, R26+B/32,
R50+B/16, R50+L/32. --set sets any other field of the model (see docs/models.md).
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the flags; exits for --help and, with status 2, for mistakes."""
    parser = commands.parser("summary", DESCRIPTION)
    parser.add_argument("variant", metavar="VARIANT", help="name of a model, such as B/16")
    parser.add_argument("--image_size", default="224", help="pixels: 224, or height x width: 224x320 (default: 224)")
    parser.add_argument("--channels", type=int, default=3, help="channels per pixel (default: 3)")
    parser.add_argument("--classes", type=int, default=1000, help="number of classes; 0: no head (default: 1000)")
    parser.add_argument("--batch_size", type=int, default=128, help="batch size for the memory estimate (default: 128)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype (default: float32)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="set another model field")
    return parser.parse_args(arguments)


def summarise(flags: argparse.Namespace) -> str:
    """Returns the text that the command prints.

    Raises:
        UserError: unknown variant or field, contradictory fields, or an image size that does not fit the patches.
    """
    import jax.numpy as jnp

    from vit_jax.models import summary, variants
    from vit_jax.models.vit import VisionTransformer

    commands.start_jax()
    size = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", flags.image_size)
    if size is None:
        raise UserError(f"--image_size={flags.image_size}\n  allowed: pixels, such as 224 or 224x320 (height x width)")
    for name, minimum in (("channels", 1), ("classes", 0), ("batch_size", 1)):
        if getattr(flags, name) < minimum:
            raise UserError(f"--{name}={getattr(flags, name)}\n  allowed: an integer of at least {minimum}")
    image_size = int(size[1]), int(size[2] or size[1])
    try:
        fields = {**variants.fields(flags.variant), **_fields(flags.set)}
        model = VisionTransformer(classes=flags.classes or None, dtype=jnp.dtype(flags.dtype), **fields)
        layers = summary.layers(model, image_size, flags.channels)
        flops = summary.forward_flops(model, image_size, flags.channels)
        memory = summary.training_bytes(model, image_size, flags.channels, flags.batch_size)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    title = f"{flags.variant}, {image_size[0]}x{image_size[1]} pixels, {flags.channels} channels, {flags.dtype}"
    return "\n".join([title, "", *_table(layers), "", *_totals(layers, flops, memory, flags.batch_size)])


def _fields(assignments: list[str]) -> dict[str, object]:
    """Returns fields of the model from 'name=value', checked against the type of the field's default."""
    from ast import literal_eval

    from vit_jax.models.vit import VisionTransformer

    known = [
        name for name in VisionTransformer.__dataclass_fields__ if name not in ("parent", "name", "classes", "dtype")
    ]
    fields = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in known:
            raise UserError(f"--set {assignment}: the model has no such field\n  known: {', '.join(known)}")
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        default = VisionTransformer.__dataclass_fields__[name].default
        allowed = (int, float) if isinstance(default, float) else type(default)
        if isinstance(default, bool | str | int | float) and not isinstance(value, allowed):
            raise UserError(f"--set {assignment}: not of type {type(default).__name__}\n  default: {default!r}")
        fields[name] = value
    return fields


def _table(layers: list["Layer"]) -> list[str]:
    """Returns one line per layer; the parts of a block are listed for the first block only."""
    rows = [("layer", "output", "parameters", "MFLOP")]
    for layer in layers:
        depth = layer.name.count("/")
        if depth == 2 and not layer.name.startswith(("encoder/block_0/", "encoder/blocks/")):
            continue
        name = "    " + layer.name.rsplit("/", 1)[1] if depth == 2 else layer.name
        shape = " x ".join(str(size) for size in layer.shape)
        rows.append((name, shape, f"{layer.parameters:,}", f"{layer.flops / 1e6:,.1f}" if layer.flops else "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {parameters:>{widths[2]}}  {flops:>{widths[3]}}"
        for name, shape, parameters, flops in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _totals(layers: list["Layer"], flops: int, memory: dict[str, int], batch_size: int) -> list[str]:
    modules = [layer for layer in layers if layer.name.count("/") < 2]
    total = sum(layer.parameters for layer in modules)
    tables = sum(layer.parameters for layer in modules if layer.name in ("class_token", "registers", "positions"))
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.items())
    return [
        f"parameters              {total:,}",
        f"  of modules            {total - tables:,}",
        f"  of other tables       {tables:,} (tokens and positions)",
        f"forward, per image      {flops / 1e9:.4g} GFLOP",
        f"training, per image     {3 * flops / 1e9:.4g} GFLOP (three times forward)",
        f"training, batch {batch_size:<7} {sum(memory.values()) / 2**20:,.0f} MiB (estimate, with Adam): {parts}",
    ]


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: terminal.output(summarise(parse(arguments))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
