"""Datasets in NumPy files: PATH/train.npz with `images` and `labels`, or train_images.npy and train_labels.npy."""

from pathlib import Path

import numpy as np

from vit_jax.data import folder, images, lazy_images
from vit_jax.data.spec import LABEL, DatasetSpec
from vit_jax.errors import UserError, one_line


def dataset_spec(root: Path, skip_lists: Path | None) -> DatasetSpec:
    """Returns the dataset of a directory of NumPy files.

    Args:
        root: the directory.
        skip_lists: ignored; single images cannot be damaged in these files.

    Raises:
        UserError: as `find`; or splits differ in their number of channels.
    """
    del skip_lists
    splits = find(root)
    shapes = {images.shape[1:] for images, _ in splits.values()}
    if len({shape[2] for shape in shapes}) > 1:
        raise UserError(f"dataset 'arrays': splits of {root} differ in their number of channels: {sorted(shapes)}")
    shape = shapes.pop() if len(shapes) == 1 else (None, None, shapes.pop()[2])

    def split_records(split: str) -> lazy_images.Records:
        return records(root, split, *splits[split])

    def decode(split: str, images_out: np.ndarray, labels_out: np.ndarray) -> None:
        lazy_images.decode_all(split_records(split), images_out, labels_out)

    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    names = class_names(root, splits)
    files = sorted(path for suffix in ("*.npz", "*.npy") for path in root.glob(suffix))
    key = f"arrays-{folder.fingerprint(root, [(path.name, 0) for path in files])}"
    return DatasetSpec("arrays", sizes, {LABEL: names}, shape, key, decode, split_records)


def find(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the images and labels of each split; .npy files are memory-mapped. Nothing is ever unpickled.

    Raises:
        UserError: the directory or its files are missing, or the arrays are not 8-bit images and integer labels.
    """
    if not root.is_dir():
        raise UserError(f"dataset 'arrays': directory {root} does not exist (config.data.dir)")
    splits = {}
    for path in sorted(root.glob("*.npz")):
        with _load(path) as stored:
            missing = {"images", "labels"} - {*stored.files}
            if missing:
                raise UserError(f"{path} has no array {sorted(missing)[0]!r}\n  it has: {', '.join(stored.files)}")
            splits[path.stem] = path, _member(path, stored, "images"), _member(path, stored, "labels")
    for path in sorted(root.glob("*_images.npy")):
        labels = path.with_name(path.name.replace("_images.npy", "_labels.npy"))
        if not labels.exists():
            raise UserError(f"{labels}, the labels of {path.name}, is missing")
        splits[path.name.removesuffix("_images.npy")] = path, _load(path), _load(labels)
    if not splits:
        raise UserError(
            f"dataset 'arrays': {root} contains no data\n"
            "  expected: train.npz with the arrays images and labels, or train_images.npy and train_labels.npy"
        )
    return {name: _checked(*split) for name, split in splits.items()}


def _load(path: Path):
    try:
        return np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except Exception as error:  # zipfile, NumPy and the operating system raise many types
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def _member(path: Path, stored, name: str) -> np.ndarray:
    try:
        return stored[name]
    except Exception as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def _checked(path: Path, stored: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if stored.ndim == 3:
        stored = stored[..., None]
    if stored.dtype != np.uint8 or stored.ndim != 4 or stored.shape[3] not in (1, 3, 4):
        raise UserError(
            f"{path}: images have dtype {stored.dtype} and shape {stored.shape}\n"
            "  expected: uint8 [examples, height, width] or [examples, height, width, channels] with 1, 3 or 4 channels"
        )
    if labels.dtype.kind not in "iu" or labels.shape != stored.shape[:1] or not len(labels) or labels.min() < 0:
        raise UserError(
            f"{path}: labels have dtype {labels.dtype} and shape {labels.shape}\n"
            f"  expected: non-negative integers of shape ({len(stored)},)"
        )
    return stored, labels


def class_names(root: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[str, ...]:
    """Returns the lines of PATH/classes.txt, or without that file the labels as text.

    Raises:
        UserError: there are fewer lines than classes.
    """
    count = 1 + max(int(labels.max()) for _, labels in splits.values())
    file = root / "classes.txt"
    if not file.exists():
        return tuple(map(str, range(count)))
    names = tuple(file.read_text().splitlines())
    if len(names) < count:
        raise UserError(f"{file} has {len(names)} lines, the largest label is {count - 1}\n  expected: one per class")
    return names


def records(root: Path, split: str, stored: np.ndarray, labels: np.ndarray) -> lazy_images.Records:
    """Returns the examples as records."""

    def read(index: int, size: lazy_images.Size):
        return images.resize_and_crop(np.ascontiguousarray(stored[index]), size[:2]), int(labels[index])

    return lazy_images.Records(len(labels), read, lambda index: f"example {index:,} of {split} in {root}")
