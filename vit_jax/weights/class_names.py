"""Class names: those that JSON files beside weights record, and the 1,000 of ImageNet-1k.

imagenet1k.txt has a line per class, in the order of the ImageNet challenge (ILSVRC 2012: synsets sorted by WordNet ID):
the words of its synset in WordNet 3.0 (Princeton University, https://wordnet.princeton.edu/license-and-commercial-use),
with a hint where two are the same.
"""

import functools
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from vit_jax.weights.describe import config_value
from vit_jax.weights.published import PUBLISHED

IMAGENET = "imagenet"  # what a user writes in place of names
_DATA = "ImageNet-1k"
_NAMED = r"(in1k|imagenet[-_]?(1k|2012)|ilsvrc[-_]?2012)"  # in the name of a file


@functools.cache
def imagenet1k() -> tuple[str, ...]:
    """Returns the 1,000 class names of ImageNet-1k, in the order of the labels."""
    text = resources.files("vit_jax.weights").joinpath("imagenet1k.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def recorded(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns the class names in a config.json, in the order of the labels.

    None if there are none, or not one for each of 0, 1, ..., or those that transformers writes for want of names
    ('LABEL_0').
    """
    names = config_value(config, "label_names", list)
    if names is None and (by_label := config_value(config, "id2label", dict)) is not None:
        wanted = [str(label) for label in range(len(by_label))]
        names = [by_label[label] for label in wanted] if set(by_label) == set(wanted) else None
    if not names or not all(isinstance(name, str) for name in names):
        return None
    return None if all(name == f"LABEL_{label}" for label, name in enumerate(names)) else tuple(names)


def is_imagenet1k(config: Mapping[str, Any], is_own: bool, names: tuple[str, ...]) -> bool:
    """Returns whether the head of 1,000 classes of a file is one of ImageNet-1k, by its config.json or its names.

    Args:
        config: the config.json. timm's has `num_classes` and `label_names` if the classes are not those of ImageNet.
        is_own: whether the config.json is one that we wrote, of any model.
        names: what the file is called.
    """
    of_timm = config_value(config, "pretrained_cfg", dict) or {}
    if "architecture" in config and not is_own and of_timm.get("num_classes") == len(imagenet1k()):
        return True
    hubs = {known.hub.rpartition("/")[2]: known for known in PUBLISHED.values()}
    known = [PUBLISHED.get(name) or hubs.get(name.rpartition("--")[2]) for name in names]
    if any(one is not None and one.data[-1:] == (_DATA,) and one.classes for one in known):
        return True
    return any(re.search(_NAMED, name, re.IGNORECASE) for name in names)
