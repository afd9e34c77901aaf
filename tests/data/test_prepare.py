"""Preparing CIFAR without TensorFlow: small stand-ins for the archives, a server on this machine, and the real sets."""

import dataclasses
import hashlib
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

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
class Stand:
    """A small archive in CIFAR's form: its description, its extracted folder, the packed file, and its records."""

    archive: archives.Archive
    folder: Path
    packed: Path
    records: dict[str, np.ndarray]


def make_stand(root, name, records_a_file=7):
    """Writes random records in the form of the set `name`; sizes and SHA-256 are put in place of the published ones."""
    published = archives.ARCHIVES[name]
    rng = np.random.default_rng(0)
    folder = root / published.folder
    folder.mkdir(parents=True)
    records = {}
    for file in published.members:
        labels = [rng.integers(0, len(names), (records_a_file, 1)) for names in NAMES[name].values()]
        records[file] = np.concatenate([*labels, rng.integers(0, 256, (records_a_file, 3072))], 1).astype(np.uint8)
        (folder / file).write_bytes(records[file].tobytes())
    for file, names in NAMES[name].items():
        (folder / file).write_text("\n".join(names) + "\n\n")
    packed = root / published.filename
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, published.folder)
    archive = dataclasses.replace(
        published,
        url="http://127.0.0.1:9/" + published.filename,
        size=packed.stat().st_size,
        sha256=hashlib.sha256(packed.read_bytes()).hexdigest(),
        members={file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in records},
        sizes={split: records_a_file * len(files) for split, files in published.splits.items()},
    )
    return Stand(archive, folder, packed, records)


@pytest.fixture(params=["cifar10", "cifar100"])
def stand(request, tmp_path):
    return make_stand(tmp_path / "published", request.param)


@pytest.fixture
def stand10(tmp_path):
    return make_stand(tmp_path / "published", "cifar10")


def assert_prepared(stand, data_dir):
    """What TFDS's stock builder reads equals the records, matched by id: labels, names and every pixel."""
    archive = stand.archive
    read = tfds.data_source(archive.name, data_dir=data_dir, download=False)
    for split, files in archive.splits.items():
        rows = np.concatenate([stand.records[file] for file in files])
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


def test_sizes_and_checksums_are_those_that_tfds_publishes():
    for name, archive in archives.ARCHIVES.items():
        (url,) = tfds.builder(name, data_dir="/nowhere").url_infos.items()
        assert (archive.url, archive.size, archive.sha256) == (url[0], int(url[1].size), url[1].checksum)


@pytest.mark.parametrize("form", ["folder", "parent", "packed"])
def test_tfds_reads_what_was_prepared(stand, tmp_path, form):
    source = {"folder": stand.folder, "parent": stand.folder.parent, "packed": stand.packed}[form]
    folder = prepare.prepare(stand.archive, data_dir=tmp_path / "tfds", source=source)
    assert folder == tmp_path / "tfds" / stand.archive.name / "3.0.2"
    assert_prepared(stand, tmp_path / "tfds")


def test_a_folder_of_any_name_and_a_folder_that_holds_the_archive_will_do(stand10, tmp_path):
    renamed = stand10.folder.rename(tmp_path / "mine")
    holder = stand10.packed.parent
    for number, source in enumerate((renamed, holder)):
        prepare.prepare(stand10.archive, data_dir=tmp_path / str(number), source=source)
        assert_prepared(stand10, tmp_path / str(number))


def test_preparing_twice_does_nothing_the_second_time(stand10, tmp_path):
    folder = prepare.prepare(stand10.archive, data_dir=tmp_path / "tfds", source=stand10.folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.prepare(stand10.archive, data_dir=tmp_path / "tfds", source=tmp_path / "gone") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def python_version(stand):
    (stand.folder / "data_batch_1").write_bytes(b"\x80\x02cos\nsystem\n")
    (stand.folder / "data_batch_1.bin").unlink()


def python_parent(stand):
    stand.folder.rename(stand.folder.with_name("cifar-10-batches-py"))
    stand.packed.unlink()


def truncated(stand):
    os.truncate(stand.folder / "data_batch_3.bin", 3073 * 3 + 5)


def damaged(stand):
    path = stand.folder / "test_batch.bin"
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)


def missing(stand):
    (stand.folder / "data_batch_2.bin").unlink()


def names_missing(stand):
    (stand.folder / "batches.meta.txt").unlink()


def names_damaged(stand):
    (stand.folder / "batches.meta.txt").write_bytes(b"airplane\n\xff\xfe\n")


