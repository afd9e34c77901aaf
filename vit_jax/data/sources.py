"""From the name of a data set to a `Source`: its images and labels as arrays of 8-bit integers on the host.

`digits` lies inside the package. Every other name is a set of TensorFlow Datasets (TFDS), prepared as array_record
files and read without TensorFlow: decoded once, kept on disk, memory-mapped from then on. CIFAR-10 and CIFAR-100 are
downloaded and prepared at their first use (vit_jax/data/prepare.py).
"""

import dataclasses
import difflib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, Integer, UInt8

from vit_jax.data import arrays, cache, folder, lazy, prepare
from vit_jax.data import images as pictures
from vit_jax.data import splits as split_expressions
from vit_jax.data.images import resize_and_crop
from vit_jax.errors import UserError

_NAME = re.compile(r"^(?P<set>\w+)(/[\w.\-]+)?(:(?P<version>[\d.*]+))?$")
_CHUNK = 256  # examples that one thread reads and decodes at a time

ImageSize = int | tuple[int, int] | None
LABEL = "label"  # what TFDS calls the label of a set that has one


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
            stored features (`vit_jax.data.stored`), float32 [examples, width] or [examples, tokens, width].
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
        UInt8[np.ndarray, "examples height width channels"] | lazy.Encoded | Float32[np.ndarray, "examples *features"]
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
        if isinstance(self.images, lazy.Encoded):
            records, stored = self.images.locate(place)
            return records.describe(stored)
        return f"example {place:,} of {self.name} {self.split}"


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known of a set before anything of it is decoded.

    Attributes:
        name: the set.
        sizes: the examples of each stored split.
        labels: the class names of each kind of label.
        shape: height, width and channels; height and width are None where images differ in size.
        key: the folder in the cache, which changes when the stored set does; None for a set that needs no cache.
        decode: decode(split, images, labels) fills arrays of a whole stored split with its images, at their size, and
            the labels of the kind `label`.
        records: records(split) are its examples as they are stored; None for a set that is always kept decoded.
        read_labels: read_labels(split, kind, labels) fills an array with the labels of another kind; None where there
            is none.
    """

    name: str
    sizes: Mapping[str, int]
    labels: Mapping[str, tuple[str, ...]]
    shape: tuple[int | None, int | None, int]
    key: str | None
    decode: Callable[[str, np.ndarray, np.ndarray], None]
    records: Callable[[str], lazy.Records] | None = None
    read_labels: Callable[[str, str, np.ndarray], None] | None = None


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
        stored: lazy.survey(description.records(stored), shape, folders[stored], f"{name} {stored}")
        for stored in splits
    }
    parts = tuple((description.records(piece.split), range(piece.start, piece.stop)) for piece in pieces)
    whole = {stored: one.labels for stored, one in known.items()}
    first, others = _label_sets(description, kinds, pieces, whole, folders, split)
    statistics, images = (known[reference].mean, known[reference].std), lazy.Encoded(parts, shape)
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
        prepare.check_reachable(archive)
        return (*_size(prepare.SHAPE, image_size), prepare.SHAPE[2])
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


def _missing_archive(name: str, data_dir: Path) -> prepare.Archive | None:
    """The archive to prepare `name` from, where there is one and the set is not prepared yet."""
    archive = prepare.ARCHIVES.get(name)
    return archive if archive and _builder(name, data_dir) is None else None


def _describe(name: str, data_dir: Path, skipped: Path | None) -> Description:
    """What is known of a set; `skipped` is where a list of broken files is kept, where they are to be left out."""
    if name in SETS:
        return SETS[name]()
    if name in LOCAL:
        return LOCAL[name](data_dir, skipped)
    return describe_tfds(name, data_dir)


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


# --- digits ---------------------------------------------------------------------------------------------------------


def describe_digits() -> Description:
    """The 1,797 handwritten digits of scikit-learn (UCI optdigits), 8x8 grey pixels: 1,437 to train and 360 to test."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        digits, labels = stored["images"], stored["labels"]
    train, test = digits_split(labels)
    chosen = {"train": train, "test": test}

    def decode(split: str, images_out: np.ndarray, labels_out: np.ndarray) -> None:
        scaled = np.rint(digits[chosen[split]] * (255 / 16)).astype(np.uint8)[..., None]  # pixels are stored as 0 to 16
        images_out[:] = np.stack([resize_and_crop(image, images_out.shape[1:3]) for image in scaled])
        labels_out[:] = labels[chosen[split]]

    def read_labels(split: str, kind: str, labels_out: np.ndarray) -> None:
        labels_out[:] = labels[chosen[split]] % 2  # of the kinds besides `label` there is this one alone

    sizes = {split: len(indices) for split, indices in chosen.items()}
    names = {LABEL: tuple("0123456789"), "parity": ("even", "odd")}
    return Description("digits", sizes, names, (8, 8, 1), None, decode, read_labels=read_labels)


