"""Preparing CIFAR without TensorFlow: with small substitutes of the archives, a local server, and the real sets."""

import dataclasses
import hashlib
import http.server
import io
import os
import signal
import socket
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, run_command, start_command

from vit_jax.data import archives, prepare, sources
from vit_jax.data import tfds as prepared
from vit_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

NAMES = {
    "cifar10": {"batches.meta.txt": ["airplane", *(f"class{k}" for k in range(9))]},
    "cifar100": {
        "coarse_label_names.txt": [f"coarse{k}" for k in range(20)],
        "fine_label_names.txt": [f"fine{k}" for k in range(100)],
    },
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A small archive in CIFAR's format: its description, extracted directory, packed file, and records."""

    archive: archives.Archive
    folder: Path
    packed: Path
    records: dict[str, np.ndarray]


def make_archive(root, name, records_per_file=7):
    """Writes random records in the format of the set `name`; the description has their sizes and checksums."""
    original = archives.ARCHIVES[name]
    rng = np.random.default_rng(0)
    folder = root / original.folder
    folder.mkdir(parents=True)
    records = {}
    for file in original.members:
        labels = [rng.integers(0, len(names), (records_per_file, 1)) for names in NAMES[name].values()]
        records[file] = np.concatenate([*labels, rng.integers(0, 256, (records_per_file, 3072))], 1).astype(np.uint8)
        (folder / file).write_bytes(records[file].tobytes())
    for file, names in NAMES[name].items():
        (folder / file).write_text("\n".join(names) + "\n\n")
    packed = root / original.filename
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, original.folder)
    archive = dataclasses.replace(
        original,
        url="http://127.0.0.1:9/" + original.filename,
        size=packed.stat().st_size,
        sha256=hashlib.sha256(packed.read_bytes()).hexdigest(),
        members={file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in records},
        sizes={split: records_per_file * len(files) for split, files in original.splits.items()},
    )
    return Published(archive, folder, packed, records)


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path):
    return make_archive(tmp_path / "published", request.param)


@pytest.fixture
def cifar10(tmp_path):
    return make_archive(tmp_path / "published", "cifar10")


def assert_prepared(cifar, data_dir):
    """Asserts that TFDS's builder reads the records, matched by id: labels, names and every pixel."""
    archive = cifar.archive
    read = tfds.data_source(archive.name, data_dir=data_dir, download=False)
    for split, files in archive.splits.items():
        rows = np.concatenate([cifar.records[file] for file in files])
        found = {example["id"].decode(): example for example in read[split]}
        assert sorted(found) == [f"{split}_{index:05d}" for index in range(len(rows))]
        for index, row in enumerate(rows):
            example = found[f"{split}_{index:05d}"]
            assert [example[key] for key in archive.label_keys] == row[: len(archive.label_keys)].tolist()
            planes = row[len(archive.label_keys) :].reshape(3, 32, 32)
            np.testing.assert_array_equal(example["image"], np.stack(list(planes), axis=-1))
    info = tfds.builder(archive.name, data_dir=data_dir).info
    for key, names in zip(archive.label_keys, NAMES[archive.name].values(), strict=True):
        assert info.features[key].names == names
    assert info.file_format.value == "array_record" and int(info.download_size) == archive.size


# --- from files ---


def test_sizes_and_checksums_are_those_of_tfds():
    for name, archive in archives.ARCHIVES.items():
        (url,) = tfds.builder(name, data_dir="/nowhere").url_infos.items()
        assert (archive.url, archive.size, archive.sha256) == (url[0], int(url[1].size), url[1].checksum)


@pytest.mark.parametrize("form", ["folder", "parent", "packed"])
def test_tfds_reads_the_prepared_set(cifar, tmp_path, form):
    source = {"folder": cifar.folder, "parent": cifar.folder.parent, "packed": cifar.packed}[form]
    folder = prepare.prepare(cifar.archive, data_dir=tmp_path / "tfds", source=source)
    assert folder == tmp_path / "tfds" / cifar.archive.name / "3.0.2"
    assert_prepared(cifar, tmp_path / "tfds")


def test_renamed_directory_and_directory_with_the_archive_are_accepted(cifar10, tmp_path):
    renamed = cifar10.folder.rename(tmp_path / "mine")
    holder = cifar10.packed.parent
    for index, source in enumerate((renamed, holder)):
        prepare.prepare(cifar10.archive, data_dir=tmp_path / str(index), source=source)
        assert_prepared(cifar10, tmp_path / str(index))


