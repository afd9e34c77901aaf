"""The command: python -m vit_jax.features --workdir=DIR [--split=train] [--out=FILE.npz | --out=FOLDER]."""

import argparse
import sys
from pathlib import Path

from vit_jax import commands
from vit_jax.errors import UserError

DESCRIPTION = """\
Computes once what a trained backbone makes of every image of a split, and stores it with labels and ids.

  python -m vit_jax.features --workdir=runs/digits --split=train
  python -m vit_jax.features --workdir=runs/digits --split=test
  python -m vit_jax.features --workdir=runs/cifar10 --split='train[:1000]' --out=first.npz

The file has the arrays `features` (float32 [examples, width], what the head reads), `labels`, `labels_<kind>` for each
further kind of label that the set has, `ids` ('train:17': the place in the stored split) and `about` (a JSON text).
A name that does not end in .npz makes a folder of .npy files, which can be memory-mapped. No augmentation is applied.

Heads are then trained on the stored features alone, as --config.data.features=DIR/features (docs/models.md).
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's flags; --help and mistakes end the process, the latter with status 2."""
    parser = commands.parser("features", DESCRIPTION)
    commands.add_flags(parser)
    parser.add_argument("--out", metavar="PATH", help="FILE.npz, or a folder (default: DIR/features/SPLIT.npz)")
    return parser.parse_args(arguments)


def compute(flags: argparse.Namespace) -> str:
    """Writes the features of a split; returns a line that says what and where.

    Raises:
        UserError: as `commands.open_run`; or the place cannot be written to, or has no room.
    """
    import jax
    import jax.numpy as jnp

    from vit_jax.data import feature_store, sources
    from vit_jax.evaluation import exact
    from vit_jax.optim import trainable
    from vit_jax.training import setup

    out = _out(flags)
    feature_store.check_place(out)
    trained = commands.open_run(flags)
    run = trained.run
    parameters = run.objective.backbone(trained.state.for_evaluation())
    kinds = sources.kinds(run.config.data.name, run.config.data.dir)
    source = setup.load(run.config, run.sources[flags.split].split, kinds)
    backbone = run.model.clone(classes=None)
    images = jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)
    example = jax.eval_shape(backbone.apply, {"params": parameters}, images).shape[1:]
    blocks = exact.extract(backbone, run.augment, parameters, run.feeds(flags.split), run.evaluation_batch_size())
    about = {
        "step": int(trained.state.step),
        "image_shape": list(run.image_shape),
        "backbone": trainable.backbone_digest(parameters),
        "normalization": run.config.data.normalization,
    }
    feature_store.write(out, (len(source), *example), blocks, source, about)
    shape = " x ".join(map(str, (len(source), *example)))
    return f"{out}: features {shape}, labels ({', '.join(kinds)}) and ids, by step {about['step']:,} of {flags.workdir}"


def _out(flags: argparse.Namespace) -> Path:
    if flags.out:
        return Path(flags.out).expanduser()
    if flags.split not in commands.SPLITS:
        raise UserError(f"--split={flags.split} needs a name for its file\n  give --out=FILE.npz, or --out=FOLDER")
    return Path(flags.workdir).expanduser() / "features" / f"{flags.split}.npz"


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    flags = parse(arguments)
    return commands.finish(lambda: print(compute(flags)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
