"""Features that a backbone has computed once, with labels and ids: written, and read as a `Source`.

One split is one `.npz` file, or a folder of `.npy` files that are memory-mapped when they are read. Either holds

    features          float32 [examples, width], or [examples, tokens, width] of a model without pooling
    labels            int32 [examples], the set's `label`
    labels_<kind>     int32 [examples], each further kind of label
    ids               text [examples], '<stored split>:<place in it>'
    about             a JSON text: set, split, class names, image shape, and the digest of the backbone
"""

import dataclasses
import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from vit_jax.data.sources import LabelSet, Source
from vit_jax.data.spec import LABEL
from vit_jax.errors import UserError

SUFFIX = ".npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """The features of one split.

    Attributes:
        path: where they lie.
        features: [examples, width] or [examples, tokens, width]; memory-mapped where `path` is a folder.
        labels: [examples], by kind.
        ids: [examples].
        about: see the module.
    """

    path: Path
    features: Float32[np.ndarray, "examples *features"]
    labels: Mapping[str, Int32[np.ndarray, " examples"]]
    ids: np.ndarray
    about: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that the features are of."""
        return tuple(self.about["image_shape"])

    @property
    def backbone(self) -> str:
        """The digest of the parameters that they were computed with."""
        return self.about["backbone"]

    def source(self, kinds: Sequence[str]) -> Source:
        """The features in place of images, with the labels of these kinds.

        Raises:
            UserError: there are no labels of one of the kinds.
        """
        for kind in kinds:
            if kind not in self.labels:
                raise UserError(f"config.data.labels: {self.path} has no {kind!r}\n  it has: {', '.join(self.labels)}")
        sets = {kind: LabelSet(self.labels[kind], tuple(self.about["class_names"][kind])) for kind in kinds}
        first = sets.pop(kinds[0])
        about = self.about
        return Source(
            about["name"], about["split"], self.features, first.labels, first.class_names, (), (), kinds[0], sets
        )


def write(path: Path, shape: tuple[int, ...], blocks: Iterable[np.ndarray], source: Source, about: dict) -> None:
    """Writes the features of a split, whole or not at all; what was there before is replaced.

    Args:
        path: a file ending in .npz, or a folder.
        shape: of all features.
        blocks: they themselves, some examples at a time, in order; never more than one block is in memory.
        source: whose they are, with every kind of label that is to be stored.
        about: `step`, `image_shape` and `backbone`.

    Raises:
        UserError: the place cannot be written to, or its disk has no room.
    """
    check_place(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(path, shape)
        scratch.mkdir()
        features = np.lib.format.open_memmap(scratch / "features.npy", mode="w+", dtype=np.float32, shape=shape)
        with open(scratch / "features.npy", "r+b") as file:  # a disk that fills under a mapped file kills the process
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(scratch / "features.npy"))
        start = 0
        for block in blocks:
            features[start : start + len(block)] = block
            start += len(block)
        features.flush()
        _finish(path, scratch, features, _beside(source, about))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}\n  give another --out") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_place(path: Path) -> None:
    """Raises UserError where what is at `path` are no features, and must not be replaced by them."""
    if not path.name or path.name == "..":
        raise UserError(f"--out={path} is no name\n  give FILE.npz, or a folder that is to be made")
    strange = []
    if path.suffix == SUFFIX:
        strange = [path] if path.is_dir() else []
    elif path.is_dir():
        ours = ("features", "labels", "ids", "about")
        strange = [entry for entry in path.iterdir() if entry.suffix != ".npy" or not entry.name.startswith(ours)]
    elif path.exists():
        strange = [path]
    if strange:
        raise UserError(
            f"--out={path} is there already, and holds what are no features: {strange[0].name}\n"
            "  give the name of a file ending in .npz, or of a folder that is to be made"
        )


def _check_room(path: Path, shape: tuple[int, ...]) -> None:
    # A file is made from the mapped array beside it, and for a moment both are there.
    needed = 4 * math.prod(shape) * (2 if path.suffix == SUFFIX else 1) + 2**20
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path} does not fit: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free\n  give another --out"
        )


def _beside(source: Source, about: dict) -> dict[str, np.ndarray]:
    """The arrays that are stored beside the features."""
    sets = {source.label: LabelSet(source.labels, source.class_names), **source.others}
    names = {kind: list(one.class_names) for kind, one in sets.items()}
    about = {**about, "name": source.name, "split": source.split, "class_names": names}
    labels = {_key(kind): one.labels for kind, one in sets.items()}
    return {**labels, "ids": np.array(source.ids()), "about": np.array(json.dumps(about))}


def _finish(path: Path, scratch: Path, features: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    if path.suffix == SUFFIX:
        np.savez(scratch / "all.npz", features=features, **arrays)
        os.replace(scratch / "all.npz", path)
        return
    for name, array in arrays.items():
        np.save(scratch / f"{name}.npy", array)
    before = scratch.with_name(f"{scratch.name}.before")
    if path.exists():
        os.rename(path, before)
    os.rename(scratch, path)
    shutil.rmtree(before, ignore_errors=True)


def _key(kind: str) -> str:
    return "labels" if kind == LABEL else f"labels_{kind}"


def read(path: Path) -> Stored:
    """The features of a file or folder that `finish` wrote.

    Raises:
        UserError: there is none, or it is damaged or something else.
    """
    try:
        if path.is_dir():
            files = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in path.glob("*.npy")}
            arrays = {name: array if name == "features" else np.array(array) for name, array in files.items()}
        else:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        about = json.loads(str(arrays["about"]))
        labels = {kind: arrays[_key(kind)] for kind in about["class_names"]}
        return Stored(path, arrays["features"], labels, arrays["ids"], about)
    except FileNotFoundError as error:
        raise UserError(f"there are no features in {path}\n  make them: python -m vit_jax.features --help") from error
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} holds no features that can be read: {reason}\n  make them again: python -m vit_jax.features --help"
        ) from error


def find(folder: Path, role: str) -> Path:
    """The features of 'train', 'validation' or 'test' in a folder: `train.npz`, or the folder `train`.

    Raises:
        UserError: there are none.
    """
    for path in (folder / f"{role}{SUFFIX}", folder / role):
        if path.exists():
            return path
    raise UserError(
        f"config.data.features: {folder} has no features of the {role} split\n"
        f"  make them: python -m vit_jax.features --workdir=DIR --split={role} --out={folder / role}{SUFFIX}"
    )