def test_preparing_a_prepared_set_does_nothing(cifar10, tmp_path):
    folder = prepare.prepare(cifar10.archive, data_dir=tmp_path / "tfds", source=cifar10.folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.prepare(cifar10.archive, data_dir=tmp_path / "tfds", source=tmp_path / "gone") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def python_version(cifar):
    (cifar.folder / "data_batch_1").write_bytes(b"\x80\x02cos\nsystem\n")
    (cifar.folder / "data_batch_1.bin").unlink()


def python_directory(cifar):
    cifar.folder.rename(cifar.folder.with_name("cifar-10-batches-py"))
    cifar.packed.unlink()


def truncated(cifar):
    os.truncate(cifar.folder / "data_batch_3.bin", 3073 * 3 + 5)


def damaged(cifar):
    path = cifar.folder / "test_batch.bin"
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)


def missing(cifar):
    (cifar.folder / "data_batch_2.bin").unlink()


def names_missing(cifar):
    (cifar.folder / "batches.meta.txt").unlink()


def names_damaged(cifar):
    (cifar.folder / "batches.meta.txt").write_bytes(b"airplane\n\xff\xfe\n")


@pytest.mark.parametrize(
    ("spoil", "source", "message"),
    [
        (truncated, "folder", "data_batch_3.bin in .* is truncated or damaged"),
        (damaged, "folder", "test_batch.bin in .* is truncated or damaged"),
        (missing, "folder", "does not contain data_batch_2.bin"),
        (names_missing, "folder", "does not contain batches.meta.txt"),
        (names_damaged, "folder", "batches.meta.txt is damaged: it has 2 class names, not 10"),
        (python_version, "folder", "is the Python .pickle. version\n.* the binary version, cifar-10-binary.tar.gz"),
        (python_directory, "parent", "is the Python .pickle. version\n.* the binary version, cifar-10-binary.tar.gz"),
        (lambda cifar: os.truncate(cifar.packed, 100), "packed", "has 100 bytes, .* truncated"),
        (lambda cifar: cifar.packed.write_bytes(bytes(cifar.archive.size)), "packed", "is damaged: its SHA-256"),
        (lambda cifar: cifar.packed.unlink(), "packed", "cifar-10-binary.tar.gz does not exist"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(cifar10, tmp_path, spoil, source, message):
    path = {"folder": cifar10.folder, "parent": cifar10.folder.parent, "packed": cifar10.packed}[source]
    spoil(cifar10)
    with pytest.raises(UserError, match=message) as caught:
        prepare.prepare(cifar10.archive, data_dir=tmp_path / "tfds", source=path)
    assert str(caught.value).count("\n") < 3
    assert not list((tmp_path / "tfds").glob("cifar10/*"))


def test_python_archive_is_refused_by_its_name(cifar10, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"whatever")
    with pytest.raises(UserError, match="Python"):
        prepare.prepare(cifar10.archive, data_dir=tmp_path / "tfds", source=path)


def test_missing_member_of_an_archive_is_named(cifar10, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(cifar10.folder / "test_batch.bin", "cifar-10-batches-bin/test_batch.bin")
    cifar10.packed.write_bytes(buffer.getvalue())
    sums = {"size": len(buffer.getvalue()), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    with pytest.raises(UserError, match=r"does not contain data_batch_1\.bin"):
        archives.read_files(dataclasses.replace(cifar10.archive, **sums), cifar10.packed)


def test_prepared_files_of_another_format_are_refused(cifar10, tmp_path):
    folder = prepare.prepare(cifar10.archive, data_dir=tmp_path / "tfds", source=cifar10.folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="contains tfrecord files; array_record is required"):
        prepare.prepare(cifar10.archive, data_dir=tmp_path / "tfds", source=cifar10.folder)


def test_unwritable_directory_is_a_user_error(cifar10, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be prepared in"):
        prepare.prepare(cifar10.archive, data_dir=tmp_path / "file" / "tfds", source=cifar10.folder)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_prepare
from vit_jax.data import prepare
cifar = test_prepare.make_archive(Path(sys.argv[1]) / "again", "cifar10")
examples = prepare._examples
def dying(*arguments):
    for count, example in enumerate(examples(*arguments)):
        if count == 20:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        yield example
prepare._examples = dying
prepare.prepare(cifar.archive, data_dir=Path(sys.argv[1]) / "tfds", source=cifar.folder)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_interrupted_prepare_never_looks_finished(cifar10, tmp_path, name):
    code = KILLED.format(paths=[str(Path(__file__).parent), str(ROOT / "tests")])
    run_command(code, tmp_path, name, status=-getattr(signal, name), timeout=60)
    data_dir = tmp_path / "tfds"
    assert prepared.builder_of("cifar10", data_dir) is None
    for stale in (data_dir / "cifar10").glob("incomplete.*"):
        os.utime(stale, (0, 0))
    prepare.prepare(cifar10.archive, data_dir=data_dir, source=cifar10.folder)
    assert_prepared(cifar10, data_dir)
    assert [path.name for path in (data_dir / "cifar10").iterdir()] == ["3.0.2"]


def test_concurrent_calls_prepare_once(cifar10, tmp_path, monkeypatch):
    written = []
    write = prepare._write
    monkeypatch.setattr(prepare, "_write", lambda *arguments: (written.append(1), write(*arguments)))
    arguments = {"data_dir": tmp_path / "tfds", "source": cifar10.folder}
    threads = [threading.Thread(target=prepare.prepare, args=(cifar10.archive,), kwargs=arguments) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [1]
    assert_prepared(cifar10, tmp_path / "tfds")


# --- download ---


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; supports Range if `ranges`, and closes the connection after `limit` bytes of a response."""

    content, limit, ranges, status = b"", None, True, 200

    def do_GET(self):
        self.server.requests.append(self.headers["Range"])
        if self.status != 200:
            self.send_error(self.status)
            return
        start = int(self.headers["Range"][len("bytes=") : -1]) if self.headers["Range"] and self.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        stop = len(self.content) if self.limit is None else start + self.limit
        self.wfile.write(self.content[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def served(cifar10):
    """Returns an archive that is served on 127.0.0.1, and the handler class, whose attributes change the responses."""
    handler = type("Handler", (Server,), {"content": cifar10.packed.read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.requests = handler.requests = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{cifar10.archive.filename}"
    yield dataclasses.replace(cifar10, archive=dataclasses.replace(cifar10.archive, url=url)), handler
    server.shutdown()
    server.server_close()


def test_download_then_prepare(served, tmp_path, monkeypatch, capsys):
    cifar, handler = served
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", cifar.archive)
    sources.check("cifar10", ["train[:50%]", "test"], data_dir=tmp_path / "tfds")
    assert handler.requests == [] and not (tmp_path / "tfds").exists()
    source = sources.load("cifar10", "train", data_dir=tmp_path / "tfds", cache_dir=tmp_path / "cache")
    assert len(source) == 35 and source.class_names[0] == "airplane"
    assert_prepared(cifar, tmp_path / "tfds")
    assert f"downloading {cifar.archive.url}" in capsys.readouterr().err
    sources.load("cifar10", "test", data_dir=tmp_path / "tfds", cache_dir=tmp_path / "cache")
    assert handler.requests == [None]


def test_malformed_split_is_refused_before_the_download(served, tmp_path, monkeypatch):
    cifar, handler = served
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", cifar.archive)
    for function, split in ((sources.load, "valid"), (sources.check, ["train", "valid"])):
        with pytest.raises(UserError, match="no split 'valid'"):
            function("cifar10", split, data_dir=tmp_path)
    assert handler.requests == []


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_is_resumed(served, tmp_path, ranges):
    cifar, handler = served
    handler.limit, handler.ranges = 1000, ranges
    with pytest.raises(UserError, match=rf"stopped at 1,000 of {cifar.archive.size:,} bytes(.|\n)*--from") as caught:
        archives.download(cifar.archive, tmp_path)
    assert str(caught.value).count("\n") < 3
    assert [path.name for path in tmp_path.glob("*.gz*")] == ["cifar-10-binary.tar.gz.part"]
    handler.limit = None
    path = archives.download(cifar.archive, tmp_path)
    assert path.read_bytes() == handler.content
    assert handler.requests == [None, "bytes=1000-"]
    assert [path.name for path in tmp_path.glob("*.gz*")] == ["cifar-10-binary.tar.gz"]


@pytest.mark.parametrize(
    "content", [lambda correct: bytes(len(correct)), lambda correct: correct + b"x", lambda correct: b"<html>"]
)
def test_download_of_a_different_file_is_refused(served, tmp_path, content):
    cifar, handler = served
    correct, handler.content = handler.content, content(handler.content)
    with pytest.raises(UserError, match=r"is not the published file(.|\n)*--from"):
        archives.download(cifar.archive, tmp_path)
    assert not list(tmp_path.glob("*.gz*"))
    handler.content = correct
    assert archives.download(cifar.archive, tmp_path).exists()


def test_http_error_is_reported(served, tmp_path):
    cifar, handler = served
    handler.status = 404
    with pytest.raises(UserError, match=r"cannot be downloaded from http://127.0.0.1.*404(.|\n)*--from"):
        archives.download(cifar.archive, tmp_path)


@pytest.mark.parametrize("function", [sources.load, sources.check])
def test_missing_connection_is_reported_with_an_alternative(cifar10, tmp_path, monkeypatch, function):
    with socket.socket() as closed:  # a port without a listener
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/cifar-10-binary.tar.gz"
        monkeypatch.setitem(archives.ARCHIVES, "cifar10", dataclasses.replace(cifar10.archive, url=url))
        with pytest.raises(UserError, match=rf"{url}(.|\n)*--from") as caught:
            function("cifar10", "train" if function is sources.load else ["train"], data_dir=tmp_path)
    assert str(caught.value).count("\n") < 3


def test_slow_name_lookup_is_not_waited_for(cifar10, monkeypatch):
    response = threading.Event()

    def connect(*_, **__):
        response.wait()
        raise OSError("nobody there")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(UserError, match=r"no answer from 127\.0\.0\.1"):
        archives.check_reachable(cifar10.archive, timeout=0.2)
    response.set()


# --- the command ---


def test_command_prepares_a_set(cifar10, tmp_path, capsys):
    arguments = ["cifar10", "--from", str(cifar10.packed), "--data_dir", str(tmp_path / "tfds")]
    assert prepare.main(arguments, {"cifar10": cifar10.archive}) == 0
    assert capsys.readouterr().out == f"cifar10 is prepared in {tmp_path}/tfds/cifar10/3.0.2\n"
    assert_prepared(cifar10, tmp_path / "tfds")


@pytest.mark.parametrize("arguments", [["cifar10", "--from", "/nowhere"], ["cifar11"], [], ["cifar10", "--form", "x"]])
def test_user_errors_exit_with_status_2_and_at_most_three_lines(tmp_path, arguments):
    variables = {"TFDS_DATA_DIR": str(tmp_path)}
    process = start_command("vit_jax.data.prepare", *arguments, stderr=subprocess.PIPE, **variables)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and output == ""
    assert 1 <= len(errors.splitlines()) <= 3 and "Traceback" not in errors


def test_help_contains_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main(["--help"])
    assert caught.value.code == 0
    assert "python -m vit_jax.data.prepare cifar10 --from" in capsys.readouterr().out


# --- the real sets ---

FRESH = """
import sys, hashlib, numpy as np, tensorflow_datasets as tfds
read = tfds.data_source(sys.argv[1], download=False)
raw = sys.argv[2].split(",")
for split, files in (("train", raw[:-1]), ("test", raw[-1:])):
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, int(sys.argv[3]) + 3072) for file in files])
    assert len(read[split]) == len(rows) == {"train": 50000, "test": 10000}[split]
    seen, indices = set(), range(0, len(rows), 5)
    for example_index in indices:
        example = read[split][example_index]
        name, _, index = example["id"].decode().partition("_")
        row = rows[int(index)]
        assert (name, len(index)) == (split, 5) and example["label"] == row[int(sys.argv[3]) - 1]
        assert (example["image"].transpose(2, 0, 1).ravel() == row[-3072:]).all()
        seen.add(int(index))
    assert len(seen) == len(indices)
print(",".join(tfds.builder(sys.argv[1]).info.features["label"].names))
assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_tfds_reads_the_real_set_in_a_new_process(images, real_sets, name):
    archive = archives.ARCHIVES[name]
    files = [str(images / archive.folder / file) for file in archive.members]
    arguments = [name, ",".join(files), len(archive.label_keys)]
    output = run_command(FRESH, *arguments, stderr=subprocess.PIPE, TFDS_DATA_DIR=str(real_sets))
    expected = (images / archive.folder / archive.label_files[-1]).read_text().split()
    assert output.strip().split(",") == expected and len(expected) == {"cifar10": 10, "cifar100": 100}[name]
