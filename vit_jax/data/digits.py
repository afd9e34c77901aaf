"""The set that lies inside the package."""

from pathlib import Path

import numpy as np
from jaxtyping import Integer

from vit_jax.data.images import resize_and_crop
from vit_jax.data.spec import LABEL, Description


def describe() -> Description:
    """The 1,797 handwritten digits of scikit-learn (UCI optdigits), 8x8 grey pixels: 1,437 to train and 360 to test."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        digits, labels = stored["images"], stored["labels"]
    train, test = split(labels)
    chosen = {"train": train, "test": test}

    def decode(name: str, images_out: np.ndarray, labels_out: np.ndarray) -> None:
        scaled = np.rint(digits[chosen[name]] * (255 / 16)).astype(np.uint8)[..., None]  # pixels are stored as 0 to 16
        images_out[:] = np.stack([resize_and_crop(image, images_out.shape[1:3]) for image in scaled])
        labels_out[:] = labels[chosen[name]]

    def read_labels(name: str, kind: str, labels_out: np.ndarray) -> None:
        labels_out[:] = labels[chosen[name]] % 2  # of the kinds besides `label` there is this one alone

    sizes = {name: len(indices) for name, indices in chosen.items()}
    names = {LABEL: tuple("0123456789"), "parity": ("even", "odd")}
    return Description("digits", sizes, names, (8, 8, 1), None, decode, read_labels=read_labels)


def split(
    labels: Integer[np.ndarray, " examples"], tests: int = 360
) -> tuple[Integer[np.ndarray, " train"], Integer[np.ndarray, " test"]]:
    """The indices of the train and the test split of `digits`: stratified, shuffled, and fixed for ever.

    Philox with key 0, a stream of 64-bit numbers that NumPy promises not to change, gives each example a first number,
    then each a second one. The examples of a class with the lowest first numbers are the test split: a class of n has
    n * tests / examples of them, rounded down, and one more where the remainder is among the largest, until there are
    `tests`. Both splits are ordered by the second numbers, so that any slice of them is a random sample.
    """
    first, second = np.random.Philox(key=0).random_raw(2 * len(labels)).reshape(2, -1)
    quotas, remainders = np.divmod(np.bincount(labels) * tests, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: tests - quotas.sum()]] += 1
    by_first = np.argsort(first, kind="stable")
    is_test = np.zeros(len(labels), bool)
    for label, quota in enumerate(quotas):
        is_test[by_first[labels[by_first] == label][:quota]] = True
    by_second = np.argsort(second, kind="stable")
    return by_second[~is_test[by_second]], by_second[is_test[by_second]]
