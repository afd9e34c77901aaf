"""What each kind of dataset provides so that it can be loaded like any other."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from vit_jax.data import lazy_images
from vit_jax.data.preparation import Preparation

LABEL = "label"  # TFDS's name of the label


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Description of a dataset, known before any image is decoded.

    Attributes:
        name: name of the set.
        sizes: number of examples of each stored split.
        class_names: the class names of each kind of label.
        shape: height, width and channels; height and width are None if images differ in size.
        cache_key: subdirectory of the cache, which changes with the stored set; None for a set that needs no cache.
        decode: for a set without records, decode(split, images, labels, how) fills arrays with the images of a stored
            split, resized and cropped to the height and width of the array, and with the labels of the kind `label`.
        records: records(split) returns the encoded examples; None for a set that is always decoded as a whole.
        read_labels: read_labels(split, kind, labels) fills an array with labels of another kind; None if there is none.
        median_size: median_size() returns the median height and width of some images; None if they have one size, or
            it is not known.
        skipped: for a stored split, lines about its files that cannot be decoded and are skipped.
        notes: for a stored split, a line about what was left out of it, or about classes without examples.
    """

    name: str
    sizes: Mapping[str, int]
    class_names: Mapping[str, tuple[str, ...]]
    shape: tuple[int | None, int | None, int]
    cache_key: str | None
    decode: Callable[[str, np.ndarray, np.ndarray, Preparation], None] | None = None
    records: Callable[[str], lazy_images.Records] | None = None
    read_labels: Callable[[str, str, np.ndarray], None] | None = None
    median_size: Callable[[], tuple[int, int] | None] | None = None
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
