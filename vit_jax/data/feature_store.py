"""Features of a backbone on disk, with labels and example ids; they can be read as a `Source`.

A split is one `.npz` file, or a directory of `.npy` files, whose features are memory-mapped. Both contain

    features          float32 [examples, width], or [examples, tokens, width] of a model without pooling
    labels            int32 [examples], the kind `label`
    labels_<kind>     int32 [examples], for each further kind of label
    ids               text [examples], '<stored split>:<index in it>'
    about             JSON text: set, split, class names, image shape, and the digest of the backbone

Features of images without labels (`write_images`) have paths as ids, and possibly an axis of layers and `patches`.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float32, Int32

from vit_jax import atomic, paths
from vit_jax.data import finite
from vit_jax.data.labels import check_range
from vit_jax.data.sources import LabelSet, Source
from vit_jax.data.spec import LABEL
from vit_jax.errors import UserError, few

SUFFIX = ".npz"


@dataclasses.dataclass(frozen=True, eq=False)
class StoredFeatures:
    """The features of one split.

    Attributes:
        path: file or directory.
        features: [examples, width] or [examples, tokens, width]; memory-mapped if `path` is a directory.
        labels: [examples], by kind of label.
        ids: [examples].
        about: see the module's docstring.
    """

    path: Path
    features: Float32[np.ndarray, "examples *features"]
    labels: Mapping[str, Int32[np.ndarray, " examples"]]
    ids: np.ndarray
    about: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that the features were computed from."""
        return tuple(self.about["image_shape"])

    @property
    def backbone(self) -> str:
        """Digest of the parameters of the backbone."""
        return self.about["backbone"]

    def source(self, kinds: Sequence[str]) -> "FeatureSource":
        """Returns a source with the features as its images, and labels of these kinds.

        Raises:
            UserError: a kind of label is missing.
        """
        for kind in kinds:
            if kind not in self.labels:
                raise UserError(f"config.data.labels: {self.path} has no {kind!r}\n  allowed: {', '.join(self.labels)}")
        sets = {kind: LabelSet(self.labels[kind], tuple(self.about["class_names"][kind])) for kind in kinds}
        first = sets.pop(kinds[0])
        named = (self.about["name"], self.about["split"], self.features, first.labels, first.class_names)
        return FeatureSource(*named, mean=(), std=(), label=kinds[0], others=sets, stored=self)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSource(Source):
    """A `Source` whose `images` are stored features: float32 [examples, width] or [examples, tokens, width].

    Attributes:
        stored: where they come from; `mean` and `std`, which normalize images, are empty.
    """

    stored: StoredFeatures | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that the features were computed from."""
        return self.stored.image_shape


def write(path: Path, shape: tuple[int, ...], blocks: Iterable[np.ndarray], source: Source, about: dict) -> None:
    """Writes the features of a split atomically; replaces existing features.

    Args:
        path: a file ending in .npz, or a directory.
        shape: shape of all features.
        blocks: the features of some examples at a time, in order; only one block is in memory at once.
        source: the examples, with every kind of label to store.
        about: `step`, `image_shape` and `backbone`.

    Raises:
        UserError: the path cannot be written, or its disk has not enough space.
    """
    check_path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.parts")  # not the name that `atomic.replace` uses
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(path, shape)
        scratch.mkdir()
        features = np.lib.format.open_memmap(scratch / "features.npy", mode="w+", dtype=np.float32, shape=shape)
        with open(scratch / "features.npy", "r+b") as file:  # a disk that fills under a mapped file kills the process
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(scratch / "features.npy"))
        start = 0
        for block in blocks:
            _check_finite(f"{path} is not written", block, start, source.ids)
            features[start : start + len(block)] = block
            start += len(block)
        features.flush()
        _finish(path, scratch, {"features": features}, _metadata(source, about))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}\n  use another --out") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_images(path: Path, parts: Iterable[tuple[str, Mapping[str, np.ndarray]]], about: dict) -> int:
    """Writes the features of images without labels atomically, and returns their number; replaces existing features.

    Args:
        path: a file ending in .npz, or a directory.
        parts: id and arrays of each image, which have the same names and shapes; one image is in memory at a time.
        about: `image_shape` and `backbone`.

    Raises:
        UserError: the path cannot be written, there are no images, or features are not finite.
    """
    check_path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.parts")
    ids, shapes = [], {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        with contextlib.ExitStack() as stack:
            files: dict[str, IO[bytes]] = {}
            for identity, arrays in parts:
                ids.append(identity)
                for name, array in arrays.items():
                    if name not in files:
                        files[name] = stack.enter_context(open(scratch / name, "wb"))
                        shapes[name] = array.shape
                    _check_finite(f"{path} is not written", array.reshape(1, -1), len(ids) - 1, lambda: ids)
                    files[name].write(np.ascontiguousarray(array, np.float32).data)
        if not ids:
            raise UserError(f"{path} is not written: no image could be read\n  give a directory of images")
        raw = {n: np.memmap(scratch / n, np.float32, "r", shape=(len(ids), *s)) for n, s in shapes.items()}
        about = {**about, "name": "images", "split": "all", "class_names": {}}
        _finish(path, scratch, raw, {"ids": np.array(ids), "about": np.array(atomic.to_json(about))})
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}\n  use another --out") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(ids)


def check_path(path: Path) -> None:
    """Raises UserError if `path` exists and is something other than features, which must not be replaced."""
    if not path.name or path.name == "..":
        raise UserError(f"--out={path} is not a file name\n  allowed: FILE.npz, or a new directory")
    unknown = []
    if path.suffix == SUFFIX:
        unknown = [path] if path.is_dir() else []
    elif path.is_dir():
        ours = ("features", "labels", "ids", "about", "patches")
        unknown = [entry for entry in path.iterdir() if entry.suffix != ".npy" or not entry.name.startswith(ours)]
    elif path.exists():
        unknown = [path]
    if unknown:
        raise UserError(
            f"--out={path} exists and contains something other than features: {unknown[0].name}\n"
            "  allowed: FILE.npz, or a new directory"
        )


def _check_room(path: Path, shape: tuple[int, ...]) -> None:
    # The .npz file is created from the memory-mapped array, so for a moment both exist.
    needed = 4 * math.prod(shape) * (2 if path.suffix == SUFFIX else 1) + 2**20
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free\n  use another --out"
        )


def _metadata(source: Source, about: dict) -> dict[str, np.ndarray]:
    """Returns the arrays that are stored together with the features."""
    sets = {source.label: LabelSet(source.labels, source.class_names), **source.others}
    names = {kind: list(label_set.class_names) for kind, label_set in sets.items()}
    about = {**about, "name": source.name, "split": source.split, "class_names": names}
    labels = {_key(kind): label_set.labels for kind, label_set in sets.items()}
    return {**labels, "ids": np.array(source.ids()), "about": np.array(atomic.to_json(about))}


def _finish(path: Path, scratch: Path, mapped: dict[str, np.memmap], arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays; those that are mapped are in `scratch`, as NAME.npy or without a header as NAME."""
    if path.suffix == SUFFIX:
        with atomic.replace(path) as file:
            np.savez(file, **mapped, **arrays)
        return
    for name, array in {**mapped, **arrays}.items():
        if not (scratch / f"{name}.npy").exists():
            np.save(scratch / f"{name}.npy", array)
            (scratch / name).unlink(missing_ok=True)
    before = scratch.with_name(f"{scratch.name}.before")
    if path.exists():
        os.rename(path, before)
    atomic.sync_and_rename(scratch, path)
    shutil.rmtree(before, ignore_errors=True)


