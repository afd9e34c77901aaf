"""The command `python -m vit_jax.features`."""

import argparse
import sys
from pathlib import Path

from vit_jax import commands, features_of_images, paths, terminal
from vit_jax.errors import UserError

DESCRIPTION = """\
Computes the features of every image of a split, or of images without labels, and stores them with labels and ids.

  %(prog)s --workdir=runs/digits --split=train
  %(prog)s --workdir=runs/digits --split=test
  %(prog)s --workdir=runs/digits --split='train[:1000]' --out=first.npz
  %(prog)s --init=dinov2-s14 --images=album --layers=-1,-4 --dense --out=album.npz
  %(prog)s --init=dinov2-s14 --images=album --nearest=3 --csv=similar.csv

Features are the input of the head. Images are not augmented. The file has these arrays:

  features       float32 [examples, width]
  labels         int32 [examples]; also labels_<name> for each further kind of label of the dataset
  ids            'train:17' for example 17 of the stored split train
  about          JSON text: dataset, split, class names, image shape, digest of the backbone

If --out does not end in .npz, it is a directory of .npy files, which can be memory-mapped.

To train heads on the stored features, set --config.data.features=DIR/features (docs/models.md).

--images takes all images below a directory, sorted by path, and resizes them as predict does. What cannot be read is
reported on standard error and skipped; the exit status is then 1. ids are the paths, there are no labels, and
features of a model that does not pool its tokens are those of its class token, or the mean of its patches. With
--layers, features are [images, layers, width]: the final LayerNorm is applied to the output of each block, as
get_intermediate_layers(norm=True) of DINOv2 does. --dense adds

  patches        float32 [images, rows, columns, width]; with --layers, [images, layers, rows, columns, width]

--nearest=K prints the K most similar other images of each image, by the cosine similarity of their features; nothing
is stored then, unless --out is given.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("features", DESCRIPTION)
    commands.add_flags(parser, init=True)
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="output, FILE.npz or a directory (default: DIR/features/SPLIT.npz; of --images: DIR/features/images/"
        "NAME.npz, with --init runs/features/INIT/NAME.npz)",
    )
    features_of_images.add_flags(parser)
    return parser.parse_args(arguments)


def compute(flags: argparse.Namespace) -> str:
    """Writes the features of a split; returns one line about what was written.

    Raises:
        UserError: as `commands.open_run`; or the output cannot be written.
    """
    from vit_jax.data import feature_store, sources
    from vit_jax.evaluation import extraction
    from vit_jax.optim import trainable
    from vit_jax.training import setup

    out = _output_path(flags)
    feature_store.check_path(out)
    trained = commands.open_run(flags)
    run, step = trained.run, int(trained.state.step)
    parameters = run.objective.backbone(trained.state.for_evaluation())
    labels = tuple(sources.class_names(run.config.data.name, run.config.data.dir))
    source = setup.load(run.config, run.sources[flags.split].split, labels)
    model = run.model.clone(classes=None)
    shape = (len(source), *extraction.features_shape(model, parameters, run.image_shape))
    batches, batch_size = run.pipelines[flags.split], run.evaluation_batch_size
    blocks = extraction.extract(model, run.augment, parameters, batches, batch_size)
    about = {
        "step": step,
        "image_shape": list(run.image_shape),
        "backbone": trainable.backbone_digest(parameters),
        "normalization": run.config.data.normalization,
    }
    feature_store.write(out, shape, blocks, source, about)
    sizes = " x ".join(map(str, shape))
    return f"{out}: features {sizes}, labels ({', '.join(labels)}) and ids; from step {step:,} of {flags.workdir}"


def _output_path(flags: argparse.Namespace) -> Path:
    if flags.out:
        return paths.expand(flags.out, "--out")
    if flags.split not in commands.SPLITS:
        raise UserError(f"--split={flags.split} has no default output file\n  add --out=FILE.npz, or --out=DIRECTORY")
    return paths.expand(flags.workdir, "--workdir") / "features" / f"{flags.split}.npz"


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""

    def run() -> int:
        flags = parse(arguments)
        features_of_images.check(flags)
        flags.split = flags.split or commands.TEST
        if flags.images is not None:
            return features_of_images.compute(flags)
        terminal.say(compute(flags))
        return 0

    return commands.finish(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
