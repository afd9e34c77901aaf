"""Prepares CIFAR-10 and CIFAR-100 for TensorFlow Datasets (TFDS) without TensorFlow: python -m vit_jax.data.prepare."""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import socket
import sys
import tarfile
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError

SHAPE = (32, 32, 3)  # height, width and channels of every image of the archives
_PIXELS = 3 * 32 * 32
_STALL_SECONDS = 30  # a download that brings nothing for so long has ended


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive of 32x32 images in CIFAR's binary form, and how its parts are recognised.

    A record is one byte for each of `label_keys`, then 3,072 bytes: planes of 32x32 pixels, red, green, blue.

    Attributes:
        name: the set's name in TFDS.
        url, size, sha256: of the archive; bytes.
        folder: the folder inside the archive.
        members: the SHA-256 of each file of records.
        splits: which files of records make up each split, in order.
        label_keys: the names of the label bytes, in order.
        label_files: for each of `label_keys`, the file of its class names, one a line.
        sizes: the examples of each split.
    """

    name: str
    url: str
    size: int
    sha256: str
    folder: str
    members: Mapping[str, str]
    splits: Mapping[str, tuple[str, ...]]
    label_keys: tuple[str, ...]
    label_files: tuple[str, ...]
    sizes: Mapping[str, int]

    @property
    def filename(self) -> str:
        """The last part of the url."""
        return self.url.rpartition("/")[2]


ARCHIVES = {
    "cifar10": Archive(
        name="cifar10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        size=170_052_171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        members={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        splits={"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)},
        label_keys=("label",),
        label_files=("batches.meta.txt",),
        sizes={"train": 50_000, "test": 10_000},
    ),
    "cifar100": Archive(
        name="cifar100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        size=168_513_733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        members={
            "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
            "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
        },
        splits={"train": ("train.bin",), "test": ("test.bin",)},
        label_keys=("coarse_label", "label"),
        label_files=("coarse_label_names.txt", "fine_label_names.txt"),
        sizes={"train": 50_000, "test": 10_000},
    ),
}


def default_data_dir() -> Path:
    """$TFDS_DATA_DIR, or ~/tensorflow_datasets, as TFDS has it."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepare(archive: Archive, *, data_dir: Path, source: Path | None = None) -> Path:
    """Writes the set as TFDS writes it, in array_record files; does nothing where that has been done.

    The files are verified first, then written to a temporary folder that is renamed once it is complete, so that an
    interrupted run leaves nothing that looks finished, and a second run starts again. Several processes may call this
    at once: one works, the others wait for it.

    Args:
        archive: one of `ARCHIVES`.
        data_dir: TFDS's folder of prepared sets.
        source: the archive, the folder extracted from it, or a folder that holds either. None downloads the archive
            to data_dir/downloads, where it stays.

    Returns:
        The folder that was written, data_dir/name/version.

    Raises:
        UserError: a file is missing, damaged or of the wrong kind; the download failed; `data_dir` cannot be written.
    """
    try:
        with _lock(data_dir / "downloads" / f"{archive.name}.lock"):
            return _prepare_alone(archive, data_dir, source)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise UserError(
            f"{archive.name}: cannot be prepared in {data_dir}: {error.strerror or error}{where}.\n"
            "Free or unlock it, or give another folder with --data_dir (config.data.dir)."
        ) from error


def _prepare_alone(archive: Archive, data_dir: Path, source: Path | None) -> Path:
    import tensorflow_datasets as tfds

    builder = tfds.builder(archive.name, data_dir=data_dir, try_gcs=False)
    folder = Path(builder.data_dir)
    if folder.exists():
        _check_format(archive, folder)
        return folder
    files = read_files(archive, download(archive, data_dir / "downloads") if source is None else source)
    names = [_class_names(files[file]) for file in archive.label_files]
    for stale in folder.parent.glob("incomplete.*"):  # of a run that was killed
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    print(f"preparing {archive.name} in {folder}, about 15 s", file=sys.stderr, flush=True)
    _write(builder, archive, files, names)
    return folder


def _write(builder, archive: Archive, files: Mapping[str, bytes], names: Sequence[list[str]]) -> None:
    """Lets TFDS's own builder write, with a reader of plain Python in place of its own, which needs TensorFlow.

    Name, version, features, keys (so also the order on disk) and ids stay those of TFDS. Its PNG encoder is
    TensorFlow's too, and is by-passed by handing it Pillow images.
    """
    import tensorflow_datasets as tfds

    for key, file, class_names in zip(archive.label_keys, archive.label_files, names, strict=True):
        feature = builder.info.features[key]
        if len(set(class_names)) != feature.num_classes:
            raise UserError(
                f"{archive.name}: {file} is damaged: it has {len(set(class_names))} class names, not "
                f"{feature.num_classes}.\n{_wanted(archive)}"
            )
        feature.names = class_names
    builder._split_generators = lambda dl_manager: {s: _examples(archive, files, s) for s in archive.splits}
    builder._make_download_manager = lambda **_: types.SimpleNamespace(downloaded_size=archive.size)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(None):  # TFDS announces a download of unknown size
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )


def _examples(archive: Archive, files: Mapping[str, bytes], split: str) -> Iterator[tuple[int, dict]]:
    """The examples of a split as TFDS keys and names them, images as Pillow's."""
    from PIL import Image

    index = 0
    labels = len(archive.label_keys)
    for file in archive.splits[split]:
        for record in np.frombuffer(files[file], np.uint8).reshape(-1, labels + _PIXELS):
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
            f"{archive.name}: {folder} exists, and holds {found} files where array_record is needed.\n"
            "Move it away, or give another folder with --data_dir (config.data.dir)."
        )


def _class_names(text: bytes) -> list[str]:
    return [line for line in text.decode(errors="replace").splitlines() if line]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given up when the file is closed, also by a process that is killed
        yield


# --- reading what was published -------------------------------------------------------------------------------------


def read_files(archive: Archive, source: Path) -> dict[str, bytes]:
    """The verified files of records and the files of class names, from the archive or from a folder.

    Raises:
        UserError: `source` or one of the files is missing, is truncated or otherwise damaged, or is the Python version.
    """
    source = source.expanduser()
    if not source.exists():
        raise UserError(f"{archive.name}: there is no {source}.\n{_wanted(archive)}")
    if source.is_dir():
        inner = source / archive.folder
        if not inner.is_dir() and (source / archive.filename).is_file():
            return read_files(archive, source / archive.filename)
        source = inner if inner.is_dir() else source
        read = _folder_reader(source)
    else:
        if "python" in source.name:
            raise _python_version(archive, source)
        verify(archive, source)
        read = _archive_reader(archive, source)
    return {file: _read_file(archive, source, file, read) for file in (*archive.members, *archive.label_files)}


def _folder_reader(folder: Path) -> Callable[[str], bytes | None]:
    return lambda file: (folder / file).read_bytes() if (folder / file).is_file() else None


def _archive_reader(archive: Archive, path: Path) -> Callable[[str], bytes | None]:
    wanted = {f"{archive.folder}/{file}": file for file in (*archive.members, *archive.label_files)}
    try:
        with tarfile.open(path) as tar:
            found = {wanted[m.name]: tar.extractfile(m).read() for m in tar if m.name in wanted and m.isfile()}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{archive.name}: {path} is damaged: {error}.\n{_wanted(archive)}") from error
    return found.get


def _read_file(archive: Archive, source: Path, file: str, read: Callable[[str], bytes | None]) -> bytes:
    data = read(file)
    if data is None:
        if source.is_dir() and any((source / name).exists() for name in ("data_batch_1", "meta", "batches.meta")):
            raise _python_version(archive, source)
        if source.is_dir() and any((source / name).is_dir() for name in ("cifar-10-batches-py", "cifar-100-python")):
            raise _python_version(archive, source)
        raise UserError(f"{archive.name}: {source} has no {file}.\n{_wanted(archive)}")
    expected = archive.members.get(file)
    if expected and hashlib.sha256(data).hexdigest() != expected:
        raise UserError(
            f"{archive.name}: {file} in {source} is truncated or damaged ({len(data):,} bytes; its SHA-256 is not "
            f"the published one).\n{_wanted(archive)}"
        )
    return data


def verify(archive: Archive, path: Path) -> None:
    """Raises UserError unless the file has the size and the SHA-256 of the published archive."""
    size = path.stat().st_size
    if size != archive.size:
        raise UserError(
            f"{archive.name}: {path} has {size:,} bytes where {archive.size:,} were published: "
            f"{'truncated' if size < archive.size else 'another file'}.\n{_wanted(archive)}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise UserError(
            f"{archive.name}: {path} is damaged: its SHA-256 is {found[:12]}..., that of the published file "
            f"{archive.sha256[:12]}...\n{_wanted(archive)}"
        )


def _python_version(archive: Archive, source: Path) -> UserError:
    return UserError(
        f"{archive.name}: {source} is the Python (pickle) version; {archive.filename} is wanted: {archive.url}"
    )


def _wanted(archive: Archive) -> str:
    return f"Wanted: {archive.filename} from {archive.url}\nor the folder {archive.folder} extracted from it."


# --- downloading ----------------------------------------------------------------------------------------------------


def check_reachable(archive: Archive, timeout: float = 2.0) -> None:
    """Raises UserError unless the host of the archive (or the proxy towards it) accepts a connection in `timeout` s."""
    url = urllib.parse.urlsplit(archive.url)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname):
        url = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (url.hostname, url.port or (80 if url.scheme == "http" else 443))
    outcome: list[OSError | None] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=timeout).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    # In a thread, because looking up the host's name obeys no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout + 0.1)
    if not outcome or outcome[0] is not None:
        raise _unreachable(archive, f"no answer from {address[0]}" if not outcome else outcome[0])


