"""Sets of TensorFlow Datasets (TFDS), prepared as array_record files and read without TensorFlow."""

import difflib
import functools
import hashlib
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from vit_jax.data import archives, lazy_images
from vit_jax.data import images as pictures
from vit_jax.data.spec import LABEL, Description
from vit_jax.errors import UserError

_NAME = re.compile(r"^(?P<set>\w+)(/[\w.\-]+)?(:(?P<version>[\d.*]+))?$")
_CHUNK = 256  # examples whose labels are read at a time


def describe(name: str, data_dir: Path, others: Collection[str] = ()) -> Description:
    """A prepared image-classification set of TFDS, with 8-bit `image` and `label`, in array_record files.

    Args:
        name: as TFDS has it: name, name/config or name/config:version.
        data_dir: where prepared sets lie.
        others: names that a misspelt one may be meant to be, beside TFDS's own.

    Raises:
        UserError: unknown, not prepared, prepared as something else, damaged, or without such features.
    """
    builder = builder_of(name, data_dir)
    if builder is None:
        raise _not_prepared(name, data_dir, others)
    image, labels = _features(name, builder)
    stored = {split: info for split, info in builder.info.splits.items() if info.num_examples}
    missing = [path for info in stored.values() for path in info.filepaths if not path.exists()]
    if missing:
        raise UserError(f"data set {name!r}: {missing[0]} is missing.\nRemove {builder.data_dir} and prepare it again.")
    sizes = {split: info.num_examples for split, info in stored.items()}
    key = f"{builder.info.full_name.replace('/', '_')}-{_fingerprint(builder)}"
    records = functools.cache(functools.partial(_records, builder))
    decode = lambda split, images, labels: lazy_images.decode_all(records(split), images, labels)  # noqa: E731
    read_labels = functools.partial(_read_labels, builder)
    return Description(name, sizes, labels, image.shape, key, decode, records, read_labels)


def builder_of(name: str, data_dir: Path):
    """TFDS's reader of a prepared set, made from its files alone; None where nothing is prepared.

    Raises:
        UserError: what lies there cannot be read, or is in another format.
    """
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
    if base in archives.ARCHIVES:
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


def _not_prepared(name: str, data_dir: Path, others: Collection[str]) -> UserError:
    import tensorflow_datasets as tfds

    base = _NAME.match(name)["set"]
    known = tfds.list_builders(with_community_datasets=False)
    if base in archives.ARCHIVES:  # here only with a config or a version, as the plain name is prepared at its use
        return UserError(f"data set {name!r}: not prepared in {data_dir}; give the plain name {base!r}.")
    if base in known:
        return UserError(
            f"data set {name!r}: not prepared in {data_dir}.\n"
            f"On any machine with TensorFlow, once: tfds build {name} --file_format=array_record\n"
            f"then copy the folder ~/tensorflow_datasets/{base} from there into {data_dir} (config.data.dir)."
        )
    own = [entry.name for entry in data_dir.iterdir() if entry.is_dir()] if data_dir.is_dir() else []
    near = difflib.get_close_matches(base, sorted({*known, *own, *others}), n=4)
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


def _records(builder, split: str) -> lazy_images.Records:
    import tensorflow_datasets as tfds

    stored = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record")
    set_name = builder.info.full_name

    def read(place: int, size: lazy_images.Size):
        try:
            example = stored[place]
            return pictures.decode(example["image"], size), example["label"]
        except Exception as error:  # array_record, protobuf and Pillow raise many kinds for damaged bytes
            raise UserError(
                f"data set {set_name}: cannot read example {place:,} of {split}: {str(error).partition(chr(10))[0]}.\n"
                f"Remove {builder.data_dir} and prepare it again."
            ) from error

    return lazy_images.Records(len(stored), read, lambda place: f"example {place:,} of {set_name} {split}")


def _read_labels(builder, split: str, kind: str, labels: np.ndarray) -> None:
    """Reads the labels of one kind of a whole stored split; no image is decoded."""
    import tensorflow_datasets as tfds

    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record")
    for start in range(0, len(labels), _CHUNK):
        places = list(range(start, min(start + _CHUNK, len(labels))))
        labels[places] = [example[kind] for example in records.__getitems__(places)]
