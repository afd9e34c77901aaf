"""The command `python -m vit_jax.look`; from Python: `look.draw`."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import atomic, commands, paths, terminal
from vit_jax.errors import UserError, few, one_line

if TYPE_CHECKING:
    from vit_jax.classifier import Classifier
    from vit_jax.data.user_images import Image
    from vit_jax.visualization.figures import Picture

DESCRIPTION = """\
Draws what a model learned.

  %(prog)s --workdir=runs/digits --what=rollout
  %(prog)s --workdir=runs/photos --what=attention --layer=5 --patch=3,4 --out=attention.png holiday.jpg
  %(prog)s --init=dinov2-s14 --what=features --out=features.pdf album/
  %(prog)s --init=augreg-b16-224 --what=relevance --class=goldfish fish.jpg

--what is one of

  filters      the filters of the patch embedding: their principal components, and kernels
  positions    the similarity of each position embedding with all others
  distance     the mean attention distance of each head against depth, over many images
  attention    the attention of each head of a layer, over the images
  rollout      attention through all layers, over the images
  relevance    the patches that speak for a class: attention weighted by its gradients
  features     the first three principal components of the patches' features as colors
  patches      the images as the model reads them
  masks        an attention mask at work

Images can have any size and any format that Pillow reads; a directory stands for all images below it. Without images,
the first 12 of the run's test split are drawn (--count), and 128 of them are used for distance. Layers, heads and
patches are counted from 0. docs/looking.md explains the pictures.

