"""From the name of a data set to a `Source`: its images and labels as arrays of 8-bit integers on the host.

`digits` lies inside the package; `folder` and `arrays` are files of your own. Every other name is a set of TensorFlow
Datasets (TFDS), prepared as array_record files and read without TensorFlow: decoded once, kept on disk, memory-mapped
from then on. CIFAR-10 and CIFAR-100 are downloaded (archives.py) and prepared (prepare.py) at their first use.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, Integer, UInt8

from vit_jax.data import archives, arrays, cache, digits, folder, lazy_images, prepare, tfds
from vit_jax.data import splits as split_expressions
from vit_jax.data.spec import LABEL, Description
from vit_jax.errors import UserError

ImageSize = int | tuple[int, int] | None
LOCAL: dict[str, Callable[[Path, Path | None], Description]] = {"folder": folder.describe, "arrays": arrays.describe}
SETS: dict[str, Callable[[], Description]] = {"digits": digits.describe}


@dataclasses.dataclass(frozen=True, eq=False)
class LabelSet:
    """One kind of label: [examples] indices into its class names."""

    labels: Int32[np.ndarray, " examples"]
    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A part of a data set, and what normalising and naming it needs.

    Attributes:
        name: the set, such as `cifar10`.
        split: the expression that was asked for, such as `train[:98%]`.
        images: [examples, height, width, channels], 0 to 255; may be memory-mapped and is not to be written to. Of a
            set that is not kept decoded it is a `lazy.Encoded`, which has the same shape and decodes what is read; of
            stored features (`vit_jax.data.feature_store`), float32 [examples, width] or [examples, tokens, width].
        labels: [examples], the index into `class_names`.
        class_names: one name a class.
        mean, std: per channel, of pixels scaled to [0, 1], over all of the set's train split (over the split that is
            read where there is no train split), at the size of `images`.
        label: what the set calls `labels`.
        others: further labels of the same examples, by name.
        pieces: the stretches of stored splits that the examples are, in order.
    """

    name: str
    split: str
    images: (
        UInt8[np.ndarray, "examples height width channels"]
        | lazy_images.Encoded
        | Float32[np.ndarray, "examples *features"]
    )
    labels: Int32[np.ndarray, " examples"]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label: str = LABEL
    others: Mapping[str, LabelSet] = dataclasses.field(default_factory=dict)
    pieces: tuple[split_expressions.Piece, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self) -> Int32[np.ndarray, " examples"] | dict[str, Int32[np.ndarray, " examples"]]:
        """The labels; where there are several kinds, all of them by name, the first one first."""
        if not self.others:
            return self.labels
        return {self.label: self.labels, **{name: others.labels for name, others in self.others.items()}}

    def classes(self) -> int | dict[str, int]:
        """The number of classes; where there are several kinds of label, that of each by name."""
        if not self.others:
            return len(self.class_names)
        return {self.label: len(self.class_names), **{name: len(o.class_names) for name, o in self.others.items()}}

    def ids(self) -> list[str]:
        """A name for each example that does not depend on the expression it was asked for by: 'train:17'."""
        pieces = self.pieces or (split_expressions.Piece(self.split, 0, len(self)),)
        return [f"{piece.split}:{place}" for piece in pieces for place in range(piece.start, piece.stop)]

    def read(
        self, indices: Integer[np.ndarray, " batch"] | Sequence[int]
    ) -> UInt8[np.ndarray, "batch height width channels"] | Float32[np.ndarray, "batch *features"]:
        """The images at `indices`, copied into memory."""
        return np.asarray(self.images[np.asarray(indices, np.intp)])

    def describe(self, place: int) -> str:
        """Where an example comes from, for whoever has to find it."""
        if isinstance(self.images, lazy_images.Encoded):
            records, stored = self.images.locate(place)
            return records.describe(stored)
        return f"example {place:,} of {self.name} {self.split}"


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_size: ImageSize = None,
    decoded: bool = True,
    skip_broken: bool = False,
    labels: Sequence[str] = (LABEL,),
) -> Source:
    """Opens a part of a data set; the first time, decodes (for CIFAR, downloads and prepares) it.

    Args:
        name: `digits`, `folder`, `arrays`, or a set of TFDS as `name`, `name/config` or `name/config:version`.
        split: an expression such as `train[:98%]`, see `vit_jax.data.splits.parse`.
        data_dir: where prepared TFDS sets lie; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets. The folder of
            images or of NumPy's files.
        cache_dir: where decoded images are kept; by default $XDG_CACHE_HOME/vit_jax/data, else ~/.cache/vit_jax/data.
        image_size: pixels of a side, or (height, width): images are scaled to cover it and cropped at the centre.
            None leaves them as they are, which a set of images of different sizes does not allow.
        decoded: keep the decoded images on disk; False decodes them anew each time they are read.
        skip_broken: of a folder, leave out files that cannot be decoded, and say how many.
        labels: the kinds of label that are wanted, the first one first: `label`, or what the set has besides, as
            CIFAR-100's `coarse_label`.

    Raises:
        UserError: an unknown or unprepared set, one without images and labels of the supported kind, a bad split
            expression, a kind of label that it does not have, or images of different sizes without `image_size`.
    """
    data_dir = _data_dir(name, data_dir)
    archive = _missing_archive(name, data_dir)
    if archive:
        split_expressions.parse(split, archive.sizes)  # a mistake is worth knowing before a download
        _check_labels(name, archive.label_keys, labels)
        prepare.prepare(archive, data_dir=data_dir)
    root = cache.default_dir() if cache_dir is None else Path(cache_dir).expanduser()
    description = _describe(name, data_dir, root if skip_broken else None)
    _check_labels(name, description.labels, labels)
    pieces = split_expressions.parse(split, description.sizes)
    size = _target_size(description, image_size)
    if not decoded and description.records is not None:
        return _load_lazily(description, split, pieces, size, root, labels)
    stored = {piece.split: _stored_split(description, piece.split, size, root) for piece in pieces}
    reference = "train" if "train" in description.sizes else pieces[0].split
    if reference not in stored:
        stored[reference] = _stored_split(description, reference, size, root)
    mean, std = cache.mean_and_std(stored[reference])
    folders = {split: arrays.folder for split, arrays in stored.items()}
    whole = {split: arrays.labels for split, arrays in stored.items()}
    images = _join([stored[piece.split].images[piece.start : piece.stop] for piece in pieces])
    first, others = _label_sets(description, labels, pieces, whole, folders, split)
    return Source(name, split, images, first.labels, first.class_names, mean, std, labels[0], others, pieces)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _label_sets(
    description: Description,
    kinds: Sequence[str],
    pieces: tuple[split_expressions.Piece, ...],
    whole: Mapping[str, np.ndarray],
    folders: Mapping[str, Path | None],
    split: str,
) -> tuple[LabelSet, dict[str, LabelSet]]:
    """The labels of all the examples: of the first kind, and of the others by name.

    Of each stored split, `whole` has the labels of the kind `label`, and `folders` a place to keep the others.
    """
    sets = {}
    for kind in kinds:
        parts = []
        for piece in pieces:
            labels = whole[piece.split]
            if kind != LABEL:
                fill = functools.partial(description.read_labels, piece.split, kind)
                labels = cache.more_labels(folders[piece.split], kind, len(labels), fill)
            parts.append(labels[piece.start : piece.stop])
        labels = _join(parts)
        if labels.min() < 0:
            raise UserError(
                f"data set {description.name!r}: the split {split!r} has examples without a {kind}; "
                "choose another split."
            )
        sets[kind] = LabelSet(labels, description.labels[kind])
    return sets.pop(kinds[0]), sets


