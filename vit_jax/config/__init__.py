"""Configs: the options (schema.py), reading and changing configs (load.py), and checking them (check.py).

from vit_jax import config

def get_config():
c = config.default()
c.train.steps = 1000
return c
"""

from vit_jax.config.load import (
    adapt,
    complete,
    default,
    differences,
    from_dict,
    load,
    names,
)
from vit_jax.config.module import shipped, split
from vit_jax.config.option import Option
from vit_jax.config.overrides import override, override_all, read_options, reset_unread
from vit_jax.config.schema import INIT_FROM, OPTIONS
from vit_jax.config.synonyms import nearest_options, note, takes_same_values

__all__ = [
    "INIT_FROM",
    "OPTIONS",
    "Option",
    "adapt",
    "complete",
    "default",
    "differences",
    "from_dict",
    "load",
    "names",
    "nearest_options",
    "note",
    "override",
    "override_all",
    "read_options",
    "reset_unread",
    "shipped",
    "split",
    "takes_same_values",
]
