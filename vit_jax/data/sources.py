"""From the name of a dataset to a `Source`: its images as uint8 arrays on the host, and its labels.

`digits` is part of the package; `folder` and `arrays` are the user's own files. Every other name is a set of TensorFlow
Datasets (TFDS), prepared as array_record files and read without TensorFlow: decoded once, cached on disk, and
memory-mapped afterwards. CIFAR-10 and CIFAR-100 are downloaded (archives.py) and prepared (prepare.py) on first use.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, Integer, UInt8

from vit_jax import arguments, paths, terminal
from vit_jax.data import archives, arrays, cache, digits, folder, lazy_images, prepare, tfds
from vit_jax.data import splits as split_expressions
from vit_jax.data.labels import check_range
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.data.spec import LABEL, DatasetSpec
from vit_jax.errors import UserError

ImageSize = int | np.integer | tuple[int, int] | None
# The user's own files: function(data_dir, skip_lists, held_out).
LOCAL: dict[str, Callable[[Path, Path | None, float | None], DatasetSpec]] = {
    "folder": folder.dataset_spec,
    "arrays": arrays.dataset_spec,
}
BUILT_IN: dict[str, Callable[[], DatasetSpec]] = {"digits": digits.dataset_spec}


@dataclasses.dataclass(frozen=True, eq=False)
class LabelSet:
    """One kind of label: [examples] indices into `class_names`."""

    labels: Int32[np.ndarray, " examples"]
    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The examples of a split expression, with the statistics of the dataset.

    Attributes:
        name: name of the set, such as `cifar10`.
        split: the split expression, such as `train[:98%]`.
        images: [examples, height, width, channels], 0 to 255; may be memory-mapped and must not be written to. With
            `decoded=False` it is a `LazyImages` of the same shape, which decodes images when they are read; for stored
            features (`vit_jax.data.feature_store`) it is float32 [examples, width] or [examples, tokens, width].
        labels: [examples] indices into `class_names`.
        class_names: one name per class.
        mean, std: per channel, of pixels scaled to [0, 1], over the whole train split of the set at the size of
            `images`; over the split that is read if there is no train split, or `load` is asked for them. Empty for
            stored features.
        label: name of the kind of label in `labels`.
        others: further kinds of label of the same examples, by name.
        pieces: the ranges of stored splits that the examples come from, in order.
        records: records(split) returns the encoded examples of a stored split; None if there are none.
    """

    name: str
    split: str
    images: (
        UInt8[np.ndarray, "examples height width channels"]
        | lazy_images.LazyImages
        | Float32[np.ndarray, "examples *features"]
    )
    labels: Int32[np.ndarray, " examples"]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label: str = LABEL
    others: Mapping[str, LabelSet] = dataclasses.field(default_factory=dict)
    pieces: tuple[split_expressions.Piece, ...] = ()
    records: Callable[[str], lazy_images.Records] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return tuple(self.images.shape[1:])

    def targets(self) -> Int32[np.ndarray, " examples"] | dict[str, Int32[np.ndarray, " examples"]]:
        """Returns the labels, or for several kinds of label a dictionary of them by name, starting with `label`."""
        return self.labels_by_kind() if self.others else self.labels

    def labels_by_kind(self) -> dict[str, Int32[np.ndarray, " examples"]]:
        """Returns the labels of each kind, by its name; `label` first."""
        return {self.label: self.labels, **{name: one.labels for name, one in self.others.items()}}

    def classes(self) -> int | dict[str, int]:
        """Returns the number of classes, or for several kinds of label a dictionary of these numbers by name."""
        if not self.others:
            return len(self.class_names)
        return {self.label: len(self.class_names), **{name: len(o.class_names) for name, o in self.others.items()}}

    def class_names_by_label(self) -> dict[str, tuple[str, ...]]:
        """The class names of each kind of label, by its name; `label` first."""
        return {self.label: self.class_names, **{name: one.class_names for name, one in self.others.items()}}

    def ids(self) -> list[str]:
        """Returns an id for each example that does not depend on the split expression, such as 'train:17'."""
        pieces = self.pieces or (split_expressions.Piece(self.split, 0, len(self)),)
        return [f"{piece.split}:{index}" for piece in pieces for index in range(piece.start, piece.stop)]

    def paths(self) -> list[str] | None:
        """Returns the path of each example's file; None if the examples are not files of their own."""
        if self.name != "folder" or self.records is None:
            return None
        ranges = [(self.records(piece.split), range(piece.start, piece.stop)) for piece in self.pieces]
        return [records.describe(index) for records, indices in ranges for index in indices]

    def read(
        self, indices: Integer[np.ndarray, " batch"] | Sequence[int]
    ) -> UInt8[np.ndarray, "batch height width channels"] | Float32[np.ndarray, "batch *features"]:
        """Returns the images at `indices`, copied into memory; a mask or numbers that are no indices are refused."""
        return np.asarray(self.images[arguments.indices("indices", indices, len(self))])

    def describe(self, index: int) -> str:
        """Returns where an example is stored, for error messages."""
        if isinstance(self.images, lazy_images.LazyImages):
            records, record = self.images.locate(index)
            return records.describe(record)
        return f"example {index:,} of {self.name} {self.split}"


