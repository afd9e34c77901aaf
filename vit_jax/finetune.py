"""The command `python -m vit_jax.finetune`: a short form of training with configs/finetune.py."""

import os
import sys

from vit_jax import commands, config
from vit_jax import main as training
from vit_jax.errors import UserError

PHOTOS = "photos"  # the config for a directory of images
DESCRIPTION = """\
Fine-tunes a model on a dataset, or on a directory of images with a subdirectory for each class.

  %(prog)s --init=augreg-b16-224 --data=cifar10
  %(prog)s --init=runs/cifar10-cpu --data=cifar100,cpu
  %(prog)s --init=augreg-b16-224 --data=photos --workdir=runs/photos --config.train.steps=200

A short form of vit-jax train, to which all other arguments are passed:

  --init=INIT       --config.checkpoint.init_from=INIT
  --data=NAME       --config=finetune:NAME
  --data=DIRECTORY  --config={photos} --config.data.dir=DIRECTORY

The same command resumes a run that was stopped (docs/finetuning.md).
"""


def training_arguments(arguments: list[str]) -> list[str]:
    """Returns the arguments of training; --help and wrong flags end the process, the latter with status 2.

    Raises:
        UserError: --data is neither a dataset nor a directory, or --config is given as well.
    """
    parser = commands.parser("finetune", DESCRIPTION.replace("{photos}", PHOTOS))
    parser.add_argument("--init", required=True, help="the model: a run directory, file, URL or name (docs/weights.md)")
    parser.add_argument("--data", metavar="NAME|DIRECTORY", required=True, help="dataset, or directory of images")
    overrides, rest = commands.take_overrides(arguments)
    flags, others = parser.parse_known_args(rest)
    if any(one.partition("=")[0] == "--config" for one in others):
        raise UserError("--config is chosen by --data\n  omit it, or use python -m vit_jax.main --config=...")
    chosen = [*_data(flags.data), f"--config.checkpoint.init_from={flags.init}"]
    return [*chosen, *others, *(f"--config.{one}" for one in overrides)]


def _data(data: str) -> list[str]:
    """Returns the flags of training for a dataset or a directory; with a slash it is a directory."""
    if os.sep not in data:
        try:
            config.load(f"finetune:{data}")
            return [f"--config=finetune:{data}"]
        except UserError as error:
            if not os.path.isdir(data):
                raise UserError(f"--data={data}: no such directory, and {error}") from None
    return [f"--config={PHOTOS}", f"--config.data.dir={data}"]


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: training.run(training_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
