"""What `vit-jax features --images` does: features of images without labels, and the images that are most similar."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax import atomic, commands, paths, terminal
from vit_jax.errors import UserError, few
from vit_jax.progress import Counter

if TYPE_CHECKING:
    import numpy as np

    from vit_jax.backbones import Backbone

ONLY_IMAGES = ("layers", "dense", "nearest", "csv")  # flags that only --images uses


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for images without labels."""
    parser.add_argument("--images", metavar="DIRECTORY", help="images without labels, in place of a split")
    parser.add_argument(
        "--layers",
        metavar="I,J",
        help="with --images: blocks whose outputs are the features, from 0 or, from the end, -1 (default: the last)",
    )
    parser.add_argument("--dense", action="store_true", help="with --images: also store the outputs of the patches")
    parser.add_argument(
        "--nearest", type=int, metavar="K", help="with --images: print the K most similar images of each image"
    )
    parser.add_argument("--csv", metavar="FILE", help="with --nearest: also write them to this CSV file")


def check(flags: argparse.Namespace) -> None:
    """Raises UserError if a flag has a value that is not allowed, or is of no use."""
    commands.check_flags(flags, ("step", "best"), ("image_size", "normalize"))
    if flags.images is None:
        for name in ONLY_IMAGES:
            if getattr(flags, name) not in (None, False):
                raise UserError(f"--{name} is only used with --images\n  add --images=DIRECTORY, or omit --{name}")
        if flags.init:
            raise UserError(
                f"--init={flags.init}: --images is missing\n"
                "  add --images=DIRECTORY; for the features of a dataset, use vit-jax transfer"
            )
        return
    for name, value in (("split", flags.split is not None), ("data_dir", flags.data_dir is not None)):
        if value:
            raise UserError(f"--{name} cannot be combined with --images\n  omit one of them")
    if flags.nearest is not None and flags.nearest < 1:
        raise UserError(f"--nearest is {flags.nearest}\n  allowed: an integer of at least 1")
    if flags.csv and flags.nearest is None:
        raise UserError(f"--csv={flags.csv} is only used with --nearest\n  add --nearest=K, or omit --csv")
    if flags.nearest is not None and len(_layers(flags) or ()) > 1:
        raise UserError(f"--layers={flags.layers}: --nearest compares the outputs of one layer\n  choose one of them")
    target = paths.expand(flags.csv, "--csv") if flags.csv else None
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise UserError(f"--csv={flags.csv} cannot be written\n  use a file name in an existing directory")


def compute(flags: argparse.Namespace) -> int:
    """Writes the features of the images, or prints the most similar ones; returns the exit status, as `predict` does.

    Raises:
        UserError: the model or the images cannot be read, or the output cannot be written.
    """
    from vit_jax import backbones, inference
    from vit_jax.data import feature_store
    from vit_jax.optim import trainable
    from vit_jax.runtime import compilation_cache

    layers, out = _layers(flags), _output_path(flags)
    if out is not None:
        feature_store.check_path(out)
    directory, notes = paths.expand(flags.images, "--images"), []
    if not directory.is_dir():
        raise UserError(f"--images={flags.images} is not a directory\n  use a directory of images")
    images = list(inference.expand([directory], notes.append))
    if not images:
        left_out = f"{few(notes)}\n  " if notes else ""
        raise UserError(f"no images found below {flags.images}\n  {left_out}allowed: a directory of images")
    commands.start_jax()
    compilation_cache.cache_compilations()
    backbone = backbones.load(
        paths.expand(flags.workdir, "--workdir") if flags.workdir else flags.init,
        step="best" if flags.best else flags.step,
        image_size=flags.image_size,
        normalize=flags.normalize,
        batch_size=flags.batch_size or inference.BATCH_SIZE,
    )
    for note in notes:
        terminal.warn(note)
    unreadable: list[str] = []
    if flags.nearest is not None:
        found = dict(_features(backbone, images, layers, flags.dense and out is not None, unreadable))
        parts = iter(found.items())
    else:
        found, parts = {}, _features(backbone, images, layers, flags.dense, unreadable)
    if out is not None:
        about = {
            "image_shape": list(backbone.inputs.image_shape),
            "backbone": trainable.backbone_digest(backbone.parameters),
            "source": str(flags.workdir or flags.init),
            "layers": layers,
            "normalized_by": [list(backbone.inputs.mean), list(backbone.inputs.std)],
        }
        count = feature_store.write_images(out, parts, about)
        terminal.say(f"{out}: features of {count:,} images below {flags.images}, by {flags.workdir or flags.init}")
    if flags.nearest is not None:
        _print_nearest({name: arrays["features"].ravel() for name, arrays in found.items()}, flags.nearest, flags.csv)
    if unreadable:
        terminal.warn(f"{len(unreadable):,} of {len(images):,} images could not be read")
    return 0 if not unreadable else 1 if len(unreadable) < len(images) else 2