def _key(kind: str) -> str:
    return "labels" if kind == LABEL else f"labels_{kind}"


def read(path: str | bytes | os.PathLike) -> StoredFeatures:
    """Returns the features of a file or directory written by `write`.

    Raises:
        UserError: it does not exist, is damaged, or is something else.
    """
    path = paths.expand(path, "path")
    try:
        if path.is_dir():
            files = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in path.glob("*.npy")}
            arrays = {name: array if name == "features" else np.array(array) for name, array in files.items()}
        else:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        about = json.loads(str(arrays["about"]))
        labels = {kind: arrays[_key(kind)] for kind in about["class_names"]}
        if {len(array) for array in (arrays["ids"], *labels.values())} != {len(arrays["features"])}:
            raise ValueError("features, labels and ids differ in their number of examples")
        if arrays["features"].dtype.kind != "f" or any(array.dtype.kind not in "iu" for array in labels.values()):
            raise ValueError("features must be floats, and labels integers")
        if arrays["features"].dtype != np.float32:
            with np.errstate(over="ignore"):  # an infinity is found below
                arrays["features"] = arrays["features"].astype(np.float32)
        stored = StoredFeatures(path, arrays["features"], labels, arrays["ids"], about)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist\n  create it: python -m vit_jax.features --help") from error
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} does not contain readable features: {reason}\n  create it: python -m vit_jax.features --help"
        ) from error
    _check_finite(str(path), stored.features, 0, stored.ids.tolist)
    for kind, values in labels.items():
        check_range(values, about["class_names"][kind], f"{path}: {_key(kind)}")
    return stored


def _check_finite(where: str, features: np.ndarray, first: int, ids: Callable[[], list[str]]) -> None:
    """Raises UserError if features have a NaN or an infinity; names their examples.

    Args:
        where: the file.
        features: of some examples.
        first: index of the first of them.
        ids: returns the ids of all examples.
    """
    rows = finite.not_finite_rows(features)
    if len(rows):
        named = few([ids()[first + row] for row in rows])
        raise UserError(
            f"{where}: the features of {len(rows):,} examples are not finite: {named}\n"
            "  recompute them with other parameters: python -m vit_jax.features --help"
        )


def find(folder: Path, role: str) -> Path:
    """Returns the path of the features of 'train', 'validation' or 'test': for example `train.npz`, or `train`.

    Raises:
        UserError: there are none.
    """
    for path in (folder / f"{role}{SUFFIX}", folder / role):
        if path.exists():
            return path
    raise UserError(
        f"config.data.features: {folder} has no features of the {role} split\n"
        f"  create them: python -m vit_jax.features --workdir=DIR --split={role} --out={folder / role}{SUFFIX}"
    )