def _load_lazily(
    description: Description,
    split: str,
    pieces: tuple[split_expressions.Piece, ...],
    size: tuple[int, int],
    root: Path,
    kinds: Sequence[str],
) -> Source:
    """A source whose images are decoded when they are read, after one look through them."""
    shape, name = (*size, description.shape[2]), description.name
    reference = "train" if "train" in description.sizes else pieces[0].split
    splits = list(dict.fromkeys([piece.split for piece in pieces] + [reference]))
    place = lambda stored: f"{stored}-{size[0]}x{size[1]}-known"  # noqa: E731
    folders = {stored: root / description.key / place(stored) if description.key else None for stored in splits}
    known = {
        stored: lazy_images.survey(description.records(stored), shape, folders[stored], f"{name} {stored}")
        for stored in splits
    }
    parts = tuple((description.records(piece.split), range(piece.start, piece.stop)) for piece in pieces)
    whole = {stored: one.labels for stored, one in known.items()}
    first, others = _label_sets(description, kinds, pieces, whole, folders, split)
    statistics, images = (known[reference].mean, known[reference].std), lazy_images.Encoded(parts, shape)
    return Source(name, split, images, first.labels, first.class_names, *statistics, kinds[0], others, pieces)


def _check_labels(name: str, known: Collection[str], labels: Sequence[str]) -> None:
    for kind in labels:
        if kind not in known:
            raise UserError(f"config.data.labels: {name} has no {kind!r}\n  it has: {', '.join(known)}")
    if len(set(labels)) < len(labels):
        raise UserError(f"config.data.labels: {', '.join(labels)} names one twice")