The suffix of --out is the format: .png, .svg, .pdf, ...; .npz for the arrays in place of the picture.
"""
DEFAULT_WHAT = "rollout"
COUNT, COUNT_DISTANCE = 12, 128
MAX_DRAWN = 48  # images; distance takes all of them
OPTIONS = {"layer": "layer", "patch": "patch", "class_name": "class", "mask": "mask"}  # option of a picture -> flag
ARRAYS = ".npz"


def __getattr__(name: str) -> Any:
    """Imports `Picture` when it is first used, so that --help does not wait for JAX."""
    if name == "Picture":
        from vit_jax.visualization.figures import Picture

        return Picture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def draw(
    what: str,
    source: "str | Path | Classifier",
    images: "Image | Iterable[Image] | None" = None,
    **options: Any,
) -> "Picture":
    """Returns a picture of a model: `figure`, of matplotlib, and the `arrays` that it shows.

    Args:
        what: as --what of the command.
        source: a run directory; weights: a file, URL or name; or a `Classifier`.
        images: as for `Predictor`: paths, directories, arrays, ...; not needed for 'filters' and 'positions'.
        options: `layer`, `patch`, `class_name`, `mask`, as the functions in `visualization.pictures` document them.

    Raises:
        UserError: the model or an image cannot be read, or the picture is not defined for this model.
    """
    from vit_jax.classifier import Classifier
    from vit_jax.visualization import pictures

    pictures.check(what, options)
    model = source if isinstance(source, Classifier) else _open(source)
    pixels, names, unreadable = _read(model, images) if images is not None else (None, (), [])
    if unreadable:
        raise UserError(f"{unreadable[0]}\n  leave it out, or use another image")
    return pictures.draw(what, model, pixels, names, **options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("look", DESCRIPTION)
    parser.add_argument("images", metavar="IMAGE_OR_DIRECTORY", nargs="*", help="images to draw")
    commands.add_model_flags(parser)
    parser.add_argument("--what", default=DEFAULT_WHAT, help="the picture (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="output file (default: WHAT.png)")
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="attention, features (default: the last), masks, positions (default: the first): a layer from 0, or from "
        "the end, -1",
    )
    parser.add_argument(
        "--patch",
        metavar="ROW,COLUMN",
        help="attention, rollout: those of this patch, from 0 (default: of what the classifier reads)",
    )
    parser.add_argument(
        "--class", dest="class_name", metavar="NAME", help="relevance: for this class (default: the most probable one)"
    )
    parser.add_argument("--mask", help="masks: random, causal or local (default: random)")
    parser.add_argument(
        "--count",
        type=int,
        help=f"without images: the number of those of the split (default: {COUNT}; distance: {COUNT_DISTANCE})",
    )
    parser.add_argument("--split", help="without images: the split (default: test)")
    commands.add_classes_flags(parser)
    commands.add_image_flags(parser)
    parser.add_argument(
        "--dpi", type=int, default=150, help="dots per inch of a picture of pixels (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def look(flags: argparse.Namespace) -> int:
    """Draws the picture and writes it; returns the exit status: 1 if some images could not be read.

    Raises:
        UserError: a flag is wrong, the model cannot be read, there are no images, or the file cannot be written.
    """
    options, out = _check(flags)
    commands.start_jax()
    from vit_jax.runtime import compilation_cache
    from vit_jax.visualization import pictures

    compilation_cache.cache_compilations()
    pictures.check(flags.what, {})
    for name in options.keys() - {*pictures.options_of(flags.what)}:
        users = [what for what in pictures.KINDS if name in pictures.options_of(what)]
        raise UserError(
            f"--{OPTIONS[name]} cannot be combined with --what={flags.what}\n"
            f"  omit it; it is for {few(users, len(users))}"
        )
    is_of_parameters = flags.what in pictures.OF_PARAMETERS
    if is_of_parameters and (flags.images or flags.split or flags.count):
        unused = few(flags.images) or ("--split" if flags.split else "--count")
        raise UserError(f"--what={flags.what} needs no images\n  omit {unused}")
    listed, notes = commands.images_below(flags.images) if flags.images else (None, [])
    model = _model_of(flags)
    unreadable: list[str] = []
    if listed is not None:
        if len(listed) > MAX_DRAWN and flags.what != "distance":
            terminal.warn(f"the first {MAX_DRAWN} of {len(listed):,} images are drawn")
            listed = listed[:MAX_DRAWN]
        images, names, unreadable = _read(model, listed)
    elif is_of_parameters:
        images, names = None, ()
    else:
        images, names = _of_split(flags, model)
    for line in (*notes, *unreadable):
        terminal.warn(line)
    if images is not None and not len(images):
        raise UserError(f"none of {few(flags.images)} can be read as an image\n  use other images")
    title = flags.workdir or flags.init
    picture = pictures.draw(flags.what, model, images, names, title, **options)
    size = _write(picture, out, flags)
    terminal.say(f"wrote {out}: {flags.what} of {title}{size}")
    return 1 if unreadable else 0


def _check(flags: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Returns the options of the picture, and the path of the output.

    Raises:
        UserError: a flag has a value that is not allowed, or is of no use.
    """
    if not 30 <= flags.dpi <= 1200:
        raise UserError(f"--dpi is {flags.dpi}\n  allowed: 30 to 1200")
    for name in ("split", "count"):
        if flags.images and getattr(flags, name) is not None:
            raise UserError(f"--{name} cannot be combined with images\n  omit it, or the images")
    flags.batch_size = None
    commands.check_flags(flags, ("step", "best", "split", "count"), ("classes", "prompt", "image_size", "normalize"))
    if flags.count is not None and flags.count < 1:
        raise UserError(f"--count is {flags.count}\n  allowed: an integer of at least 1")
    options = {name: getattr(flags, name) for name in OPTIONS if getattr(flags, name) is not None}
    if flags.patch is not None:
        options["patch"] = _pair(flags.patch)
    out = paths.expand(flags.out or f"{flags.what}.png", "--out")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out={flags.out or out} cannot be written\n  use a file name in an existing directory")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"}  # which needs LaTeX and further files
    if out.suffix.lower() != ARRAYS and out.suffix.lower()[1:] not in formats:
        raise UserError(f"--out={flags.out or out} has no known format\n  allowed: .png, .svg, .pdf, ..., {ARRAYS}")
    return options, out


