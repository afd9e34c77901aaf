"""Datasets of TensorFlow Datasets (TFDS), prepared as array_record files and read without TensorFlow."""

import difflib
import functools
import hashlib
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from vit_jax.data import archives, images, lazy_images
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.data.spec import LABEL, DatasetSpec
from vit_jax.errors import UserError, one_line

_NAME = re.compile(r"^(?P<set>\w+)(/[\w.\-]+)?(:(?P<version>[\d.*]+))?$")
_CHUNK = 256  # examples per read of their labels


def dataset_spec(name: str, data_dir: Path, other_names: Collection[str] = ()) -> DatasetSpec:
    """Returns a prepared image-classification set of TFDS with the features `image` (8 bits) and `label`.

    Args:
        name: name, name/config or name/config:version.
        data_dir: directory of prepared sets.
        other_names: names to suggest for a misspelt one in addition to those of TFDS.

    Raises:
        UserError: the set is unknown, not prepared, in another format, damaged, or lacks these features.
    """
    builder = builder_of(name, data_dir)
    if builder is None:
        raise _not_prepared(name, data_dir, other_names)
    image, class_names = _features(name, builder)
    stored = {split: info for split, info in builder.info.splits.items() if info.num_examples}
    missing = [path for info in stored.values() for path in info.filepaths if not path.exists()]
    if missing:
        raise UserError(f"dataset {name!r}: {missing[0]} is missing\n  remove {builder.data_dir} and prepare it again")
    sizes = {split: info.num_examples for split, info in stored.items()}
    key = f"{builder.info.full_name.replace('/', '_')}-{_fingerprint(builder)}"
    records = functools.cache(functools.partial(_records, builder))

    read_labels = functools.partial(_read_labels, builder)
    return DatasetSpec(name, sizes, class_names, image.shape, key, records=records, read_labels=read_labels)


def builder_of(name: str, data_dir: Path):
    """Returns TFDS's read-only builder of a prepared set, or None if it is not prepared.

    Raises:
        UserError: the name is malformed, or the prepared files cannot be read or are in another format.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    if not _NAME.match(name):
        raise UserError(f"dataset {name!r}: malformed name\n  allowed: name, name/config or name/config:version")
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except DatasetNotFoundError:
        return None
    except Exception as error:  # TFDS raises many types for files that it cannot read
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"dataset {name!r}: cannot be read from {data_dir}: {reason}\n"
            "  prepare it again, or set another config.data.dir"
        ) from error
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    if array_record not in builder.info.available_file_formats():
        raise _wrong_format(name, builder)
    builder.info.set_file_format(array_record, override=True, override_if_initialized=True)
    return builder


def _wrong_format(name: str, builder) -> UserError:
    base = _NAME.match(name)["set"]
    remedy = f"on a machine with TensorFlow, run tfds build {name} --file_format=array_record, and copy the result"
    if base in archives.ARCHIVES:
        remedy = f"move that directory away and run: python -m vit_jax.data.prepare {base}"
    found = builder.info.file_format.value
    return UserError(
        f"dataset {name!r}: {builder.data_dir} contains {found} files; array_record is required\n  {remedy}\n"
        "  or set another directory: --config.data.dir=DIR"
    )


def _features(name: str, builder):
    """Returns the feature `image`, once checked, and the class names of each kind of label."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    image, label = (features.get(key) for key in ("image", "label"))
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"dataset {name!r}: features `image` (an image) and `label` (a class) are required\n"
            f"  it has: {', '.join(sorted(features))}"
        )
    if image.np_dtype != np.uint8 or len(image.shape) != 3 or image.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"dataset {name!r}: images have dtype {image.np_dtype} and shape {image.shape}\n"
            "  allowed: 8-bit images with 1, 3 or 4 channels"
        )
    kinds = {key: value for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)}
    return image, {key: tuple(kinds[key].names) for key in (LABEL, *(key for key in kinds if key != LABEL))}


def _not_prepared(name: str, data_dir: Path, other_names: Collection[str]) -> UserError:
    import tensorflow_datasets as tfds

    base = _NAME.match(name)["set"]
    known = tfds.list_builders(with_community_datasets=False)
    if base in archives.ARCHIVES:  # with a config or version: the plain name is prepared when it is first used
        return UserError(f"dataset {name!r}: not prepared in {data_dir}\n  use the plain name {base!r}")
    if base in known:
        return UserError(
            f"dataset {name!r}: not prepared in {data_dir} (config.data.dir)\n"
            f"  on any machine with TensorFlow, run: tfds build {name} --file_format=array_record\n"
            f"  then copy its directory ~/tensorflow_datasets/{base} to {data_dir}"
        )
    own = [entry.name for entry in data_dir.iterdir() if entry.is_dir()] if data_dir.is_dir() else []
    near = difflib.get_close_matches(base, sorted({*known, *own, *other_names}), n=4)
    return UserError(
        f"dataset {name!r}: not known to TFDS, and not prepared in {data_dir} (config.data.dir)\n"
        + (
            f"  nearest known names: {', '.join(near)}"
            if near
            else "  known: digits, cifar10, cifar100, and TFDS's sets"
        )
    )


def _fingerprint(builder) -> str:
    """Returns twelve characters that change when the prepared files change, or the rules of decoding."""
    digest = hashlib.sha256(str(images.RULES).encode())
    for path in sorted(Path(builder.data_dir).iterdir()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _records(builder, split: str) -> lazy_images.Records:
    import tensorflow_datasets as tfds

    stored = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record")
    set_name = builder.info.full_name

    def read(index: int, size: lazy_images.Size, how: Preparation = COVER):
        try:
            example = stored[index]
            encoded, label = example["image"], example["label"]
        except Exception as error:  # array_record and protobuf raise many types for damaged data
            raise unreadable(index, error) from error
        try:
            return images.decode(encoded, size, how), label
        except images.ImageError as error:
            raise unreadable(index, error) from error

    def unreadable(index: int, error: Exception) -> UserError:
        return UserError(
            f"dataset {set_name}: cannot read example {index:,} of {split}: {one_line(error)}\n"
            f"  remove {builder.data_dir} and prepare it again"
        )

    return lazy_images.Records(len(stored), read, lambda index: f"example {index:,} of {set_name} {split}")


def _read_labels(builder, split: str, kind: str, labels: np.ndarray) -> None:
    """Reads the labels of one kind of a whole stored split without decoding images."""
    import tensorflow_datasets as tfds

    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record")
    for start in range(0, len(labels), _CHUNK):
        indices = list(range(start, min(start + _CHUNK, len(labels))))
        labels[indices] = [example[kind] for example in records.__getitems__(indices)]