def download(archive: Archive, folder: Path) -> Path:
    """Downloads the archive to `folder`, or goes on with a download that was interrupted; verifies it.

    Raises:
        UserError: no connection, a refusal by the server, an interruption, or other bytes than those published.
    """
    path = folder / archive.filename
    if path.exists():
        verify(archive, path)
        return path
    check_reachable(archive)
    part = path.with_name(path.name + ".part")
    print(f"downloading {archive.url}, {archive.size / 1e6:,.0f} MB, to {path}", file=sys.stderr, flush=True)
    try:
        _fetch(archive, part)
    except urllib.error.HTTPError as error:
        raise _unreachable(archive, f"the server answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _interrupted(archive, part, getattr(error, "reason", error)) from error
    if part.stat().st_size < archive.size:
        raise _interrupted(archive, part, "the connection was closed")
    try:
        verify(archive, part)
    except UserError:
        part.unlink()
        raise _another_file(archive) from None
    os.replace(part, path)
    return path


def _fetch(archive: Archive, part: Path) -> None:
    """Appends to `part` what is missing of the archive, with one line of progress on a terminal."""
    have = part.stat().st_size if part.exists() else 0
    if have >= archive.size:
        return
    headers = {"User-Agent": "vit_jax"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers), timeout=_STALL_SECONDS) as reply:
        resumed = reply.status == 206 and (reply.headers["Content-Range"] or "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        if reply.headers["Content-Length"] and int(reply.headers["Content-Length"]) != archive.size - have:
            raise _another_file(archive)
        with part.open("ab" if resumed else "wb") as file:
            # One byte too many is enough to know that it is another file.
            while have <= archive.size and (block := reply.read(2**20)):
                file.write(block)
                have += len(block)
                if sys.stderr.isatty():
                    print(f"\r{have / 1e6:,.0f} of {archive.size / 1e6:,.0f} MB", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(file=sys.stderr)


def _from_command(archive: Archive) -> str:
    return f"python -m vit_jax.data.prepare {archive.name} --from {archive.filename}"


def _unreachable(archive: Archive, reason: object) -> UserError:
    return UserError(
        f"{archive.name}: not prepared yet, and cannot be downloaded from {archive.url}: {reason}.\n"
        f"Get that file on any machine, then run:\n{_from_command(archive)}"
    )


def _another_file(archive: Archive) -> UserError:
    return UserError(
        f"{archive.name}: what {archive.url} sends is not the published file: its size or SHA-256 differs.\n"
        f"Run it again later, or get that file elsewhere and run:\n{_from_command(archive)}"
    )


def _interrupted(archive: Archive, part: Path, reason: object) -> UserError:
    have = part.stat().st_size if part.exists() else 0
    return UserError(
        f"{archive.name}: the download from {archive.url} stopped at {have:,} of {archive.size:,} bytes: {reason}.\n"
        f"Run it again to go on from there, or get that file elsewhere and run:\n{_from_command(archive)}"
    )


# --- the command ----------------------------------------------------------------------------------------------------

_HELP = """
Prepares CIFAR-10 or CIFAR-100 once, so that TensorFlow Datasets (TFDS) and vit_jax can read it; TensorFlow is not
needed. Training on data.name=cifar10 or cifar100 does this by itself where there is internet.

examples:
  with internet (downloads 170 MB, then takes about 15 s):
    python -m vit_jax.data.prepare cifar10

  without internet, from the archive or from the folder that was extracted from it:
    python -m vit_jax.data.prepare cifar10 --from ~/Downloads/cifar-10-binary.tar.gz
    python -m vit_jax.data.prepare cifar100 --from /data/cifar-100-binary

  somewhere else than ~/tensorflow_datasets (give the same folder as --config.data.dir, or set TFDS_DATA_DIR):
    python -m vit_jax.data.prepare cifar10 --data_dir /data/tfds

The archives are the binary versions at https://www.cs.toronto.edu/~kriz/cifar.html; the Python versions are not read.
"""


def main(arguments: Sequence[str] | None = None, archives: Mapping[str, Archive] = ARCHIVES) -> int:
    """Runs the command; returns its exit status, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.data.prepare",
        usage="python -m vit_jax.data.prepare {cifar10,cifar100} [--from PATH] [--data_dir DIR]",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(archives), metavar="{cifar10,cifar100}", help="the set to prepare")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="the archive, or the folder extracted from it"
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="where to write (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)",
    )
    options = parser.parse_args(arguments)
    try:
        data_dir = default_data_dir() if options.data_dir is None else options.data_dir.expanduser()
        folder = prepare(archives[options.name], data_dir=data_dir, source=options.source)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing is left half-done, and the same command starts again", file=sys.stderr)
        return 130
    print(f"{options.name} is ready in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