@pytest.mark.parametrize(
    ("spoil", "source", "message"),
    [
        (truncated, "folder", "data_batch_3.bin in .* is truncated or damaged"),
        (damaged, "folder", "test_batch.bin in .* is truncated or damaged"),
        (missing, "folder", "has no data_batch_2.bin"),
        (names_missing, "folder", "has no batches.meta.txt"),
        (names_damaged, "folder", "batches.meta.txt is damaged: it has 2 class names, not 10"),
        (python_version, "folder", "is the Python .pickle. version; cifar-10-binary.tar.gz is wanted"),
        (python_parent, "parent", "is the Python .pickle. version; cifar-10-binary.tar.gz is wanted"),
        (lambda stand: os.truncate(stand.packed, 100), "packed", "has 100 bytes where .* truncated"),
        (lambda stand: stand.packed.write_bytes(bytes(stand.archive.size)), "packed", "is damaged: its SHA-256"),
        (lambda stand: stand.packed.unlink(), "packed", "there is no .*cifar-10-binary.tar.gz"),
    ],
)
def test_bad_files_are_named_and_leave_nothing_behind(stand10, tmp_path, spoil, source, message):
    path = {"folder": stand10.folder, "parent": stand10.folder.parent, "packed": stand10.packed}[source]
    spoil(stand10)
    with pytest.raises(UserError, match=message) as caught:
        prepare.prepare(stand10.archive, data_dir=tmp_path / "tfds", source=path)
    assert str(caught.value).count("\n") < 3
    assert not list((tmp_path / "tfds").glob("cifar10/*"))


def test_a_python_archive_is_refused_by_its_name(stand10, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"whatever")
    with pytest.raises(UserError, match="Python"):
        prepare.prepare(stand10.archive, data_dir=tmp_path / "tfds", source=path)