def load(
    name: str,
    split: str,
    *,
    data_dir: str | bytes | os.PathLike | None = None,
    cache_dir: str | bytes | os.PathLike | None = None,
    image_size: ImageSize = None,
    decoded: bool | np.bool_ = True,
    skip_broken: bool | np.bool_ = False,
    held_out: float | None = None,
    labels: Sequence[str] = (LABEL,),
    own_statistics: bool | np.bool_ = False,
    preparation: Preparation = COVER,
) -> Source:
    """Returns the source of a split expression; on first use, decodes the set (and downloads and prepares CIFAR).

    Args:
        name: `digits`, `folder`, `arrays`, or a set of TFDS as `name`, `name/config` or `name/config:version`.
        split: an expression such as `train[:98%]`, see `vit_jax.data.splits.parse`.
        data_dir: directory of prepared TFDS sets, by default $TFDS_DATA_DIR or ~/tensorflow_datasets; for `folder` and
            `arrays`, the directory of their files.
        cache_dir: directory of decoded images; by default $XDG_CACHE_HOME/vit_jax/data, or ~/.cache/vit_jax/data.
        image_size: height and width in pixels, or (height, width): images are resized to cover it and cropped at the
            centre, or as `preparation` says. None keeps their size and requires that all have the same.
        decoded: cache the decoded images on disk; False decodes images each time they are read.
        skip_broken: for `folder`, leave out files that cannot be decoded, and print their number.
        held_out: for `folder` without a stored split `test`, the fraction of each class of `train` that becomes it.
        labels: the kinds of label to load, the primary one first: `label`, or another of the set, such as CIFAR-100's
            `coarse_label`.
        own_statistics: take mean and std over the split that is read, so that `train` need not be decoded too.
        preparation: how images are resized and cropped to `image_size`; unused if all images of the set have that size.

    Raises:
        UserError: the set is unknown, not prepared, or has no images and labels of the supported kind; the split
            expression is malformed; the set lacks a kind of label; images differ in size without `image_size`; or an
            argument has the wrong type.
    """
    name, split, labels = (
        arguments.text("name", name),
        arguments.text("split", split),
        arguments.names("labels", labels),
    )
    decoded, skip_broken = arguments.boolean("decoded", decoded), arguments.boolean("skip_broken", skip_broken)
    own_statistics = arguments.boolean("own_statistics", own_statistics)
    data_dir = _data_dir(name, data_dir)
    archive = _missing_archive(name, data_dir)
    if archive:
        split_expressions.parse(split, archive.sizes)  # report mistakes before a download
        _check_labels(name, archive.label_keys, labels)
        prepare.prepare(archive, data_dir=data_dir)
    root = cache.default_dir() if cache_dir is None else paths.expand(cache_dir, "config.data.cache_dir")
    spec = _dataset_spec(name, data_dir, root if skip_broken else None, held_out)
    _check_labels(name, spec.class_names, labels)
    pieces = split_expressions.parse(split, spec.sizes, spec.notes)
    size = _target_size(spec, image_size)
    how = COVER if size == spec.shape[:2] else preparation
    for part in dict.fromkeys(piece.split for piece in pieces):
        if part in spec.skipped:
            terminal.warn(spec.skipped[part])
        if part in spec.notes:
            terminal.warn(f"{name} {part}: {spec.notes[part]}")
    if not decoded and spec.records is not None:
        return _load_lazily(spec, split, pieces, size, how, root, labels, own_statistics)
    reference = _statistics_split(spec, pieces, own_statistics)
    stored = {part: _decoded_split(spec, part, size, how, root) for part in _stored_splits(pieces, reference)}
    mean, std = cache.mean_and_std(stored[reference])
    folders = {part: arrays.folder for part, arrays in stored.items()}
    main_labels = {part: arrays.labels for part, arrays in stored.items()}
    images = _join([stored[piece.split].images[piece.start : piece.stop] for piece in pieces])
    first, others = _label_sets(spec, labels, pieces, main_labels, folders, split)
    named = first.class_names, mean, std, labels[0], others
    return Source(name, split, images, first.labels, *named, pieces, spec.records)


