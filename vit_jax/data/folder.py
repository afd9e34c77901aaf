"""Image directories: PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg, or PATH/CLASS/*.jpg without stored splits."""

import collections
import contextlib
import filecmp
import functools
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import PIL

from vit_jax import atomic, terminal
from vit_jax.data import cache, held_out, images, lazy_images, listing
from vit_jax.data.listing import LeftOut
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.data.spec import LABEL, DatasetSpec
from vit_jax.errors import UserError, few
from vit_jax.progress import Counter

MAX_COMPARED = 1000  # files of the same name in the folders of two classes
SAMPLE = 200  # files per split whose sizes are looked at
SPLITS = ("train", "validation", "val", "test")
# Folders such as Train and Test, or seg_train and seg_test.
_TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")
_HELD_OUT = re.compile(r"(?<![a-z])(test(ing)?|val(id(ation)?)?|dev|eval(uation)?)(?![a-z])")


def dataset_spec(root: Path, skip_lists: Path | None, fraction: float | None = None) -> DatasetSpec:
    """Returns the dataset of an image directory; images are converted to RGB.

    Args:
        root: the directory.
        skip_lists: leave out files that cannot be decoded, and cache the lists of them here; None keeps all files.
        fraction: of each class of `train` that becomes the split `test`, if none is stored; None for no such split.

    Raises:
        UserError: as `find`; or there are no files, or none can be held out.
    """
    class_names, files, notes = find(root)
    if not files:
        reasons = "".join(f"\n  {note}" for note in [*notes.values()][:1])
        raise UserError(
            f"dataset 'folder': the class directories of {root} contain no files{reasons}\n"
            "  add images to them, or set another config.data.dir"
        )
    key = f"folder-{fingerprint(root, [file for split in files.values() for file in split])}"
    skipped: dict[str, str] = {}
    if skip_lists is not None:
        for split, found in files.items():
            report = functools.partial(skipped.__setitem__, split)
            files[split] = skip_broken(root, found, skip_lists / key / f"{split}-broken.json", report)
        kept = "\n".join(name for found in files.values() for name, _ in found).encode(errors="surrogateescape")
        key += f"-whole-{hashlib.sha256(kept).hexdigest()[:12]}"
    if fraction is not None and "train" in files and "test" not in files:
        shown = listing.printable(str(root))
        divided, notes["test"] = held_out.make_splits(shown, files["train"], class_names, fraction)
        files, key = files | divided, f"{key}-held-out-{fraction:g}"

    def split_records(split: str) -> lazy_images.Records:
        return records(root, files[split])

    sizes = {split: len(found) for split, found in files.items()}
    shape, classes = (None, None, 3), {LABEL: class_names}
    some = [root / name for found in files.values() for name, _ in found[:SAMPLE]]
    size = functools.partial(images.median_size, some)
    described = {"median_size": size, "notes": notes, "skipped": skipped}
    return DatasetSpec("folder", sizes, classes, shape, key, records=split_records, **described)


def stored_splits(root: Path) -> tuple[str, ...]:
    """Returns the splits that a directory has; 'train' alone if it is that of the classes.

    Raises:
        UserError: it cannot be read, or has splits without train.
    """
    _check_readable(root)
    return tuple(_splits(root, {entry.name for entry in listing.entries(root, LeftOut(root))[0]}))


def find(root: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]], dict[str, str]]:
    """Returns the sorted class names; the files of each split, relative to `root`, with their class indices; and notes.

    Files are sorted by a hash of their paths: any slice of a split is a random sample of it, and adding a file does not
    change the order of the others. Links are followed. Folders whose names differ only in their Unicode form (an accent
    is part of the letter, or follows it) are one class. The note of a split says what was left out of it.

    Raises:
        UserError: the directory does not exist, has no classes, or a split has a class that train does not have.
    """
    if not root.is_dir():
        raise UserError(
            f"dataset 'folder': directory {root} does not exist\n  set config.data.dir to the directory of the images"
        )
    _check_readable(root)
    top = LeftOut(root)
    present, loose = listing.entries(root, top)
    splits = _splits(root, {entry.name for entry in present})
    if "train" in {entry.name for entry in present}:
        for entry in (*present, *loose):
            if entry.name not in splits:
                top.add("outside the splits", entry.path)
    left_out = {name: top if name == "train" else LeftOut(root) for name in splits}
    classes = {}
    for name, path in splits.items():
        _check_readable(path)
        classes[name], loose = _class_directories(path, left_out[name] if path != root else LeftOut(root))
        for entry in loose:
            left_out[name].add("outside the class folders", entry.path)
    names = _check_classes(splits, classes)
    files, notes = {}, {}
    for split, path in splits.items():
        files[split] = _files(root, path, [classes[split].get(_key(name), []) for name in names], left_out[split])
        parts = _note(names, files[split], classes[split], left_out[split]), _in_several_classes(root, files[split])
        notes[split] = "; ".join(filter(None, parts))
    kept = {split: found for split, found in files.items() if found}
    return tuple(names), kept, {split: note for split, note in notes.items() if note}