def digits_split(
    labels: Integer[np.ndarray, " examples"], tests: int = 360
) -> tuple[Integer[np.ndarray, " train"], Integer[np.ndarray, " test"]]:
    """The indices of the train and the test split of `digits`: stratified, shuffled, and fixed for ever.

    Philox with key 0, a stream of 64-bit numbers that NumPy promises not to change, gives each example a first number,
    then each a second one. The examples of a class with the lowest first numbers are the test split: a class of n has
    n * tests / examples of them, rounded down, and one more where the remainder is among the largest, until there are
    `tests`. Both splits are ordered by the second numbers, so that any slice of them is a random sample.
    """
    first, second = np.random.Philox(key=0).random_raw(2 * len(labels)).reshape(2, -1)
    quotas, remainders = np.divmod(np.bincount(labels) * tests, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: tests - quotas.sum()]] += 1
    by_first = np.argsort(first, kind="stable")
    is_test = np.zeros(len(labels), bool)
    for label, quota in enumerate(quotas):
        is_test[by_first[labels[by_first] == label][:quota]] = True
    by_second = np.argsort(second, kind="stable")
    return by_second[~is_test[by_second]], by_second[is_test[by_second]]


# --- TensorFlow Datasets --------------------------------------------------------------------------------------------


def describe_tfds(name: str, data_dir: Path) -> Description:
    """A prepared image-classification set of TFDS, with 8-bit `image` and `label`, in array_record files.

    Raises:
        UserError: unknown, not prepared, prepared as something else, damaged, or without such features.
    """
    builder = _builder(name, data_dir)
    if builder is None:
        raise _not_prepared(name, data_dir)
    image, labels = _features(name, builder)
    stored = {split: info for split, info in builder.info.splits.items() if info.num_examples}
    missing = [path for info in stored.values() for path in info.filepaths if not path.exists()]
    if missing:
        raise UserError(f"data set {name!r}: {missing[0]} is missing.\nRemove {builder.data_dir} and prepare it again.")
    sizes = {split: info.num_examples for split, info in stored.items()}
    key = f"{builder.info.full_name.replace('/', '_')}-{_fingerprint(builder)}"
    records = functools.cache(functools.partial(_records, builder))
    decode = lambda split, images, labels: _decode_all(records(split), images, labels)  # noqa: E731
    read_labels = functools.partial(_read_labels, builder)
    return Description(name, sizes, labels, image.shape, key, decode, records, read_labels)


def _builder(name: str, data_dir: Path):
    """TFDS's reader of a prepared set, made from its files alone; None where nothing is prepared."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    if not _NAME.match(name):
        raise UserError(f"data set {name!r}: a name is written name, name/config or name/config:version.")
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except DatasetNotFoundError:
        return None
    except Exception as error:  # TFDS raises many kinds for files that it cannot understand
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"data set {name!r}: cannot be read from {data_dir}: {reason}") from error
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    if array_record not in builder.info.available_file_formats():
        raise _wrong_format(name, builder)
    builder.info.set_file_format(array_record, override=True, override_if_initialized=True)
    return builder


def _wrong_format(name: str, builder) -> UserError:
    base = _NAME.match(name)["set"]
    way_out = f"With TensorFlow, once: tfds build {name} --file_format=array_record --data_dir=NEW, then copy it there"
    if base in prepare.ARCHIVES:
        way_out = f"Move that folder away, then run: python -m vit_jax.data.prepare {base}"
    found = builder.info.file_format.value
    return UserError(
        f"data set {name!r}: {builder.data_dir} holds {found} files; array_record is needed.\n{way_out},\n"
        "or give another folder as config.data.dir."
    )


def _features(name: str, builder):
    """The feature `image`, checked to be of the kind that is read here, and the class names of each label there is."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    image, label = (features.get(key) for key in ("image", "label"))
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"data set {name!r}: features `image` (an image) and `label` (a class) are needed.\n"
            f"It has: {', '.join(sorted(features))}."
        )
    if image.np_dtype != np.uint8 or len(image.shape) != 3 or image.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"data set {name!r}: its images are {image.np_dtype} of shape {image.shape}; "
            "8-bit images of 1, 3 or 4 channels are needed."
        )
    kinds = {key: value for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)}
    return image, {key: tuple(kinds[key].names) for key in (LABEL, *(key for key in kinds if key != LABEL))}