def _statistics_split(spec: DatasetSpec, pieces: tuple[split_expressions.Piece, ...], own: bool) -> str:
    return "train" if "train" in spec.sizes and not own else pieces[0].split


def _stored_splits(pieces: tuple[split_expressions.Piece, ...], reference: str) -> list[str]:
    return list(dict.fromkeys([*(piece.split for piece in pieces), reference]))


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _label_sets(
    spec: DatasetSpec,
    kinds: Sequence[str],
    pieces: tuple[split_expressions.Piece, ...],
    main_labels: Mapping[str, np.ndarray],
    folders: Mapping[str, Path | None],
    split: str,
) -> tuple[LabelSet, dict[str, LabelSet]]:
    """Returns the labels of the examples: of the first kind, and of the other kinds by name.

    Args:
        spec: the set.
        kinds: the kinds of label.
        pieces: the examples.
        main_labels: for each stored split, its labels of the kind `label`.
        folders: for each stored split, the directory where labels of other kinds are cached.
        split: the split expression, for error messages.
    """
    sets = {}
    for kind in kinds:
        parts = []
        for piece in pieces:
            labels = main_labels[piece.split]
            if kind != LABEL:
                fill = functools.partial(spec.read_labels, piece.split, kind)
                labels = cache.extra_labels(folders[piece.split], kind, len(labels), fill)
            parts.append(labels[piece.start : piece.stop])
        labels = _join(parts)
        if labels.min() < 0:
            raise UserError(
                f"dataset {spec.name!r}: split {split!r} has examples without a {kind}\n  choose another split"
            )
        check_range(labels, spec.class_names[kind], f"dataset {spec.name!r}: split {split!r}, {kind}")
        sets[kind] = LabelSet(labels, spec.class_names[kind])
    return sets.pop(kinds[0]), sets


def _load_lazily(
    spec: DatasetSpec,
    split: str,
    pieces: tuple[split_expressions.Piece, ...],
    size: tuple[int, int],
    how: Preparation,
    root: Path,
    kinds: Sequence[str],
    own_statistics: bool,
) -> Source:
    """Returns a source whose images are decoded when they are read; scans the splits first."""
    shape, name = (*size, spec.shape[2]), spec.name
    reference = _statistics_split(spec, pieces, own_statistics)
    folders, scanned = {}, {}
    for part in _stored_splits(pieces, reference):
        kept = f"{part}-{size[0]}x{size[1]}{how.suffix}-known"
        folders[part] = root / spec.cache_key / kept if spec.cache_key else None
        scanned[part] = lazy_images.scan(spec.records(part), shape, folders[part], f"{name} {part}", how)
    parts = tuple((spec.records(piece.split), range(piece.start, piece.stop)) for piece in pieces)
    main_labels = {part: result.labels for part, result in scanned.items()}
    first, others = _label_sets(spec, kinds, pieces, main_labels, folders, split)
    statistics, images = (scanned[reference].mean, scanned[reference].std), lazy_images.LazyImages(parts, shape, how)
    named = first.class_names, *statistics, kinds[0], others
    return Source(name, split, images, first.labels, *named, pieces, spec.records)


def _check_labels(name: str, known: Collection[str], labels: Sequence[str]) -> None:
    for kind in labels:
        if kind not in known:
            raise UserError(f"config.data.labels: {name} has no {kind!r}\n  allowed: {', '.join(known)}")
    if len(set(labels)) < len(labels):
        raise UserError(f"config.data.labels is {', '.join(labels)}\n  allowed: each kind of label once")