def test_an_archive_with_a_member_missing_is_named(stand10, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(stand10.folder / "test_batch.bin", "cifar-10-batches-bin/test_batch.bin")
    stand10.packed.write_bytes(buffer.getvalue())
    sums = {"size": len(buffer.getvalue()), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    with pytest.raises(UserError, match=r"has no data_batch_1\.bin"):
        archives.read_files(dataclasses.replace(stand10.archive, **sums), stand10.packed)


def test_files_of_another_format_are_not_taken_for_prepared(stand10, tmp_path):
    folder = prepare.prepare(stand10.archive, data_dir=tmp_path / "tfds", source=stand10.folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="holds tfrecord files where array_record is needed"):
        prepare.prepare(stand10.archive, data_dir=tmp_path / "tfds", source=stand10.folder)


def test_an_unwritable_folder_is_a_users_error(stand10, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be prepared in"):
        prepare.prepare(stand10.archive, data_dir=tmp_path / "file" / "tfds", source=stand10.folder)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_prepare
from vit_jax.data import prepare
stand = test_prepare.make_stand(Path(sys.argv[1]) / "again", "cifar10")
examples = prepare._examples
def dying(*arguments):
    for count, example in enumerate(examples(*arguments)):
        if count == 20:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        yield example
prepare._examples = dying
prepare.prepare(stand.archive, data_dir=Path(sys.argv[1]) / "tfds", source=stand.folder)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_an_interrupted_prepare_never_looks_finished(stand10, tmp_path, name):
    code = KILLED.format(tests=str(Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path), name], capture_output=True, timeout=60)
    assert run.returncode == -getattr(signal, name), run.stderr.decode()
    data_dir = tmp_path / "tfds"
    assert prepared.builder_of("cifar10", data_dir) is None
    for stale in (data_dir / "cifar10").glob("incomplete.*"):
        os.utime(stale, (0, 0))
    prepare.prepare(stand10.archive, data_dir=data_dir, source=stand10.folder)
    assert_prepared(stand10, data_dir)
    assert [path.name for path in (data_dir / "cifar10").iterdir()] == ["3.0.2"]


def test_several_at_once_prepare_once(stand10, tmp_path, monkeypatch):
    written = []
    write = prepare._write
    monkeypatch.setattr(prepare, "_write", lambda *arguments: (written.append(1), write(*arguments)))
    prepare_it = lambda: prepare.prepare(stand10.archive, data_dir=tmp_path / "tfds", source=stand10.folder)  # noqa: E731
    threads = [threading.Thread(target=prepare_it) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [1]
    assert_prepared(stand10, tmp_path / "tfds")


# --- by download ---


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, honours Range unless told not to, and breaks off after `limit` bytes of a reply."""

    content, limit, ranges, status = b"", None, True, 200

    def do_GET(self):
        self.server.asked.append(self.headers["Range"])
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
def served(stand10):
    """A stand whose archive is served on 127.0.0.1, and the class that serves it (its attributes change how)."""
    handler = type("Handler", (Server,), {"content": stand10.packed.read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = handler.asked = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{stand10.archive.filename}"
    yield dataclasses.replace(stand10, archive=dataclasses.replace(stand10.archive, url=url)), handler
    server.shutdown()
    server.server_close()


def test_download_then_prepare(served, tmp_path, monkeypatch, capsys):
    stand, handler = served
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", stand.archive)
    sources.check("cifar10", ["train[:50%]", "test"], data_dir=tmp_path / "tfds")
    assert handler.asked == [] and not (tmp_path / "tfds").exists()
    source = sources.load("cifar10", "train", data_dir=tmp_path / "tfds", cache_dir=tmp_path / "cache")
    assert len(source) == 35 and source.class_names[0] == "airplane"
    assert_prepared(stand, tmp_path / "tfds")
    assert f"downloading {stand.archive.url}" in capsys.readouterr().err
    sources.load("cifar10", "test", data_dir=tmp_path / "tfds", cache_dir=tmp_path / "cache")
    assert handler.asked == [None]


def test_a_bad_split_is_known_before_the_download(served, tmp_path, monkeypatch):
    stand, handler = served
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", stand.archive)
    for function, split in ((sources.load, "valid"), (sources.check, ["train", "valid"])):
        with pytest.raises(UserError, match="no split 'valid'"):
            function("cifar10", split, data_dir=tmp_path)
    assert handler.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(served, tmp_path, ranges):
    stand, handler = served
    handler.limit, handler.ranges = 1000, ranges
    with pytest.raises(UserError, match=rf"stopped at 1,000 of {stand.archive.size:,} bytes(.|\n)*--from") as caught:
        archives.download(stand.archive, tmp_path)
    assert str(caught.value).count("\n") < 3
    assert [path.name for path in tmp_path.glob("*.gz*")] == ["cifar-10-binary.tar.gz.part"]
    handler.limit = None
    path = archives.download(stand.archive, tmp_path)
    assert path.read_bytes() == handler.content
    assert handler.asked == [None, "bytes=1000-"]
    assert [path.name for path in tmp_path.glob("*.gz*")] == ["cifar-10-binary.tar.gz"]


@pytest.mark.parametrize(
    "content", [lambda right: bytes(len(right)), lambda right: right + b"x", lambda right: b"<html>"]
)
def test_other_bytes_than_the_published_ones_are_refused(served, tmp_path, content):
    stand, handler = served
    right, handler.content = handler.content, content(handler.content)
    with pytest.raises(UserError, match=r"is not the published file(.|\n)*--from"):
        archives.download(stand.archive, tmp_path)
    assert not list(tmp_path.glob("*.gz*"))
    handler.content = right
    assert archives.download(stand.archive, tmp_path).exists()


def test_a_refusal_by_the_server_is_told(served, tmp_path):
    stand, handler = served
    handler.status = 404
    with pytest.raises(UserError, match=r"cannot be downloaded from http://127.0.0.1.*404(.|\n)*--from"):
        archives.download(stand.archive, tmp_path)


@pytest.mark.parametrize("function", [sources.load, sources.check])
def test_no_connection_is_told_with_the_way_out(stand10, tmp_path, monkeypatch, function):
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/cifar-10-binary.tar.gz"
        monkeypatch.setitem(archives.ARCHIVES, "cifar10", dataclasses.replace(stand10.archive, url=url))
        with pytest.raises(UserError, match=rf"{url}(.|\n)*--from") as caught:
            function("cifar10", "train" if function is sources.load else ["train"], data_dir=tmp_path)
    assert str(caught.value).count("\n") < 3


def test_a_name_server_that_does_not_answer_is_not_waited_for(stand10, monkeypatch):
    answer = threading.Event()

    def connect(*_, **__):
        answer.wait()
        raise OSError("nobody there")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(UserError, match=r"no answer from 127\.0\.0\.1"):
        archives.check_reachable(stand10.archive, timeout=0.2)
    answer.set()  # only now: it was given up before any answer came


# --- the command ---


def test_the_command_prepares(stand10, tmp_path, capsys):
    arguments = ["cifar10", "--from", str(stand10.packed), "--data_dir", str(tmp_path / "tfds")]
    assert prepare.main(arguments, {"cifar10": stand10.archive}) == 0
    assert capsys.readouterr().out == f"cifar10 is ready in {tmp_path}/tfds/cifar10/3.0.2\n"
    assert_prepared(stand10, tmp_path / "tfds")


@pytest.mark.parametrize("arguments", [["cifar10", "--from", "/nowhere"], ["cifar11"], [], ["cifar10", "--form", "x"]])
def test_mistakes_end_with_status_2_and_at_most_three_lines(tmp_path, arguments):
    command = [sys.executable, "-m", "vit_jax.data.prepare", *arguments]
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 2 and run.stdout == ""
    assert 1 <= len(run.stderr.splitlines()) <= 3 and "Traceback" not in run.stderr


def test_help_has_examples(capsys):
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
    seen, places = set(), range(0, len(rows), 5)
    for place in places:
        example = read[split][place]
        name, _, index = example["id"].decode().partition("_")
        row = rows[int(index)]
        assert (name, len(index)) == (split, 5) and example["label"] == row[int(sys.argv[3]) - 1]
        assert (example["image"].transpose(2, 0, 1).ravel() == row[-3072:]).all()
        seen.add(int(index))
    assert len(seen) == len(places)
print(",".join(tfds.builder(sys.argv[1]).info.features["label"].names))
assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_tfds_in_a_fresh_process_reads_the_real_set(images, real_sets, name):
    archive = archives.ARCHIVES[name]
    files = [str(images / archive.folder / file) for file in archive.members]
    arguments = [sys.executable, "-c", FRESH, name, ",".join(files), str(len(archive.label_keys))]
    environment = {**os.environ, "TFDS_DATA_DIR": str(real_sets)}
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    expected = (images / archive.folder / archive.label_files[-1]).read_text().split()
    assert run.stdout.strip().split(",") == expected and len(expected) == {"cifar10": 10, "cifar100": 100}[name]