def _splits(root: Path, present: set[str]) -> dict[str, Path]:
    """Returns the directory of each stored split; a directory without `train` is that of its classes."""
    if "train" in present:
        return {name: root / name for name in SPLITS if name in present}
    lowered = {name.lower() for name in present}
    if _are_splits(lowered) or (lowered and all(map(_HELD_OUT.fullmatch, lowered))):
        raise UserError(
            f"dataset 'folder': the folders of {root} are splits without 'train': {few(sorted(present))}\n"
            f"  rename them: {', '.join(SPLITS)}"
        )
    return {"train": root}


def _are_splits(names: set[str]) -> bool:
    """Returns whether folders with these names look like splits: one for training, one held out, otherwise alike."""
    lowered = [name.lower() for name in names]
    trained = {_TRAIN.sub("", name) for name in lowered if _TRAIN.search(name)}
    return bool(trained & {_HELD_OUT.sub("", name) for name in lowered if _HELD_OUT.search(name)})


def _check_readable(path: Path) -> None:
    try:
        os.scandir(path).close()
    except OSError as error:
        raise UserError(
            f"dataset 'folder': {listing.printable(str(path))} cannot be read: {error.strerror}\n"
            "  change its permissions, or use another config.data.dir"
        ) from error


def _class_directories(path: Path, left_out: LeftOut) -> tuple[dict[str, list[str]], list[os.DirEntry]]:
    """Returns the names of the folders of each class, by its `_key`, and the files outside them."""
    folders, files = listing.entries(path, left_out)
    classes: dict[str, list[str]] = {}
    for entry in folders:
        classes.setdefault(_key(entry.name), []).append(entry.name)
    return classes, files


def _key(name: str) -> str:
    """Returns a class name in one Unicode form, by which folders are compared."""
    return unicodedata.normalize("NFC", name)


def _check_classes(splits: dict[str, Path], classes: dict[str, dict[str, list[str]]]) -> list[str]:
    """Returns the sorted class names, which are the names of the folders in train."""
    names = sorted(folders[0] for folders in classes["train"].values())
    if not names:
        path = splits["train"]
        called_train = "; for a class called train: train/train" if path.name == "train" else ""
        raise UserError(
            f"dataset 'folder': {path} has no subdirectories\n  expected: one subdirectory per class that contains "
            f"its images{called_train}; labels in tables (CSV, JSON) are not read"
        )
    for split, found in classes.items():
        unknown = sorted({*found} - {*classes["train"]})
        if unknown:
            same = [name for name in names if name.strip().casefold() == unknown[0].strip().casefold()]
            way_out = (
                f"it has {same[0]!r}: use the same name" if same else "remove the folder, or add the class to train"
            )
            path = listing.printable(str(splits[split] / found[unknown[0]][0]))
            raise UserError(f"dataset 'folder': {path} is a class that train does not have\n  {way_out}")
    for split, found in classes.items():
        for name in sorted(itertools.chain.from_iterable(found.values())):
            _check_inner(splits[split] / name, {*classes["train"]} - {_key(name)})
    return names


def _check_inner(path: Path, others: set[str]) -> None:
    """Checks that the folders in a class are not splits, nor other classes: they would be mixed."""
    inner = {entry.name for entry in listing.entries(path, LeftOut(path))[0]}
    shown = listing.printable(str(path))
    if _are_splits(inner):
        raise UserError(
            f"dataset 'folder': {shown}, the folder of a class, contains splits: {few(sorted(inner))}\n"
            "  expected: SPLIT/CLASS/IMAGE below config.data.dir; for the splits in this folder, set it to this folder"
        )
    if _HELD_OUT.fullmatch(path.name.lower()) and others & {*map(_key, inner)}:
        raise UserError(
            f"dataset 'folder': {shown} is a split beside classes: it contains {few(sorted(inner))}\n"
            "  move the classes beside it to a folder called train"
        )


def _files(root: Path, path: Path, folders: list[list[str]], left_out: LeftOut) -> list[tuple[str, int]]:
    """Returns the files of a split with the indices of their classes.

    Args:
        root: of the dataset.
        path: of the split.
        folders: the names of the folders of each class.
        left_out: what is left out is added to it.
    """
    found = []
    for label, names in enumerate(folders):
        for name in names:
            directory = path / name
            below = listing.files_below(directory, left_out, listing.parents_of(directory, root))
            relative, prefix = str(directory.relative_to(root)), len(str(directory))
            found += [(relative + file[prefix:], label) for file in below]
    return sorted(found, key=lambda file: hashlib.sha256(file[0].encode(errors="surrogateescape")).digest())


