"""The dataset that is part of the package."""

from pathlib import Path

import numpy as np
from jaxtyping import Integer

from vit_jax.data.images import resize_and_crop
from vit_jax.data.preparation import Preparation
from vit_jax.data.spec import LABEL, DatasetSpec


def dataset_spec() -> DatasetSpec:
    """Returns scikit-learn's 1,797 handwritten digits (UCI optdigits), 8x8 grey pixels: 1,437 train and 360 test."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        digits, labels = stored["images"], stored["labels"]
    train, test = split(labels)
    indices = {"train": train, "test": test}

    def decode(name: str, images_out: np.ndarray, labels_out: np.ndarray, how: Preparation) -> None:
        scaled = np.rint(digits[indices[name]] * (255 / 16)).astype(np.uint8)[..., None]  # stored values are 0 to 16
        images_out[:] = np.stack([resize_and_crop(image, images_out.shape[1:3], how) for image in scaled])
        labels_out[:] = labels[indices[name]]

    def read_labels(name: str, kind: str, labels_out: np.ndarray) -> None:
        labels_out[:] = labels[indices[name]] % 2  # 'parity' is the only other kind

    sizes = {name: len(chosen) for name, chosen in indices.items()}
    class_names = {LABEL: tuple("0123456789"), "parity": ("even", "odd")}
    return DatasetSpec("digits", sizes, class_names, (8, 8, 1), None, decode, read_labels=read_labels)


def split(
    labels: Integer[np.ndarray, " examples"], num_test: int = 360
) -> tuple[Integer[np.ndarray, " train"], Integer[np.ndarray, " test"]]:
    """Returns the indices of the train and the test split of `digits`: stratified, shuffled, and never changed.

    Philox with key 0, whose stream of 64-bit numbers NumPy guarantees not to change, assigns two numbers to each
    example. The test split consists of the examples of each class with the lowest first numbers: n * num_test /
    examples of a class of n, rounded down, and one more for the classes with the largest remainders, until there are
    `num_test`. Both splits are sorted by the second numbers, so that any slice of them is a random sample.
    """
    first, second = np.random.Philox(key=0).random_raw(2 * len(labels)).reshape(2, -1)
    quotas, remainders = np.divmod(np.bincount(labels) * num_test, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: num_test - quotas.sum()]] += 1
    by_first = np.argsort(first, kind="stable")
    is_test = np.zeros(len(labels), bool)
    for label, quota in enumerate(quotas):
        is_test[by_first[labels[by_first] == label][:quota]] = True
    by_second = np.argsort(second, kind="stable")
    return by_second[~is_test[by_second]], by_second[is_test[by_second]]
