"""The published archives of CIFAR-10 and CIFAR-100: download, verification and reading."""

import dataclasses
import hashlib
import http.client
import socket
import tarfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from vit_jax import atomic, paths, terminal
from vit_jax.errors import UserError
from vit_jax.progress import Counter

SHAPE = (32, 32, 3)  # height, width, channels of the images
_STALL_SECONDS = 30  # a download without data for this long is interrupted


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive of 32x32 images in CIFAR's binary format, with the checksums of its files.

    A record is one byte for each of `label_keys`, followed by 3,072 bytes: the red, green and blue planes of 32x32
    pixels.

    Attributes:
        name: name of the set in TFDS.
        url: where it is published.
        size: bytes of the archive.
        sha256: checksum of the archive.
        folder: directory inside the archive.
        members: SHA-256 of each file of records.
        splits: files of records of each split, in order.
        label_keys: names of the label bytes, in order.
        label_files: for each of `label_keys`, the file with its class names, one per line.
        sizes: number of examples of each split.
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
        """File name of the archive."""
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


# --- reading --------------------------------------------------------------------------------------------------------


def read_files(archive: Archive, source: Path) -> dict[str, bytes]:
    """Returns the contents of the files of records and of class names, verified.

    Args:
        archive: the expected archive.
        source: the archive file, its extracted directory, or a directory that contains either.

    Raises:
        UserError: `source` or one of its files is missing, truncated or damaged, or is the Python version.
    """
    source = paths.expand(source, "--from")
    if not source.exists():
        raise UserError(f"{archive.name}: {source} does not exist\n{expected_files(archive)}")
    if source.is_dir():
        inner = source / archive.folder
        if not inner.is_dir() and (source / archive.filename).is_file():
            return read_files(archive, source / archive.filename)
        source = inner if inner.is_dir() else source
        read = _directory_reader(source)
    else:
        if "python" in source.name:
            raise _python_version(archive, source)
        verify(archive, source)
        read = _archive_reader(archive, source)
    return {file: _read_file(archive, source, file, read) for file in (*archive.members, *archive.label_files)}


def _directory_reader(directory: Path) -> Callable[[str], bytes | None]:
    def read(file: str) -> bytes | None:
        return (directory / file).read_bytes() if (directory / file).is_file() else None

    return read


def _archive_reader(archive: Archive, path: Path) -> Callable[[str], bytes | None]:
    paths = {f"{archive.folder}/{file}": file for file in (*archive.members, *archive.label_files)}
    try:
        with tarfile.open(path) as tar:
            found = {paths[m.name]: tar.extractfile(m).read() for m in tar if m.name in paths and m.isfile()}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{archive.name}: {path} is damaged: {error}\n{expected_files(archive)}") from error
    return found.get


def _read_file(archive: Archive, source: Path, file: str, read: Callable[[str], bytes | None]) -> bytes:
    data = read(file)
    if data is None:
        if source.is_dir() and any((source / name).exists() for name in ("data_batch_1", "meta", "batches.meta")):
            raise _python_version(archive, source)
        if source.is_dir() and any((source / name).is_dir() for name in ("cifar-10-batches-py", "cifar-100-python")):
            raise _python_version(archive, source)
        raise UserError(f"{archive.name}: {source} does not contain {file}\n{expected_files(archive)}")
    expected = archive.members.get(file)
    if expected and hashlib.sha256(data).hexdigest() != expected:
        raise UserError(
            f"{archive.name}: {file} in {source} is truncated or damaged: its SHA-256 is not the published one "
            f"({len(data):,} bytes)\n{expected_files(archive)}"
        )
    return data


def verify(archive: Archive, path: Path) -> None:
    """Raises UserError unless the file has the size and SHA-256 of the published archive."""
    size = path.stat().st_size
    if size != archive.size:
        raise UserError(
            f"{archive.name}: {path} has {size:,} bytes, the published file {archive.size:,}: "
            f"{'truncated' if size < archive.size else 'a different file'}\n{expected_files(archive)}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise UserError(
            f"{archive.name}: {path} is damaged: its SHA-256 is {found[:12]}..., the published one is "
            f"{archive.sha256[:12]}...\n{expected_files(archive)}"
        )


