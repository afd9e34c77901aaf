"""A folder of images: PATH/train/CLASS/*.jpg beside PATH/test/CLASS/*.jpg, or one PATH/CLASS/*.jpg to be split."""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

from vit_jax.data import cache, images, lazy_images
from vit_jax.data.spec import LABEL, Description
from vit_jax.errors import UserError

SPLITS = ("train", "validation", "val", "test")
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError)  # what Pillow raises for bytes it cannot read


def describe(root: Path, skipped: Path | None) -> Description:
    """What is known of a folder of images; RGB whatever the files hold.

    Args:
        root: the folder.
        skipped: where lists of broken files are kept, which are then left out; None keeps all.

    Raises:
        UserError: as `find`; or there are no files.
    """
    class_names, files = find(root)
    if not files:
        raise UserError(f"data set 'folder': {root} has no files in its classes")
    key = f"folder-{fingerprint(root, [file for split in files.values() for file in split])}"
    if skipped is not None:
        files = {split: whole(root, found, skipped / key / f"{split}-broken.json") for split, found in files.items()}
        key += "-whole"
    stored = lambda split: records(root, files[split])  # noqa: E731
    decode = lambda split, images, labels: lazy_images.decode_all(stored(split), images, labels)  # noqa: E731
    sizes = {split: len(found) for split, found in files.items()}
    return Description("folder", sizes, {LABEL: class_names}, (None, None, 3), key, decode, stored)


def find(root: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]]]:
    """The class names, sorted, and for each split its files below `root`, each with its class.

    Files stand in the order of a hash of their paths: any slice of a split is a random sample of it, and a file that is
    added moves no other.

    Raises:
        UserError: no such folder, no classes in it, or splits of different classes.
    """
    if not root.is_dir():
        raise UserError(f"data set 'folder': there is no folder {root} (config.data.dir)")
    splits = {name: root / name for name in SPLITS if (root / name).is_dir()} if (root / "train").is_dir() else {}
    splits = splits or {"train": root}
    classes = {name: _folders(path) for name, path in splits.items()}
    names = sorted({*classes["train"]})
    for split, found in classes.items():
        strange = sorted({*found} - {*names})
        if strange:
            raise UserError(f"data set 'folder': {splits[split] / strange[0]} is of a class that train does not have")
    if not names:
        raise UserError(
            f"data set 'folder': {splits['train']} has no sub-folders\n"
            "Wanted: a sub-folder for each class, with its images in it."
        )
    files = {split: _files(root, path, names) for split, path in splits.items()}
    return tuple(names), {split: found for split, found in files.items() if found}


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")]


def _files(root: Path, path: Path, names: list[str]) -> list[tuple[str, int]]:
    found = []
    for label, name in enumerate(names):
        if (path / name).is_dir():
            for folder, folders, files in os.walk(path / name):
                folders[:] = [inner for inner in folders if not inner.startswith(".")]
                below = os.path.relpath(folder, root)
                found += [(f"{below}/{file}", label) for file in files if not file.startswith(".")]
    return sorted(found, key=lambda file: hashlib.sha256(file[0].encode(errors="surrogateescape")).digest())


def fingerprint(root: Path, files: list[tuple[str, int]]) -> str:
    """Twelve characters that change when a file comes, goes or changes its size or time."""
    digest = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape"))
    for name, _ in files:
        stat = os.stat(root / name)
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:12]


def records(root: Path, files: list[tuple[str, int]]) -> lazy_images.Records:
    """The files as records."""

    def read(place: int, size: lazy_images.Size):
        name, label = files[place]
        try:
            return images.decode(root / name, size), label
        except _DAMAGED as error:
            raise _broken(root / name, error) from error

    return lazy_images.Records(len(files), read, lambda place: str(root / files[place][0]))


def _broken(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{path} is no image, or damaged: {reason[:200]}\n"
        "Remove it, or give config.data.skip_broken=True to leave out what cannot be read."
    )


def whole(root: Path, files: list[tuple[str, int]], kept: Path | None) -> list[tuple[str, int]]:
    """The files that can be decoded; those that cannot are counted on standard error, and the first three named.

    Args:
        root: the folder that the files lie below.
        files: all of them, with their classes.
        kept: a file that remembers the answer; None for none.
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
        print(f"skipping {len(broken):,} of {len(files):,} files that are no whole images: {named}", file=sys.stderr)
    return [file for file in files if file[0] not in broken]


def _find_broken(root: Path, files: list[tuple[str, int]]) -> set[str]:
    from PIL import Image

    def fails(place: int) -> bool:
        try:
            with Image.open(root / files[place][0]) as image:
                image.load()
        except _DAMAGED:
            return True
        return False

    return {files[place][0] for place, bad in enumerate(lazy_images.in_threads(fails, range(len(files)))) if bad}
