"""Sets in NumPy's files: PATH/train.npz with `images` and `labels`, or train_images.npy and train_labels.npy."""

from pathlib import Path

import numpy as np

from vit_jax.data import folder, images, lazy_images
from vit_jax.data.spec import LABEL, Description
from vit_jax.errors import UserError


def describe(root: Path, skipped: Path | None) -> Description:
    """What is known of images and labels in NumPy's files.

    Args:
        root: their folder.
        skipped: of no use here: nothing in them can be broken alone.

    Raises:
        UserError: as `find`; or splits of different channels.
    """
    del skipped
    splits = find(root)
    shapes = {images.shape[1:] for images, _ in splits.values()}
    if len({shape[2] for shape in shapes}) > 1:
        raise UserError(f"data set 'arrays': the splits of {root} differ in their channels: {sorted(shapes)}")
    shape = shapes.pop() if len(shapes) == 1 else (None, None, shapes.pop()[2])
    stored = lambda split: records(root, split, *splits[split])  # noqa: E731
    decode = lambda split, images, labels: lazy_images.decode_all(stored(split), images, labels)  # noqa: E731
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    names = class_names(root, splits)
    files = sorted(path for suffix in ("*.npz", "*.npy") for path in root.glob(suffix))
    key = f"arrays-{folder.fingerprint(root, [(path.name, 0) for path in files])}"
    return Description("arrays", sizes, {LABEL: names}, shape, key, decode, stored)


def find(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The images and labels of each split; .npy files are mapped, .npz files read. Nothing is ever unpickled.

    Raises:
        UserError: no such folder or files, or arrays that are no 8-bit images with a whole number each.
    """
    if not root.is_dir():
        raise UserError(f"data set 'arrays': there is no folder {root} (config.data.dir)")
    splits = {}
    for path in sorted(root.glob("*.npz")):
        with _load(path) as stored:
            missing = {"images", "labels"} - {*stored.files}
            if missing:
                raise UserError(f"{path} has no array {sorted(missing)[0]!r}\nIt has: {', '.join(stored.files)}.")
            splits[path.stem] = path, _member(path, stored, "images"), _member(path, stored, "labels")
    for path in sorted(root.glob("*_images.npy")):
        labels = path.with_name(path.name.replace("_images.npy", "_labels.npy"))
        if not labels.exists():
            raise UserError(f"{labels} is missing beside {path.name}")
        splits[path.name.removesuffix("_images.npy")] = path, _load(path), _load(labels)
    if not splits:
        raise UserError(
            f"data set 'arrays': {root} has no files\n"
            "Wanted: train.npz with the arrays images and labels, or train_images.npy and train_labels.npy."
        )
    return {name: _checked(*split) for name, split in splits.items()}


def _load(path: Path):
    try:
        return np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except Exception as error:  # zipfile, NumPy and the system have each their own
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _member(path: Path, stored, name: str) -> np.ndarray:
    try:
        return stored[name]
    except Exception as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _checked(path: Path, pictures: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if pictures.ndim == 3:
        pictures = pictures[..., None]
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] not in (1, 3, 4):
        raise UserError(
            f"{path}: images are {pictures.dtype} of shape {pictures.shape}\n"
            "Wanted: 8 bits (uint8) of shape [examples, height, width] or [examples, height, width, 1, 3 or 4]."
        )
    if labels.dtype.kind not in "iu" or labels.shape != pictures.shape[:1] or not len(labels) or labels.min() < 0:
        raise UserError(
            f"{path}: labels are {labels.dtype} of shape {labels.shape}\n"
            f"Wanted: whole numbers from 0 on of shape ({len(pictures)},)."
        )
    return pictures, labels


def class_names(root: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[str, ...]:
    """The lines of PATH/classes.txt; without it the numbers themselves.

    Raises:
        UserError: there are fewer lines than classes.
    """
    count = 1 + max(int(labels.max()) for _, labels in splits.values())
    file = root / "classes.txt"
    if not file.exists():
        return tuple(map(str, range(count)))
    names = tuple(file.read_text().splitlines())
    if len(names) < count:
        raise UserError(f"{file} has {len(names)} lines, and the labels reach {count - 1}\nWanted: a line a class.")
    return names


def records(root: Path, split: str, pictures: np.ndarray, labels: np.ndarray) -> lazy_images.Records:
    """The examples as records."""

    def read(place: int, size: lazy_images.Size):
        return images.resize_and_crop(np.ascontiguousarray(pictures[place]), size[:2]), int(labels[place])

    return lazy_images.Records(len(labels), read, lambda place: f"example {place:,} of {split} in {root}")