def check(
    name: str,
    splits: Sequence[str],
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_size: ImageSize = None,
    labels: Sequence[str] = (LABEL,),
) -> tuple[int, int, int]:
    """Finds out within two seconds, decoding nothing, whether `load` can be expected to work for all these splits.

    Returns the (height, width, channels) that its images will have.

    A CIFAR set that is not prepared passes where the host that it is downloaded from accepts a connection. `cache_dir`
    is not looked at, since `load` does without one that cannot be used.

    Raises:
        UserError: as `load`; or the set is not prepared and its host is out of reach.
    """
    del cache_dir
    data_dir = _data_dir(name, data_dir)
    archive = _missing_archive(name, data_dir)
    if archive:
        for split in splits:
            split_expressions.parse(split, archive.sizes)
        _check_labels(name, archive.label_keys, labels)
        archives.check_reachable(archive)
        return (*_size(archives.SHAPE, image_size), archives.SHAPE[2])
    description = _describe(name, data_dir, None)
    _check_labels(name, description.labels, labels)
    size = _target_size(description, image_size)
    for split in splits:
        split_expressions.parse(split, description.sizes)
    return (*size, description.shape[2])


def kinds(name: str, data_dir: str | os.PathLike | None = None) -> tuple[str, ...]:
    """The kinds of label that a prepared set has, `label` first."""
    return tuple(_describe(name, _data_dir(name, data_dir), None).labels)


def _data_dir(name: str, data_dir: str | os.PathLike | None) -> Path:
    if name in LOCAL and data_dir is None:
        raise UserError(f"data set {name!r}: give its folder as config.data.dir")
    return prepare.default_data_dir() if data_dir is None else Path(data_dir).expanduser()


def _missing_archive(name: str, data_dir: Path) -> archives.Archive | None:
    """The archive to prepare `name` from, where there is one and the set is not prepared yet."""
    archive = archives.ARCHIVES.get(name)
    return archive if archive and tfds.builder_of(name, data_dir) is None else None


def _describe(name: str, data_dir: Path, skipped: Path | None) -> Description:
    """What is known of a set; `skipped` is where a list of broken files is kept, where they are to be left out."""
    if name in SETS:
        return SETS[name]()
    if name in LOCAL:
        return LOCAL[name](data_dir, skipped)
    return tfds.describe(name, data_dir, SETS)


def _target_size(description: Description, image_size: ImageSize) -> tuple[int, int]:
    if image_size is None and None in description.shape:
        raise UserError(
            f"data set {description.name!r}: its images differ in size.\nGive config.data.image_size, for example 224."
        )
    return _size(description.shape, image_size)


def _size(shape: tuple[int | None, int | None, int], image_size: ImageSize) -> tuple[int, int]:
    if image_size is None:
        return shape[:2]
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise UserError(f"config.data.image_size: {image_size} given; at least 1 pixel is needed.")
    return height, width


def _stored_split(description: Description, split: str, size: tuple[int, int], root: Path) -> cache.Arrays:
    """A whole stored split, decoded at `size`: from the cache, or decoded into it."""
    shape = (description.sizes[split], *size, description.shape[2])
    fill = functools.partial(description.decode, split)
    if description.key is None:
        return cache.in_memory(shape, fill)
    folder = root / description.key / f"{split}-{size[0]}x{size[1]}"
    return cache.open_or_make(folder, shape, fill, title=f"{description.name} {split}")