def _pair(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--patch={text}\n  allowed: row and column from 0, such as 3,4")
    return int(parts[0]), int(parts[1])


def _model_of(flags: argparse.Namespace) -> "Classifier":
    from vit_jax import classifier

    if flags.workdir:
        workdir, step = paths.expand(flags.workdir, "--workdir"), "best" if flags.best else flags.step
        return classifier.of_run(workdir, step, needs_head=False)
    if flags.classes or flags.prompt:
        return commands.classifier_of(flags)
    found = classifier.of_file(flags.init, None, flags.image_size, flags.normalize, needs_head=False)
    return _without_projection(flags.init, found)


def _open(source: str | Path) -> "Classifier":
    from vit_jax import backbones

    return _without_projection(source, backbones.classifier(source))


def _without_projection(source: Any, model: "Classifier") -> "Classifier":
    """Returns a model without its head if that projects onto embeddings of texts, which are no classes."""
    from vit_jax.checkpoint import run_files
    from vit_jax.weights import texts

    is_run = (Path(source) / run_files.CHECKPOINTS).is_dir()
    if model.model.classes is None or is_run or not texts.has_text(str(source)):
        return model
    parameters = {name: value for name, value in model.parameters.items() if name != "head"}
    inputs = dataclasses.replace(model.inputs, classes={})
    no_head = "its outputs are embeddings, not classes (name some: --classes=cat,dog)"
    module = model.model.clone(classes=None)
    return dataclasses.replace(model, model=module, parameters=parameters, inputs=inputs, no_head=no_head)


def _read(model: "Classifier", images: Any) -> tuple[Any, tuple[str, ...], list[str]]:
    """Returns the images as the model takes them, their names, and a line about each that cannot be read."""
    import os

    import numpy as np

    from vit_jax.data import user_images

    pixels, names, unreadable = [], [], []
    for index, image in enumerate(user_images.each_image(images)):
        one = [*user_images.expand([image])] if isinstance(image, str) else [image]
        for each in one:
            name = os.fspath(each) if isinstance(each, str | Path) else f"image {index}"
            read = model.read(each)
            if isinstance(read, str):
                unreadable.append(f"{name}: cannot be read as an image: {read}")
            else:
                pixels.append(read)
                names.append(os.path.basename(name))
    return np.stack(pixels) if pixels else np.zeros((0, *model.inputs.image_shape), np.uint8), tuple(names), unreadable


def _of_split(flags: argparse.Namespace, model: "Classifier") -> tuple[Any, tuple[str, ...]]:
    """Returns the first images of a split of the run, and their classes.

    Raises:
        UserError: there is no run, or its data is missing.
    """
    import numpy as np

    from vit_jax.training import run_directory, setup

    if not flags.workdir:
        raise UserError(f"--what={flags.what}: images are missing\n  name one or more images, or a directory of images")
    config = run_directory.trained_config(paths.expand(flags.workdir, "--workdir"))
    split = flags.split or commands.TEST
    split = config.data.get(split) if split in commands.SPLITS else split
    if split is None:
        raise UserError(f"{flags.workdir}: the run has no split {flags.split or commands.TEST}\n  use another --split")
    source = setup.load(config, split, config.data.labels)
    usual, limit = (COUNT_DISTANCE, len(source)) if flags.what == "distance" else (COUNT, MAX_DRAWN)
    count = min(flags.count or usual, limit, len(source))
    if flags.count and count < flags.count:
        terminal.warn(
            f"the first {count} of {flags.count:,} images are drawn"
            if count == limit
            else f"{flags.workdir} has {count} images"
        )
    ids = np.arange(count)
    return source.read(ids), tuple(f"true: {source.class_names[label]}" for label in source.labels[ids])


def _write(picture: "Picture", out: Path, flags: argparse.Namespace) -> str:
    """Writes a picture or its arrays; returns a few words about the size.

    Raises:
        UserError: the file cannot be written.
    """
    import numpy as np

    try:
        with atomic.replace(out) as file:
            if out.suffix.lower() == ARRAYS:
                np.savez(file, **picture.arrays)
            else:
                suffix = out.suffix[1:].lower()
                smaller = {"pil_kwargs": {"optimize": True}} if suffix == "png" else {}
                picture.figure.savefig(file, format=suffix, dpi=flags.dpi, **smaller)
    except (OSError, ValueError, RuntimeError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise UserError(f"--out={out} cannot be written: {reason}\n  use another file") from error
    if out.suffix.lower() == ARRAYS:
        return "; " + ", ".join(f"{name} {list(np.shape(array))}" for name, array in picture.arrays.items())
    width, height = (int(side * flags.dpi) for side in picture.figure.get_size_inches())
    return f", {width}x{height} pixels" if out.suffix.lower() == ".png" else ""


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: look(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