def _not_prepared(name: str, data_dir: Path) -> UserError:
    import tensorflow_datasets as tfds

    base = _NAME.match(name)["set"]
    known = tfds.list_builders(with_community_datasets=False)
    if base in prepare.ARCHIVES:  # here only with a config or a version, as the plain name is prepared at its use
        return UserError(f"data set {name!r}: not prepared in {data_dir}; give the plain name {base!r}.")
    if base in known:
        return UserError(
            f"data set {name!r}: not prepared in {data_dir}.\n"
            f"On any machine with TensorFlow, once: tfds build {name} --file_format=array_record\n"
            f"then copy the folder ~/tensorflow_datasets/{base} from there into {data_dir} (config.data.dir)."
        )
    own = [entry.name for entry in data_dir.iterdir() if entry.is_dir()] if data_dir.is_dir() else []
    near = difflib.get_close_matches(base, sorted({*known, *own, *SETS}), n=4)
    return UserError(
        f"data set {name!r}: not known to TFDS, and not prepared in {data_dir} (config.data.dir).\n"
        + (f"Nearest known names: {', '.join(near)}." if near else "Known: digits, cifar10, cifar100 and TFDS's sets.")
    )


def _fingerprint(builder) -> str:
    """Twelve characters that change when the prepared files do."""
    digest = hashlib.sha256()
    for path in sorted(Path(builder.data_dir).iterdir()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _records(builder, split: str) -> lazy.Records:
    import tensorflow_datasets as tfds

    stored = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record")
    set_name = builder.info.full_name

    def read(place: int, size: lazy.Size):
        try:
            example = stored[place]
            return pictures.decode(example["image"], size), example["label"]
        except Exception as error:  # array_record, protobuf and Pillow raise many kinds for damaged bytes
            raise UserError(
                f"data set {set_name}: cannot read example {place:,} of {split}: {str(error).partition(chr(10))[0]}.\n"
                f"Remove {builder.data_dir} and prepare it again."
            ) from error

    return lazy.Records(len(stored), read, lambda place: f"example {place:,} of {set_name} {split}")


def _decode_all(records: lazy.Records, images: np.ndarray, labels: np.ndarray) -> None:
    """Reads and decodes a whole stored split into `images` and `labels`, with several threads."""

    def work(start: int) -> None:
        for place in range(start, min(start + _CHUNK, len(labels))):
            images[place], labels[place] = records.read(place, images.shape[1:])

    # Pillow decodes and resizes without holding the interpreter's lock.
    lazy.in_threads(work, range(0, len(labels), _CHUNK))


def _read_labels(builder, split: str, kind: str, labels: np.ndarray) -> None:
    """Reads the labels of one kind of a whole stored split; no image is decoded."""
    import tensorflow_datasets as tfds

    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record")
    for start in range(0, len(labels), _CHUNK):
        places = list(range(start, min(start + _CHUNK, len(labels))))
        labels[places] = [example[kind] for example in records.__getitems__(places)]


# --- folders of images, and NumPy's files ---------------------------------------------------------------------------


def describe_folder(root: Path, skipped: Path | None) -> Description:
    """A folder of images, see `vit_jax.data.folder`; RGB whatever the files hold."""
    class_names, files = folder.find(root)
    if not files:
        raise UserError(f"data set 'folder': {root} has no files in its classes")
    key = f"folder-{folder.fingerprint(root, [file for split in files.values() for file in split])}"
    if skipped is not None:
        files = {
            split: folder.whole(root, found, skipped / key / f"{split}-broken.json") for split, found in files.items()
        }
        key += "-whole"
    records = lambda split: folder.records(root, files[split])  # noqa: E731
    decode = lambda split, images, labels: _decode_all(records(split), images, labels)  # noqa: E731
    sizes = {split: len(found) for split, found in files.items()}
    return Description("folder", sizes, {LABEL: class_names}, (None, None, 3), key, decode, records)


def describe_arrays(root: Path, skipped: Path | None) -> Description:
    """Images and labels in NumPy's files, see `vit_jax.data.arrays`."""
    splits = arrays.find(root)
    shapes = {images.shape[1:] for images, _ in splits.values()}
    if len({shape[2] for shape in shapes}) > 1:
        raise UserError(f"data set 'arrays': the splits of {root} differ in their channels: {sorted(shapes)}")
    shape = shapes.pop() if len(shapes) == 1 else (None, None, shapes.pop()[2])
    records = lambda split: arrays.records(root, split, *splits[split])  # noqa: E731
    decode = lambda split, images, labels: _decode_all(records(split), images, labels)  # noqa: E731
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    names = arrays.class_names(root, splits)
    files = sorted(path for suffix in ("*.npz", "*.npy") for path in root.glob(suffix))
    key = f"arrays-{folder.fingerprint(root, [(path.name, 0) for path in files])}"
    return Description("arrays", sizes, {LABEL: names}, shape, key, decode, records)


LOCAL: dict[str, Callable[[Path, Path | None], Description]] = {"folder": describe_folder, "arrays": describe_arrays}
SETS: dict[str, Callable[[], Description]] = {"digits": describe_digits}