def check(
    name: str,
    splits: Sequence[str],
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_size: ImageSize = None,
    held_out: float | None = None,
    labels: Sequence[str] = (LABEL,),
) -> tuple[int, int, int]:
    """Checks within two seconds, without decoding, that `load` can load these splits; returns the shape of an image.

    The shape is (height, width, channels). A CIFAR set that is not prepared passes if its host accepts a connection.
    `cache_dir` is ignored, because `load` works without a usable cache.

    Raises:
        UserError: as `load`; or the set is not prepared and its host cannot be reached.
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
    spec = _dataset_spec(name, data_dir, None, held_out)
    _check_labels(name, spec.class_names, labels)
    size = _target_size(spec, image_size)
    for split in splits:
        split_expressions.parse(split, spec.sizes, spec.notes)
    return (*size, spec.shape[2])


def pieces(name: str, split: str, data_dir: str | os.PathLike | None = None) -> tuple[split_expressions.Piece, ...]:
    """Returns the parts of the stored splits that a split expression selects, as `splits.parse`; decodes nothing."""
    data_dir = _data_dir(name, data_dir)
    archive = _missing_archive(name, data_dir)
    return split_expressions.parse(split, archive.sizes if archive else _dataset_spec(name, data_dir, None).sizes)


def class_names(name: str, data_dir: str | os.PathLike | None = None) -> dict[str, tuple[str, ...]]:
    """Returns the class names of each kind of label, `label` first; decodes nothing, but downloads CIFAR as `load`."""
    data_dir = _data_dir(name, data_dir)
    if archive := _missing_archive(name, data_dir):
        prepare.prepare(archive, data_dir=data_dir)
    return dict(_dataset_spec(name, data_dir).class_names)


def _data_dir(name: str, data_dir: str | bytes | os.PathLike | None) -> Path:
    if name in LOCAL and data_dir is None:
        raise UserError(f"dataset {name!r}: config.data.dir is not set\n  set it to the directory of the dataset")
    if name in BUILT_IN and data_dir is not None:
        raise UserError(
            f"dataset {name!r} is part of the package: no data directory is used\n  given: {data_dir}; omit it"
        )
    if data_dir is not None:
        return paths.expand(data_dir, "config.data.dir")
    return Path() if name in BUILT_IN else prepare.default_data_dir()  # which a user without a home does not have


def _missing_archive(name: str, data_dir: Path) -> archives.Archive | None:
    """Returns the archive to prepare `name` from, or None if there is none or the set is prepared."""
    archive = archives.ARCHIVES.get(name)
    return archive if archive and tfds.builder_of(name, data_dir) is None else None


def _dataset_spec(
    name: str, data_dir: Path, skip_lists: Path | None = None, held_out: float | None = None
) -> DatasetSpec:
    """Returns the spec of a set; `skip_lists` is the directory of lists of broken files, None to keep these files."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name in LOCAL:
        return LOCAL[name](data_dir, skip_lists, held_out)
    return tfds.dataset_spec(name, data_dir, BUILT_IN)


def _target_size(spec: DatasetSpec, image_size: ImageSize) -> tuple[int, int]:
    if image_size is None and None in spec.shape:
        median = spec.median_size() if spec.median_size else None
        proposed, about = 224, "its images differ in size"
        if median is not None:
            proposed = max(16, min(224, min(median) // 16 * 16))
            about = f"the median size of its images is {median[0]}x{median[1]}"
        raise UserError(
            f"dataset {spec.name!r}: config.data.image_size is None, and {about}\n"
            f"  set it, for example --config.data.image_size={proposed}"
        )
    return _size(spec.shape, image_size)


def _size(shape: tuple[int | None, int | None, int], image_size: ImageSize) -> tuple[int, int]:
    if image_size is None:
        return shape[:2]
    size = arguments.size("config.data.image_size", image_size)
    return (size, size) if isinstance(size, int) else size


def _decoded_split(
    spec: DatasetSpec, split: str, size: tuple[int, int], how: Preparation, root: Path
) -> cache.DecodedSplit:
    """Returns a whole stored split decoded at `size`, from the cache if it is there."""
    shape = (spec.sizes[split], *size, spec.shape[2])

    def fill(images: np.ndarray, labels: np.ndarray) -> None:
        if spec.records is None:
            spec.decode(split, images, labels, how)
        else:
            lazy_images.decode_all(spec.records(split), images, labels, how)

    if spec.cache_key is None:
        return cache.in_memory(shape, fill)
    folder = root / spec.cache_key / f"{split}-{size[0]}x{size[1]}{how.suffix}"
    return cache.open_or_create(folder, shape, fill, title=f"{spec.name} {split}")