def _python_version(archive: Archive, source: Path) -> UserError:
    return UserError(
        f"{archive.name}: {source} is the Python (pickle) version\n"
        f"  use the binary version, {archive.filename}: {archive.url}"
    )


def expected_files(archive: Archive) -> str:
    """Returns the last two lines of an error message: which files are expected."""
    return f"  expected: {archive.filename} from {archive.url}\n  or the directory {archive.folder} extracted from it"


# --- downloading ----------------------------------------------------------------------------------------------------


def check_reachable(archive: Archive, timeout: float = 2.0) -> None:
    """Raises UserError unless the host of the archive, or the proxy, accepts a connection within `timeout` seconds."""
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

    # In a thread, because the lookup of the host name has no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout + 0.1)
    if not outcome or outcome[0] is not None:
        raise _unreachable(archive, f"no answer from {address[0]}" if not outcome else outcome[0])


def download(archive: Archive, folder: Path) -> Path:
    """Downloads the archive to `folder`, or resumes an interrupted download, and verifies it; returns its path.

    Raises:
        UserError: no connection, an HTTP error, an interruption, or a file that differs from the published one.
    """
    path = folder / archive.filename
    if path.exists():
        verify(archive, path)
        return path
    check_reachable(archive)
    part = path.with_name(path.name + ".part")
    terminal.warn(f"downloading {archive.url}, {archive.size / 1e6:,.0f} MB, to {path}")
    try:
        _fetch(archive, part)
    except urllib.error.HTTPError as error:
        raise _unreachable(archive, f"the server responded {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _interrupted(archive, part, getattr(error, "reason", error)) from error
    if part.stat().st_size < archive.size:
        raise _interrupted(archive, part, "the connection was closed")
    try:
        verify(archive, part)
    except UserError:
        part.unlink()
        raise _different_file(archive) from None
    atomic.sync_and_rename(part, path)
    return path


def _fetch(archive: Archive, part: Path) -> None:
    """Appends the missing bytes of the archive to `part`."""
    have = part.stat().st_size if part.exists() else 0
    if have >= archive.size:
        return
    headers = {"User-Agent": "vit_jax"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers), timeout=_STALL_SECONDS) as reply:
        resumed = reply.status == 206 and (reply.headers["Content-Range"] or "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        if reply.headers["Content-Length"] and int(reply.headers["Content-Length"]) != archive.size - have:
            raise _different_file(archive)
        with part.open("ab" if resumed else "wb") as file, Counter("downloading", archive.size / 1e6, "MB") as counter:
            counter.add(have / 1e6)
            # One byte too many is enough to detect a different file.
            while have <= archive.size and (block := reply.read(2**20)):
                file.write(block)
                have += len(block)
                counter.add(len(block) / 1e6)


def _from_command(archive: Archive) -> str:
    return f"python -m vit_jax.data.prepare {archive.name} --from {archive.filename}"


def _unreachable(archive: Archive, reason: object) -> UserError:
    return UserError(
        f"{archive.name}: not prepared, and cannot be downloaded from {archive.url}: {reason}\n"
        f"  download that file on another machine, then run:\n  {_from_command(archive)}"
    )


def _different_file(archive: Archive) -> UserError:
    return UserError(
        f"{archive.name}: {archive.url} is not the published file: its size or SHA-256 differs\n"
        f"  try again later, or download the file elsewhere and run:\n  {_from_command(archive)}"
    )


def _interrupted(archive: Archive, part: Path, reason: object) -> UserError:
    have = part.stat().st_size if part.exists() else 0
    return UserError(
        f"{archive.name}: download from {archive.url} stopped at {have:,} of {archive.size:,} bytes: {reason}\n"
        f"  run again to resume it, or download the file elsewhere and run:\n  {_from_command(archive)}"
    )
