"""CIFAR-100 from scratch at 32 pixels, with the recipes for CIFAR-10.

    vit-jax train --config=cifar100
    vit-jax train --config=cifar100:S,long
    vit-jax train --config=cifar100:cpu

Sizes and lengths are those of configs/cifar10.py. Not measured.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.errors import UserError

ARGUMENTS = "as for cifar10"


def get_config(argument: str = "full") -> ConfigDict:
    """The config of configs/cifar10.py, for the 100 fine classes of CIFAR-100."""
    try:
        config = options.load(f"{Path(__file__).with_name('cifar10.py')}:{argument}")
    except UserError as error:
        raise UserError(str(error).replace("cifar10.py", "cifar100.py")) from None
    config.data.name = "cifar100"
    return config
