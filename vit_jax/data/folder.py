"""Image directories: PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg, or PATH/CLASS/*.jpg without stored splits."""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from vit_jax.data import cache, images, lazy_images
from vit_jax.data.spec import LABEL, DatasetSpec
from vit_jax.errors import UserError, one_line

SPLITS = ("train", "validation", "val", "test")
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError)  # raised by Pillow for bytes it cannot read


def dataset_spec(root: Path, skip_lists: Path | None) -> DatasetSpec:
    """Returns the dataset of an image directory; images are converted to RGB.

    Args:
        root: the directory.
        skip_lists: leave out files that cannot be decoded, and cache the lists of them here; None keeps all files.

    Raises:
        UserError: as `find`; or there are no files.
    """
    class_names, files = find(root)
    if not files:
        raise UserError(f"dataset 'folder': the class directories of {root} contain no files")
    key = f"folder-{fingerprint(root, [file for split in files.values() for file in split])}"
    if skip_lists is not None:
        files = {
            split: skip_broken(root, found, skip_lists / key / f"{split}-broken.json") for split, found in files.items()
        }
        key += "-whole"

    def split_records(split: str) -> lazy_images.Records:
        return records(root, files[split])

    def decode(split: str, images_out: np.ndarray, labels_out: np.ndarray) -> None:
        lazy_images.decode_all(split_records(split), images_out, labels_out)

    sizes = {split: len(found) for split, found in files.items()}
    return DatasetSpec("folder", sizes, {LABEL: class_names}, (None, None, 3), key, decode, split_records)


def find(root: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]]]:
    """Returns the sorted class names, and for each split its files, relative to `root`, with their class indices.

    Files are sorted by a hash of their paths: any slice of a split is a random sample of it, and adding a file does not
    change the order of the others.

    Raises:
        UserError: the directory does not exist, has no classes, or a split has a class that train does not have.
    """
    if not root.is_dir():
        raise UserError(f"dataset 'folder': directory {root} does not exist (config.data.dir)")
    splits = {name: root / name for name in SPLITS if (root / name).is_dir()} if (root / "train").is_dir() else {}
    splits = splits or {"train": root}
    classes = {name: _class_directories(path) for name, path in splits.items()}
    names = sorted({*classes["train"]})
    for split, found in classes.items():
        unknown = sorted({*found} - {*names})
        if unknown:
            raise UserError(f"dataset 'folder': {splits[split] / unknown[0]} is a class that train does not have")
    if not names:
        raise UserError(
            f"dataset 'folder': {splits['train']} has no subdirectories\n"
            "  expected: one subdirectory per class that contains its images"
        )
    files = {split: _files(root, path, names) for split, path in splits.items()}
    return tuple(names), {split: found for split, found in files.items() if found}


def _class_directories(path: Path) -> list[str]:
    return [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]


def _files(root: Path, path: Path, names: list[str]) -> list[tuple[str, int]]:
    found = []
    for label, name in enumerate(names):
        if (path / name).is_dir():
            for directory, subdirectories, files in os.walk(path / name):
                subdirectories[:] = [inner for inner in subdirectories if not inner.startswith(".")]
                relative = os.path.relpath(directory, root)
                found += [(f"{relative}/{file}", label) for file in files if not file.startswith(".")]
    return sorted(found, key=lambda file: hashlib.sha256(file[0].encode(errors="surrogateescape")).digest())


def fingerprint(root: Path, files: list[tuple[str, int]]) -> str:
    """Returns twelve characters that change when a file is added, removed, resized or modified."""
    digest = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape"))
    for name, _ in files:
        stat = os.stat(root / name)
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:12]


def records(root: Path, files: list[tuple[str, int]]) -> lazy_images.Records:
    """Returns the files as records."""

    def read(index: int, size: lazy_images.Size):
        name, label = files[index]
        try:
            return images.decode(root / name, size), label
        except _DAMAGED as error:
            raise _broken(root / name, error) from error

    return lazy_images.Records(len(files), read, lambda index: str(root / files[index][0]))


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is not an image or is damaged: {one_line(error)}\n"
        "  remove it, or set config.data.skip_broken=True to skip unreadable files"
    )


def skip_broken(root: Path, files: list[tuple[str, int]], kept: Path | None) -> list[tuple[str, int]]:
    """Returns the files that can be decoded; prints the number of the others and the names of three to stderr.

    Args:
        root: directory that the files are relative to.
        files: all files, with their class indices.
        kept: file that caches the list of broken files; None for no cache.
    """
    try:
        broken = {*json.loads(kept.read_text())}
    except (AttributeError, OSError, ValueError):
        broken = _find_broken(root, files)
        if kept:
            with contextlib.suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
            cache.write(kept, json.dumps(sorted(broken)).encode())
    if broken:
        named = ", ".join(sorted(broken)[:3]) + (", ..." if len(broken) > 3 else "")
        print(f"skipping {len(broken):,} of {len(files):,} files that cannot be decoded: {named}", file=sys.stderr)
    return [file for file in files if file[0] not in broken]


def _find_broken(root: Path, files: list[tuple[str, int]]) -> set[str]:
    from PIL import Image

    def is_broken(index: int) -> bool:
        try:
            with Image.open(root / files[index][0]) as image:
                image.load()
        except _DAMAGED:
            return True
        return False

    results = lazy_images.map_in_threads(is_broken, range(len(files)))
    return {files[index][0] for index, broken in enumerate(results) if broken}
