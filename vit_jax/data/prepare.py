"""The command python -m vit_jax.data.prepare: prepares CIFAR-10 and CIFAR-100 for TFDS without TensorFlow."""

import argparse
import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_jax import atomic, paths, terminal
from vit_jax.data.archives import ARCHIVES, SHAPE, Archive, download, expected_files, read_files
from vit_jax.errors import UserError
from vit_jax.progress import Counter


def default_data_dir() -> Path:
    """Returns $TFDS_DATA_DIR, or ~/tensorflow_datasets, as TFDS does."""
    return paths.expand(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "TFDS_DATA_DIR")


def prepare(archive: Archive, *, data_dir: Path, source: Path | None = None) -> Path:
    """Writes the set in TFDS's layout and in array_record files; does nothing if it is prepared already.

    The files are verified first, then written to a temporary directory that is renamed once it is complete, so an
    interrupted run never looks finished. Several processes may call this at once: one works, the others wait for it.

    Args:
        archive: one of `ARCHIVES`.
        data_dir: TFDS's directory of prepared sets.
        source: the archive, the directory extracted from it, or a directory that contains either. None downloads the
            archive to data_dir/downloads and keeps it there.

    Returns:
        The directory of the prepared set, data_dir/name/version.

    Raises:
        UserError: a file is missing, damaged or of the wrong kind; the download failed; `data_dir` cannot be written.
    """
    try:
        with _locked(data_dir / "downloads" / f"{archive.name}.lock"):
            return _prepare_locked(archive, data_dir, source)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise UserError(
            f"{archive.name}: cannot be prepared in {data_dir}: {error.strerror or error}{where}\n"
            "  free disk space or change its permissions, or set another directory with --data_dir (config.data.dir)"
        ) from error


def _prepare_locked(archive: Archive, data_dir: Path, source: Path | None) -> Path:
    import tensorflow_datasets as tfds

    builder = tfds.builder(archive.name, data_dir=data_dir, try_gcs=False)
    folder = Path(builder.data_dir)
    if folder.exists():
        _check_format(archive, folder)
        return folder
    source = download(archive, data_dir / "downloads") if source is None else source
    with Counter(f"reading and verifying {source}"):
        files = read_files(archive, source)
    names = [_class_names(files[file]) for file in archive.label_files]
    for stale in folder.parent.glob("incomplete.*"):  # left by a killed process
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    terminal.warn(f"preparing {archive.name} in {folder}")
    with Counter("writing", sum(archive.sizes.values()), "images") as counter:
        _write(builder, archive, files, names, counter)
        atomic.sync_tree(folder)
        atomic.sync(folder.parent)
    return folder


def _write(builder, archive: Archive, files: Mapping[str, bytes], names: Sequence[list[str]], counter: Counter) -> None:
    """Lets TFDS's builder write the set, with a Python reader instead of its own, which needs TensorFlow.

    Name, version, features, keys (and thus the order on disk) and ids are those of TFDS. Its PNG encoder also needs
    TensorFlow; it is bypassed by passing Pillow images.
    """
    import tensorflow_datasets as tfds

    for key, file, class_names in zip(archive.label_keys, archive.label_files, names, strict=True):
        feature = builder.info.features[key]
        if len(set(class_names)) != feature.num_classes:
            raise UserError(
                f"{archive.name}: {file} is damaged: it has {len(set(class_names))} class names, not "
                f"{feature.num_classes}\n{expected_files(archive)}"
            )
        feature.names = class_names
    builder._split_generators = lambda dl_manager: {
        split: counter.over(_examples(archive, files, split)) for split in archive.splits
    }
    builder._make_download_manager = lambda **_: types.SimpleNamespace(downloaded_size=archive.size)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(None):  # TFDS would announce a download of unknown size
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )


def _examples(archive: Archive, files: Mapping[str, bytes], split: str) -> Iterator[tuple[int, dict]]:
    """Yields the examples of a split with TFDS's keys and names, and Pillow images."""
    from PIL import Image

    index = 0
    labels = len(archive.label_keys)
    for file in archive.splits[split]:
        for record in np.frombuffer(files[file], np.uint8).reshape(-1, labels + math.prod(SHAPE)):
            pixels = np.ascontiguousarray(record[labels:].reshape(3, 32, 32).transpose(1, 2, 0))
            example = dict(zip(archive.label_keys, record[:labels].tolist(), strict=True))
            yield index, {**example, "id": f"{split}_{index:05d}", "image": Image.fromarray(pixels)}
            index += 1


def _check_format(archive: Archive, folder: Path) -> None:
    try:
        found = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    except (OSError, ValueError):
        found = "unreadable"
    if found != "array_record":
        raise UserError(
            f"{archive.name}: {folder} contains {found} files; array_record is required\n"
            "  move it away, or set another directory with --data_dir (config.data.dir)"
        )


def _class_names(text: bytes) -> list[str]:
    return [line for line in text.decode(errors="replace").splitlines() if line]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also if the process is killed
        yield


# --- the command ----------------------------------------------------------------------------------------------------

_HELP = """
Prepares CIFAR-10 or CIFAR-100 for TensorFlow Datasets (TFDS) and vit_jax, without TensorFlow. Training on
data.name=cifar10 or cifar100 does this automatically if the machine has internet access.

examples:
  with internet access (downloads 170 MB):
    %(prog)s cifar10

  without internet access, from the archive or from the directory extracted from it:
    %(prog)s cifar10 --from ~/Downloads/cifar-10-binary.tar.gz
    %(prog)s cifar100 --from /data/cifar-100-binary

  to another directory than ~/tensorflow_datasets (then train with --config.data.dir, or set TFDS_DATA_DIR):
    %(prog)s cifar10 --data_dir /data/tfds

The archives are the binary versions at https://www.cs.toronto.edu/~kriz/cifar.html. The Python versions are not
supported.
"""


def main(arguments: Sequence[str] | None = None, archives: Mapping[str, Archive] = ARCHIVES) -> int:
    """Runs the command; returns its exit status, 2 for a user error."""
    return terminal.finish(lambda: _run(arguments, archives))


def _run(arguments: Sequence[str] | None, archives: Mapping[str, Archive]) -> None:
    parser = terminal.Parser(
        prog=terminal.prog("vit_jax.data.prepare"),
        usage="%(prog)s {cifar10,cifar100} [--from PATH] [--data_dir DIR]",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(archives), metavar="{cifar10,cifar100}", help="dataset to prepare")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="archive, or the directory extracted from it"
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="output directory (default: $TFDS_DATA_DIR, or ~/tensorflow_datasets)",
    )
    options = parser.parse_args(arguments)
    data_dir = default_data_dir() if options.data_dir is None else paths.expand(options.data_dir, "--data_dir")
    folder = prepare(archives[options.name], data_dir=data_dir, source=options.source)
    terminal.say(f"{options.name} is prepared in {folder}")


if __name__ == "__main__":
    sys.exit(main())
