"""What a kind of data set tells of itself, so that it can be loaded as any other."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from vit_jax.data import lazy_images

LABEL = "label"  # what TFDS calls the label of a set that has one


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known of a set before anything of it is decoded.

    Attributes:
        name: the set.
        sizes: the examples of each stored split.
        labels: the class names of each kind of label.
        shape: height, width and channels; height and width are None where images differ in size.
        key: the folder in the cache, which changes when the stored set does; None for a set that needs no cache.
        decode: decode(split, images, labels) fills arrays of a whole stored split with its images, at their size, and
            the labels of the kind `label`.
        records: records(split) are its examples as they are stored; None for a set that is always kept decoded.
        read_labels: read_labels(split, kind, labels) fills an array with the labels of another kind; None where there
            is none.
    """

    name: str
    sizes: Mapping[str, int]
    labels: Mapping[str, tuple[str, ...]]
    shape: tuple[int | None, int | None, int]
    key: str | None
    decode: Callable[[str, np.ndarray, np.ndarray], None]
    records: Callable[[str], lazy_images.Records] | None = None
    read_labels: Callable[[str, str, np.ndarray], None] | None = None
