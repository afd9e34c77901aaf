"""Datasets in NumPy files: PATH/train.npz with `images` and `labels`, or train_images.npy and train_labels.npy."""

from pathlib import Path

import numpy as np

from vit_jax.data import folder, images, lazy_images
from vit_jax.data.labels import check_type, count_classes, read_names, reason_of, without_examples
from vit_jax.data.listing import LeftOut, is_hidden
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.data.spec import LABEL, DatasetSpec
from vit_jax.errors import UserError, few


def dataset_spec(root: Path, skip_lists: Path | None, fraction: float | None = None) -> DatasetSpec:
    """Returns the dataset of a directory of NumPy files.

    Args:
        root: the directory.
        skip_lists: ignored; single images cannot be damaged in these files.
        fraction: ignored; its splits are those of its files.

    Raises:
        UserError: as `find`; or splits differ in their number of channels.
    """
    del skip_lists, fraction
    splits = find(root)
    shapes = {images.shape[1:] for images, _ in splits.values()}
    if len({shape[2] for shape in shapes}) > 1:
        raise UserError(
            f"dataset 'arrays': splits of {root} differ in their number of channels: {sorted(shapes)}\n"
            "  convert them to the same number of channels: 1, 3 or 4"
        )
    shape = shapes.pop() if len(shapes) == 1 else (None, None, shapes.pop()[2])

    def split_records(split: str) -> lazy_images.Records:
        return records(root, split, *splits[split])

    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    names = class_names(root, splits)
    files = sorted(path for suffix in ("*.npz", "*.npy") for path in root.glob(suffix))
    notes = {split: note for split in splits if (note := _note(split, files, splits, names))}
    key = f"arrays-{folder.fingerprint(root, [(path.name, 0) for path in files])}"
    return DatasetSpec("arrays", sizes, {LABEL: names}, shape, key, records=split_records, notes=notes)


def find(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the images and labels of each split; .npy files are memory-mapped. Nothing is ever unpickled.

    Raises:
        UserError: the directory or its files are missing, or the arrays are not 8-bit images and integer labels.
    """
    if not root.is_dir():
        raise UserError(
            f"dataset 'arrays': directory {root} does not exist\n  set config.data.dir to the directory of the arrays"
        )
    splits = {}
    for path in sorted(path for path in root.glob("*.npz") if not is_hidden(path.name)):
        with _load(path) as stored:
            missing = sorted({"images", "labels"} - {*stored.files})
            if missing:
                raise UserError(
                    f"{path} has no array {missing[0]!r}\n  it has: {', '.join(stored.files) or 'none'}\n"
                    "  rename them: np.savez('train.npz', images=..., labels=...), one file per split"
                )
            splits[path.stem] = path, _member(path, stored, "images"), _member(path, stored, "labels")
    for path in sorted(path for path in root.glob("*_images.npy") if not is_hidden(path.name)):
        labels = path.with_name(path.name.replace("_images.npy", "_labels.npy"))
        if not labels.exists():
            raise UserError(f"{labels}, the labels of {path.name}, is missing\n  add it, or move {path} away")
        split = path.name.removesuffix("_images.npy")
        if split in splits:
            raise UserError(f"{root} has the split {split} twice: {split}.npz and {path.name}\n  remove one of them")
        splits[split] = path, _load(path), _load(labels)
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
        raise UserError(f"{path} cannot be read: {reason_of(error)}\n  write it again, or check the disk") from error


def _member(path: Path, stored, name: str) -> np.ndarray:
    try:
        return stored[name]
    except Exception as error:
        raise UserError(
            f"{path}: {name} cannot be read: {reason_of(error)}\n  write it again, or check the disk"
        ) from error


def _checked(path: Path, stored: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if stored.ndim == 3:
        stored = stored[..., None]
    if stored.dtype != np.uint8 or stored.ndim != 4 or stored.shape[3] not in (1, 3, 4):
        raise UserError(
            f"{path}: images have dtype {stored.dtype} and shape {stored.shape}\n"
            "  expected: uint8 [examples, height, width] or [examples, height, width, channels] with 1, 3 or 4 channels"
            f"{_conversion(stored)}"
        )
    if 0 in stored.shape:
        raise UserError(f"{path}: images have shape {stored.shape}: no pixels\n  expected: at least one example")
    check_type(labels, len(stored), str(path))
    return stored, labels


def _conversion(stored: np.ndarray) -> str:
    """Returns how to convert images of another type or layout, as far as the array shows it."""
    steps = []
    if stored.ndim == 4 and stored.shape[3] not in (1, 3, 4):
        if stored.shape[1] in (1, 3, 4):
            steps.append("channels first: images.transpose(0, 2, 3, 1)")
        elif stored.shape[2] in (1, 3, 4):
            steps.append("examples last: images.transpose(3, 0, 1, 2)")
    elif stored.ndim == 2:
        steps.append(
            "flat: images.reshape(-1, height, width), or of CIFAR .reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)"
        )
    if stored.dtype.kind == "f":
        steps.append("floats from 0 to 1: (255 * images).round().astype('uint8')")
    elif stored.dtype.kind == "b":
        steps.append("booleans: 255 * images.astype('uint8')")
    elif stored.dtype.kind in "iu" and stored.dtype != np.uint8:
        steps.append("integers from 0 to 255: images.astype('uint8'); of 16 bits: (images >> 8).astype('uint8')")
    return "".join(f"\n  {step}" for step in [", then ".join(steps)] if step)


def class_names(root: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[str, ...]:
    """Returns the lines of PATH/classes.txt, or without that file the labels as text.

    Raises:
        UserError: there are fewer lines than classes, or labels are ids and not classes.
    """
    file = root / "classes.txt"
    if not file.exists():
        return tuple(map(str, range(count_classes([labels for _, labels in splits.values()], str(root)))))
    names, largest = read_names(file), max(int(labels.max()) for _, labels in splits.values())
    if len(names) <= largest:
        raise UserError(f"{file} has {len(names)} lines, the largest label is {largest}\n  expected: one per class")
    return names


def _note(
    split: str, files: list[Path], splits: dict[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, ...]
) -> str | None:
    """Returns one line: files that belong to no split, and classes without examples."""
    used = {f"{name}{suffix}" for name in splits for suffix in (".npz", "_images.npy", "_labels.npy")}
    left_out = LeftOut(files[0].parent)
    for path in files:
        if path.name not in used and split == next(iter(splits)):
            left_out.add("outside the splits", path)
    parts = [text] if (text := left_out.describe()) else []
    empty = without_examples(splits[split][1], names)
    if empty:
        parts.append(f"{len(empty):,} of {len(names):,} classes without examples: {few(empty)}")
    return "; ".join(parts) or None


def records(root: Path, split: str, stored: np.ndarray, labels: np.ndarray) -> lazy_images.Records:
    """Returns the examples as records."""

    def read(index: int, size: lazy_images.Size, how: Preparation = COVER):
        return images.resize_and_crop(np.ascontiguousarray(stored[index]), size[:2], how), int(labels[index])

    return lazy_images.Records(len(labels), read, lambda index: f"example {index:,} of {split} in {root}")