def _note(
    names: list[str], files: list[tuple[str, int]], classes: dict[str, list[str]], left_out: LeftOut
) -> str | None:
    """Returns one line: what was left out of a split, classes without images, and folders that are one class."""
    counts = collections.Counter(label for _, label in files)
    empty = [name for label, name in enumerate(names) if not counts[label]]
    merged = [folders[0] for folders in classes.values() if len(folders) > 1]
    alike = collections.Counter(name.casefold() for name in classes)
    cased = [name for name in classes if alike[name.casefold()] > 1]
    parts = [left_out.describe() or ""]
    inner = {os.path.basename(os.path.dirname(name)) for name, _ in files} - {*itertools.chain(*classes.values())}
    if len(names) == 1 and inner:
        parts.append(
            f"all images are one class, {listing.printable(names[0])}, although it has folders "
            f"({few(map(listing.printable, sorted(inner)))}); if these are classes, "
            f"set config.data.dir to {listing.printable(names[0])}"
        )
    reasons = {"without images": empty, "in folders of two Unicode forms": merged, "that differ only in case": cased}
    for reason, shown in reasons.items():
        if shown:
            parts.append(f"{len(shown):,} {'class' if len(shown) == 1 else 'classes'} {reason}: ")
            parts[-1] += few(map(listing.printable, shown))
    return "; ".join(filter(None, parts)) or None


def _in_several_classes(root: Path, files: list[tuple[str, int]]) -> str | None:
    """Returns a note about files of the same name and content in folders of several classes: which have two labels."""
    same_name: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for name, label in files:
        same_name[os.path.basename(name)].append((name, label))
    candidates = (
        (one, other)
        for several in same_name.values()
        for (one, label), (other, other_label) in itertools.pairwise(sorted(several))
        if label != other_label
    )
    found = []
    for one, other in itertools.islice(candidates, MAX_COMPARED):
        with contextlib.suppress(OSError):  # which is reported when the file is read
            if filecmp.cmp(root / one, root / other, shallow=False):
                found.append(f"{listing.printable(one)} and {listing.printable(other)}")
    if not found:
        return None
    count = "1 image is" if len(found) == 1 else f"{len(found):,} images are"
    return f"{count} in the folders of two classes, but an image has one label: {few(found, 1)}"


def fingerprint(root: Path, files: list[tuple[str, int]]) -> str:
    """Returns twelve characters that change when a file is added, removed, resized or modified.

    They also change with the rules by which images are decoded.
    """
    digest = hashlib.sha256(f"{images.RULES} {root.resolve()}".encode(errors="surrogateescape"))
    for name, _ in files:
        try:
            stat = os.stat(root / name)
        except OSError as error:
            path = listing.printable(str(root / name))
            raise UserError(
                f"{path} cannot be read: {error.strerror}\n  change its permissions, or remove it"
            ) from error
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:12]


def records(root: Path, files: list[tuple[str, int]]) -> lazy_images.Records:
    """Returns the files as records."""

    def read(index: int, size: lazy_images.Size, how: Preparation = COVER):
        name, label = files[index]
        try:
            return images.decode(root / name, size, how), label
        except images.ImageError as error:
            raise UserError(
                f"{listing.printable(str(root / name))} cannot be read as an image: {error}\n"
                "  remove it, or set config.data.skip_broken=True to skip unreadable files"
            ) from error

    return lazy_images.Records(len(files), read, lambda index: str(root / files[index][0]))


def skip_broken(
    root: Path, files: list[tuple[str, int]], kept: Path | None, say: Callable[[str], None] = terminal.warn
) -> list[tuple[str, int]]:
    """Returns the files that can be decoded; says the number of the others, and three of them with the reason.

    Args:
        root: directory that the files are relative to.
        files: all files, with their class indices.
        kept: file that caches the broken files and the reasons; None for no cache.
        say: called with these lines, if any file is skipped.

    Raises:
        UserError: none can be decoded, or the machine cannot read a file now.
    """
    broken = _read_broken(kept) if kept else None
    if broken is None:
        broken, is_final = _find_broken(root, files)
        if kept and is_final:
            with contextlib.suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
            cache.write(kept, atomic.to_json({"pillow": PIL.__version__, "broken": broken}).encode())
    if broken:
        named = [f"  {listing.printable(name)}: {reason}" for name, reason in sorted(broken.items())]
        if len(broken) == len(files):
            raise UserError(
                f"{root}: none of {len(files):,} files can be decoded, for example\n{named[0]}\n"
                "  convert them, or set another config.data.dir"
            )
        more = [f"  and {len(named) - 3:,} more"] if len(named) > 3 else []
        summary = f"skipping {len(broken):,} of {len(files):,} files that cannot be decoded:"
        say("\n".join([summary, *named[:3], *more]))
    return [file for file in files if file[0] not in broken]


def _read_broken(kept: Path) -> dict[str, str] | None:
    """Returns what is cached, unless another version of Pillow, which may read more, has found it."""
    try:
        found = json.loads(kept.read_text())
        return found["broken"] if found["pillow"] == PIL.__version__ else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _find_broken(root: Path, files: list[tuple[str, int]]) -> tuple[dict[str, str], bool]:
    """Returns the files that cannot be decoded with the reasons, and whether none of them may be readable later."""
    broken, is_final = {}, []

    def check(index: int) -> None:
        name, _ = files[index]
        try:
            images.load(root / name, 3)
        except images.ImageError as error:
            broken[name] = str(error)
            is_final.append(error.is_final)

    with Counter("reading", len(files), "files") as counter:
        for _ in counter.over(lazy_images.map_in_threads(check, range(len(files)))):
            pass
    return broken, all(is_final)