def _features(
    backbone: "Backbone", images: list, layers: tuple[int, ...] | None, dense: bool, unreadable: list[str]
) -> Iterator[tuple[str, dict[str, "np.ndarray"]]]:
    """Yields the path and the arrays of each image; those that cannot be read are reported, and added to a list."""
    from vit_jax.inference import Unreadable

    model = backbone.module
    needs_patches = model.pooling == "none" and not model.class_token
    with Counter("computing the features of", len(images), "images") as counter:
        for one in counter.over(backbone.stream(images, layers, dense or needs_patches)):
            if isinstance(one, Unreadable):
                terminal.warn(f"{one.image}: cannot be read as an image: {one.reason}")
                unreadable.append(str(one.image))
                continue
            name, tokens = one
            features = (
                tokens["patches"].mean(axis=(1, 2)) if needs_patches else tokens.get("pooled", tokens.get("class"))
            )
            arrays = {"features": features, **({"patches": tokens["patches"]} if dense else {})}
            yield str(name), {kind: array if layers else array[0] for kind, array in arrays.items()}


def _print_nearest(features: dict[str, "np.ndarray"], count: int, csv: str | None) -> None:
    """Prints, and writes to a CSV file, the most similar other images of each image."""
    import numpy as np

    from vit_jax.evaluation import knn

    if len(features) < 2:
        raise UserError(f"--nearest={count} needs two images that can be read, not {len(features)}\n  add images")
    names, matrix = list(features), np.stack(list(features.values()))
    count = min(count, len(names) - 1)
    similarities, indices = knn.nearest(matrix, matrix, count + 1)
    rows = []
    for own, name in enumerate(names):
        # The image itself is among them, but for more copies of it than there are neighbours.
        others = [
            (names[index], similarity)
            for index, similarity in zip(indices[own].tolist(), similarities[own].tolist(), strict=True)
            if index != own
        ][:count]
        rows += [[name, rank, other, f"{similarity:.6g}"] for rank, (other, similarity) in enumerate(others, start=1)]
        terminal.output(f"{name}  " + ", ".join(f"{other} {similarity:.3f}" for other, similarity in others))
    if csv is None:
        return
    try:
        atomic.write_csv(paths.expand(csv, "--csv"), ["path", "rank", "similar", "similarity"], rows)
    except OSError as error:
        raise UserError(f"--csv={csv} cannot be written: {error.strerror}\n  use another file") from error


def _layers(flags: argparse.Namespace) -> tuple[int, ...] | None:
    if flags.layers is None:
        return None
    try:
        return tuple(int(part) for part in flags.layers.split(","))
    except ValueError:
        raise UserError(f"--layers is {flags.layers!r}\n  allowed: integers such as -1,-4, from 0 or the end") from None


def _output_path(flags: argparse.Namespace) -> Path | None:
    """Returns where features are stored; None if they are not."""
    if flags.out:
        return paths.expand(flags.out, "--out")
    if flags.nearest is not None:
        return None
    file = f"{_file_name(flags.images)}.npz"
    if flags.workdir:
        return paths.expand(flags.workdir, "--workdir") / "features" / "images" / file
    return Path("runs") / "features" / _file_name(flags.init) / file


def _file_name(source: str) -> str:
    return re.sub(r"[^\w.-]+", "_", Path(source).resolve().name) or "images"
