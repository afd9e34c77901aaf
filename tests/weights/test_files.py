"""Files of arrays: arrays are read bitwise as written, and invalid or hostile files are rejected in three lines."""

import io
import json
import os
import pickle
import struct
import subprocess
import warnings
import zipfile
import zlib
from pathlib import Path

import helpers_torch
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from helpers import run_command

from vit_jax.errors import UserError
from vit_jax.weights import files

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", ml_dtypes.bfloat16]
SHAPES = [(), (0,), (3,), (0, 4), (2, 3, 4)]


def arrays_of(dtypes, seed=0):
    """Arrays of every dtype and shape, filled with arbitrary bits (0 and 1 for bool)."""
    rng = np.random.default_rng(seed)
    found = {}
    for dtype in map(np.dtype, dtypes):
        for shape in SHAPES:
            count = int(np.prod(shape))
            bits = rng.integers(0, 2 if dtype.kind == "b" else 256, count * dtype.itemsize, np.uint8)
            found[f"{dtype.name}/{'x'.join(map(str, shape)) or 'scalar'}"] = bits.view(dtype).reshape(shape)
    return found


def assert_same(stored, arrays):
    assert set(stored.arrays) == set(stored.shapes) == set(stored.dtypes) == set(arrays)
    assert len(stored.arrays) == len(arrays)
    for name, array in arrays.items():
        found = stored.arrays[name]
        assert found.dtype == stored.dtypes[name] == array.dtype, name
        assert found.shape == stored.shapes[name] == array.shape, name
        assert found.tobytes() == array.tobytes(), name


# --- reading ---------------------------------------------------------------------------------------------------


def test_npz_comes_back_bitwise(tmp_path):
    arrays = arrays_of(DTYPES)
    files.write_npz(tmp_path / "a.npz", arrays)
    stored = files.open_file(tmp_path / "a.npz")
    assert (stored.format, stored.config, stored.metadata) == ("npz", None, {})
    assert list(stored.arrays) == list(arrays)
    assert_same(stored, arrays)


def test_safetensors_comes_back_bitwise(tmp_path):
    arrays = arrays_of([*DTYPES, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn])
    files.write_safetensors(tmp_path / "a.safetensors", arrays, {"format": "pt"})
    stored = files.open_file(tmp_path / "a.safetensors")
    assert (stored.format, stored.metadata) == ("safetensors", {"format": "pt"})
    assert_same(stored, arrays)


def test_npz_files_are_compatible_with_numpy(tmp_path):
    arrays = arrays_of([dtype for dtype in DTYPES if dtype is not ml_dtypes.bfloat16])
    files.write_npz(tmp_path / "ours.npz", arrays)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as theirs:
        assert {name: theirs[name].tobytes() for name in theirs.files} == {n: a.tobytes() for n, a in arrays.items()}
    np.savez(tmp_path / "numpy.npz", **arrays)
    assert_same(files.open_file(tmp_path / "numpy.npz"), arrays)
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    assert_same(files.open_file(tmp_path / "small.npz"), arrays)


def test_files_are_compatible_with_the_safetensors_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    arrays = arrays_of([dtype for dtype in DTYPES if dtype is not ml_dtypes.bfloat16])
    files.write_safetensors(tmp_path / "ours.safetensors", arrays, {"format": "pt"})
    theirs = library.load_file(tmp_path / "ours.safetensors")
    assert {name: a.tobytes() for name, a in theirs.items()} == {name: a.tobytes() for name, a in arrays.items()}
    library.save_file(arrays, tmp_path / "library.safetensors", {"format": "pt"})
    assert_same(files.open_file(tmp_path / "library.safetensors"), arrays)
    # Not only the arrays: the file.
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_other_byte_and_axis_orders(tmp_path, compressed):
    values = np.arange(24.0).reshape(2, 3, 4)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "a.npz", big=values.astype(">f4"), fortran=np.asfortranarray(values), both=values.T.astype(">f2"))
    stored = files.open_file(tmp_path / "a.npz")
    assert stored.dtypes == {"big": np.float32, "fortran": np.float64, "both": np.float16}
    np.testing.assert_array_equal(stored.arrays["big"], values)
    np.testing.assert_array_equal(stored.arrays["fortran"], values)
    np.testing.assert_array_equal(stored.arrays["both"], values.T)
    assert all(stored.arrays[name].dtype.isnative for name in stored.arrays)


def test_bfloat16_saved_by_numpy(tmp_path):
    values = np.array([1.5, -2.0, 3e38, np.inf]).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "a.npz", a=values)
    stored = files.open_file(tmp_path / "a.npz")
    assert stored.dtypes["a"] == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored.arrays["a"].astype(np.float64), values.astype(np.float64))


def test_a_large_compressed_array_spans_many_blocks(tmp_path):
    values = np.random.default_rng(0).integers(0, 40, 1_500_001).astype(np.float32)
    np.savez_compressed(tmp_path / "a.npz", a=values)
    np.testing.assert_array_equal(files.open_file(tmp_path / "a.npz").arrays["a"], values)


def test_an_archive_of_python_2(tmp_path, recwarn):
    path = write_zip(tmp_path / "a.npz", [("a.npy", header("(2L, 3L)") + np.arange(6, dtype=np.float32).tobytes())])
    np.testing.assert_array_equal(files.open_file(path).arrays["a"], [[0, 1, 2], [3, 4, 5]])
    assert not recwarn.list


def sharded(folder, index=None):
    first, second = {"a": np.arange(3.0)}, {"b": np.ones((2, 2), np.float16), "c": np.arange(2)}
    files.write_safetensors(folder / "model-00001-of-00002.safetensors", first, {"format": "pt"})
    files.write_safetensors(folder / "model-00002-of-00002.safetensors", second)
    index = index or dict.fromkeys(first, "model-00001-of-00002.safetensors") | dict.fromkeys(
        second, "model-00002-of-00002.safetensors"
    )
    (folder / files.INDEX).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": index}))
    return first | second


def test_sharded_files(tmp_path):
    arrays = sharded(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    for path in (tmp_path, tmp_path / files.INDEX):
        stored = files.open_file(path)
        assert stored.path == tmp_path / files.INDEX
        assert (stored.format, stored.metadata) == ("safetensors", {"format": "pt"})
        assert stored.config == {"architecture": "vit"}
        assert_same(stored, arrays)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"a": "../model-00001-of-00002.safetensors"}, "not in its directory"),
        ({"a": "/etc/passwd"}, "not in its directory"),
        ({"a": "model-00003-of-00002.safetensors"}, "no such file"),
        ({"z": "model-00001-of-00002.safetensors"}, "about 'a'"),
        ({"a": 7}, "no weight_map"),
    ],
)
def test_an_inconsistent_index(tmp_path, index, words):
    sharded(tmp_path, index)
    rejected(tmp_path, words)


def test_the_weights_file_of_a_directory(tmp_path):
    rejected(tmp_path, "has no file of weights (.safetensors, .npz, .pth, .bin, .msgpack)")
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    rejected(tmp_path, "is HDF5")
    (tmp_path / "other.msgpack").write_bytes(serialization.msgpack_serialize({"a": np.ones(2)}))
    assert files.open_file(tmp_path).path == tmp_path / "other.msgpack"
    helpers_torch.save({"a": np.ones(2)}, tmp_path / "a.pth")
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps({}))
    assert files.open_file(tmp_path).path == tmp_path / "a.pth"
    helpers_torch.save({"a": np.ones(2)}, tmp_path / "b.ckpt")
    rejected(tmp_path, "several weights files: a.pth, b.ckpt")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    rejected(tmp_path, "pytorch_model.bin is a pickle")
    files.write_npz(tmp_path / "a.npz", {"a": np.ones(2)})
    assert files.open_file(tmp_path).path == tmp_path / "a.npz"
    files.write_npz(tmp_path / "b.npz", {"b": np.ones(2)})
    rejected(tmp_path, "several weights files: a.npz, b.npz")
    files.write_safetensors(tmp_path / "model.safetensors", {"c": np.ones(2)})
    assert files.open_file(tmp_path).path == tmp_path / "model.safetensors"


def test_config_json_in_the_same_directory(tmp_path):
    files.write_npz(tmp_path / "a.npz", {"a": np.ones(2)})
    for text, words in [
        ("[1]", "not a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ]:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=f"config.json cannot be loaded: .*{words}"):
            files.open_file(tmp_path / "a.npz")
    (tmp_path / "config.json").write_text('{"num_heads": 3}')
    assert files.open_file(tmp_path / "a.npz").config == {"num_heads": 3}


def test_the_format_is_determined_by_the_content(tmp_path):
    files.write_safetensors(tmp_path / "a.bin", {"a": np.ones(2)})
    files.write_npz(tmp_path / "a.safetensors", {"a": np.ones(2)})
    assert files.open_file(tmp_path / "a.bin").format == "safetensors"
    assert files.open_file(tmp_path / "a.safetensors").format == "npz"


# --- rejected files ------------------------------------------------------------------------------------------------


def rejected(path, words, look_up=None):
    """The error message: at most three printable lines, the first with the name of the file."""
    with pytest.raises(UserError) as caught:
        stored = files.open_file(path)
        if look_up is not None:
            _ = stored.arrays[look_up]
    message = str(caught.value)
    lines = message.splitlines()
    assert words in message, message
    assert len(lines) <= 3 and str(path) in lines[0], message
    assert all(line.isprintable() for line in lines), message
    assert len(lines[0]) < 300 + len(str(path)), message
    return message


class Boom:
    """Creates a directory when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def header(shape, descr="'<f4'", order="False"):
    stream = io.BytesIO()
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    stream.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode())
    return stream.getvalue()


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # about names used twice
        for name, data in members:
            archive.writestr(name, data)
    return path


def patched(path, **fields):
    """Overwrites fields of the first member, in the directory and in the header before its data."""
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    offsets = {"flags": (8, 6, "<H"), "crc": (16, 14, "<I"), "compressed": (20, 18, "<I"), "size": (24, 22, "<I")}
    offsets["method"] = (10, 8, "<H")
    for name, value in fields.items():
        central, local, form = offsets[name]
        struct.pack_into(form, data, at + central, value)
        struct.pack_into(form, data, local, value)
    path.write_bytes(data)
    return path


def test_pickles(tmp_path):
    trace = tmp_path / "ran"
    np.savez(tmp_path / "object.npz", a=np.array([Boom(trace)], object), allow_pickle=True)
    rejected(tmp_path / "object.npz", "pickled Python objects")
    (tmp_path / "renamed.npz").write_bytes(pickle.dumps(Boom(trace)))
    (tmp_path / "renamed.safetensors").write_bytes(pickle.dumps(Boom(trace)))
    for suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        (tmp_path / f"old{suffix}").write_bytes(pickle.dumps(Boom(trace), protocol=0))
        assert "more than arrays (posix.mkdir)" in rejected(tmp_path / f"old{suffix}", "is a pickle")
    write_zip(tmp_path / "torch.npz", [("archive/data.pkl", pickle.dumps(Boom(trace))), ("archive/data/0", b"1234")])
    for name in ("renamed.npz", "renamed.safetensors", "torch.npz"):
        rejected(tmp_path / name, "is a pickle")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.npz", b"", "the file is empty"),
        ("a.safetensors", b"", "the file is empty"),
        ("a.npz", b"not a zip archive at all", "neither .npz nor .safetensors nor of torch.save, or is corrupt"),
        ("a.txt", b"not a zip archive at all", "neither .npz nor .safetensors"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "is HDF5, which is not supported"),
        ("a.npz", b"\x89HDF\r\n\x1a\n", "is HDF5, which is not supported"),
        ("flax_model.msgpack", b"\x81\xa6params", "truncated or corrupt"),
        ("a.npy", b"\x93NUMPY\x01\x00", "is a single array"),
        ("a.npz", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        ("a.safetensors", b"<!DOCTYPE html><html>", "a web page"),
        ("a.npz", b"\n<html>", "a web page"),
        ("a.npz", b"PK\x05\x06" + bytes(18), "contains no arrays"),
        ("a.npz", b"PK\x03\x04", "truncated or corrupt"),
    ],
)
def test_other_formats(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    rejected(tmp_path / name, words)


def test_missing_unreadable_and_special_files(tmp_path, monkeypatch):
    rejected(tmp_path / "a.npz", "there is no such file")
    os.mkfifo(tmp_path / "pipe.npz")
    rejected(tmp_path / "pipe.npz", "not a regular file")
    files.write_npz(tmp_path / "a.npz", {"a": np.ones(2)})

    def denied(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)  # permissions do not apply to root, who may run the tests
    rejected(tmp_path / "a.npz", "cannot be read: Permission denied")


@pytest.mark.parametrize("cut", [1, 30, 100, 1000, 3000])
@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_truncated(tmp_path, form, cut):
    path = tmp_path / f"a.{form}"
    write = files.write_npz if form == "npz" else files.write_safetensors
    write(path, {"a": np.ones(512, np.float32), "b": np.ones(512, np.float32)})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - cut])
    rejected(path, "truncated")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("head", "data", "words"),
    [
        (header("(2, 3)"), bytes(20), "is inconsistent: [2, 3] of float32 takes 24 bytes, but it has 20"),
        (header("(2, 3)"), bytes(28), "is inconsistent: [2, 3] of float32 takes 24 bytes, but it has 28"),
        (header("(1000000, 1000000)"), bytes(24), "takes 4,000,000,000,000 bytes"),
        (header("(4294967296, 4294967296)"), bytes(24), "takes 73,786,976,294,838,206,464 bytes"),
        (header("(18446744073709551616, 0)"), b"", "claims the shape"),
        (header("(-6,)"), bytes(24), "claims the shape"),
        (header("(True,)"), bytes(4), "claims the shape"),
        (header("(" + "1," * 40 + ")"), bytes(4), "claims the shape"),
        (header("(" + "(" * 3000), bytes(4), "no readable .npy header"),
        (header("(6,)", "'|O'"), bytes(48), "pickled Python objects"),
        (header("(6,)", "[('a', '|O')]"), bytes(48), "pickled Python objects"),
        (header("(6,)", "[('a', '<f4')]"), bytes(24), "unsupported dtype"),
        (header("(6,)", "'<M8[s]'"), bytes(48), "unsupported dtype"),
        (header("(6,)", "'V3'"), bytes(18), "unsupported dtype"),
        (header("(6,)", "('<f4', (2,))"), bytes(48), ""),
        (header("(6,)", "__import__('os').system('true')"), bytes(24), "no readable .npy header"),
        (b"\x93NUMPY\x03\x00" + bytes(30), b"", "no readable .npy header"),
        (b"\x93NUMPY\x01\x00\xff\xff" + bytes(30), b"", "no readable .npy header"),
        (b"", b"", "no readable .npy header"),
    ],
)
def test_inconsistent_npy_headers(tmp_path, compression, head, data, words):
    rejected(write_zip(tmp_path / "a.npz", [("a.npy", head + data)], compression), words)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["a.npy", "a.npy"], "two members are named 'a.npy'"),
        (["/etc/a.npy"], "a path as its name"),
        (["../a.npy"], "a path as its name"),
        (["b/../a.npy"], "a path as its name"),
        (["b//a.npy"], "a path as its name"),
        ([".npy"], "a path as its name"),
        (["C:/a.npy"], "a path as its name"),
        (["b\\a.npy"], "an invalid name"),
        (["a\n\x1b[31mb.npy"], "an invalid name"),
        (["a" * 600 + ".npy"], "an invalid name"),
        (["readme.txt"], "is not a .npy array"),
        (["folder/"], "is not a .npy array"),
    ],
)
def test_invalid_member_names(tmp_path, members, words):
    data = header("(2,)") + bytes(8)
    rejected(write_zip(tmp_path / "a.npz", [(name, data) for name in members]), words)


def test_inconsistent_zip_directories(tmp_path):
    data = header("(2,)") + bytes(8)

    def fresh(compression=zipfile.ZIP_STORED):
        return write_zip(tmp_path / "a.npz", [("a.npy", data), ("b.npy", data)], compression)

    rejected(patched(fresh(), flags=1), "is encrypted")
    rejected(patched(fresh(), method=14), "a compression other than deflate")
    rejected(patched(fresh(), size=len(data) + 8), "claims 144 bytes, which its data cannot expand to")
    rejected(patched(fresh(), size=len(data) + 400, compressed=len(data) + 400), "overlaps")
    rejected(patched(fresh(), crc=7), "its checksum differs", look_up="a")
    rejected(patched(fresh(zipfile.ZIP_DEFLATED), size=2**31), "which its data cannot expand to")
    moved = bytearray(fresh().read_bytes())
    second = moved.index(b"PK\x01\x02", moved.index(b"PK\x01\x02") + 4)
    struct.pack_into("<I", moved, second + 42, 0)  # the second member at the position of the first
    (tmp_path / "a.npz").write_bytes(moved)
    rejected(tmp_path / "a.npz", "does not match the zip directory")


def test_a_flipped_bit_is_detected(tmp_path):
    files.write_npz(tmp_path / "a.npz", {"a": np.arange(100.0)})
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[600] ^= 4
    (tmp_path / "a.npz").write_bytes(data)
    rejected(tmp_path / "a.npz", "'a': corrupt: its checksum differs", look_up="a")


@pytest.mark.parametrize(("held", "words"), [(64, "more bytes than it claims"), (1, "fewer bytes than it claims")])
def test_a_compressed_member_with_a_wrong_size(tmp_path, held, words):
    claimed = header("(1000,)") + bytes(4000)
    write_zip(tmp_path / "a.npz", [("a.npy", header("(1000,)") + bytes(4000 * held // 2))], zipfile.ZIP_DEFLATED)
    rejected(patched(tmp_path / "a.npz", size=len(claimed), crc=zlib.crc32(claimed)), words, look_up="a")


def local(name, data, size, method=0):
    """A zip member's own header, and its name."""
    fields = (b"PK\x03\x04", 20, 0, method, 0, 0, zlib.crc32(data), len(data), size, len(name), 0)
    return struct.pack("<4sHHHHHIIIHH", *fields) + name


def listed(name, data, size, at, method=0):
    """A zip member's entry in the directory."""
    fields = (b"PK\x01\x02", 20, 20, 0, method, 0, 0, zlib.crc32(data), len(data), size, len(name), 0, 0, 0, 0, 0, at)
    return struct.pack("<4sHHHHHHIIIHHHHHII", *fields) + name


def ended(body, directory, count):
    return body + directory + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0)


def archive_of(name, deflated, size):
    """An archive of one compressed member that claims to expand to `size` bytes."""
    return ended(local(name, deflated, size, 8) + deflated, listed(name, deflated, size, 0, 8), 1)


def test_overlapping_members(tmp_path):
    """The basis of efficient zip bombs: members that share bytes (Fifield, A better zip bomb, WOOT 2019)."""
    inner = header("(2,)") + bytes(8)
    quoted = header("(43,)") + local(b"b.npy", inner, len(inner)) + inner + b"\0"
    assert len(quoted) == 128 + 43 * 4
    body = local(b"a.npy", quoted, len(quoted)) + quoted
    at = body.index(b"PK\x03\x04", 4)
    directory = listed(b"a.npy", quoted, len(quoted), 0) + listed(b"b.npy", inner, len(inner), at)
    (tmp_path / "a.npz").write_bytes(ended(body, directory, 2))
    rejected(tmp_path / "a.npz", "member 'b.npy' overlaps")


SAFE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def safe(**changes):
    return {"a": SAFE["a"] | changes}


def write_safe(path, fields, data=bytes(8), length=None):
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize(
    ("fields", "data", "length", "words"),
    [
        (SAFE, bytes(7), None, "truncated: its arrays take 8 bytes, but it has 7"),
        (SAFE, bytes(9), None, "1 of its bytes belong to no array"),
        (SAFE, bytes(8), 2**40, "a header of 1,099,511,627,776 bytes in a file of"),
        (SAFE, bytes(8), 2**63, "truncated or corrupt"),
        (SAFE, bytes(8), 5, "not valid JSON"),
        (SAFE, bytes(3 * 10**6), 2 * 10**6 + 1, "at most 2,000,000 are allowed"),
        (safe(shape=[3]), bytes(8), None, "'a' is inconsistent: [3] of float32 takes 12 bytes, but its data_offsets 8"),
        (safe(shape=[2**40, 2**40]), bytes(8), None, "'a' is inconsistent"),
        (safe(shape=[2**60, 0]), bytes(8), None, "claims the shape"),
        (safe(shape=[-2]), bytes(8), None, "claims the shape"),
        (safe(shape=[2.0]), bytes(8), None, "claims the shape"),
        (safe(shape=[True, 2]), bytes(8), None, "claims the shape"),
        (safe(shape="2"), bytes(8), None, "claims the shape"),
        (safe(shape=[1] * 40 + [2]), bytes(8), None, "claims the shape"),
        (safe(dtype="F4"), bytes(8), None, "the unsupported dtype 'F4'"),
        (safe(dtype=["F32"]), bytes(8), None, "unsupported dtype"),
        (safe(data_offsets=[8, 0]), bytes(8), None, "'a' is inconsistent"),
        (safe(data_offsets=[8, 16]), bytes(16), None, "leaves a gap"),
        (safe(data_offsets=[0]), bytes(8), None, "claims the data_offsets"),
        (safe(data_offsets=[-8, 0]), bytes(8), None, "claims the data_offsets"),
        (SAFE | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), None, "overlaps"),
        (SAFE | {"b": SAFE["a"]}, bytes(8), None, "overlaps"),
        (SAFE | {"b\n": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}, bytes(12), None, "the invalid name"),
        (SAFE | {"": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}, bytes(12), None, "the invalid name"),
        (SAFE | {"b": 7}, bytes(8), None, "no dtype, shape and data_offsets for 'b'"),
        (SAFE | {"__metadata__": {"a": 1}}, bytes(8), None, "__metadata__"),
        ({"__metadata__": {}}, b"", None, "contains no arrays"),
        (b'{"a": 1, "a": 2}', b"", None, "contains 'a' twice"),
        (b'{"a":' + b"[" * 100_000, b"", None, "nested too deeply"),
        (b'{"a": \xff}', b"", None, "not valid UTF-8"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', bytes(8), None, ""),
        (b"{} []", b"", None, "not valid JSON"),
    ],
)
def test_inconsistent_safetensors(tmp_path, fields, data, length, words):
    rejected(write_safe(tmp_path / "a.safetensors", fields, data, length), words)


def test_invalid_booleans(tmp_path):
    fields = {"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}
    rejected(
        write_safe(tmp_path / "a.safetensors", fields, b"\x01\x02"), "boolean values other than 0 and 1", look_up="a"
    )


def test_an_array_larger_than_the_free_memory(tmp_path, monkeypatch):
    files.write_npz(tmp_path / "a.npz", {"a": np.ones(1000, np.float32)})
    monkeypatch.setattr(files.psutil, "virtual_memory", lambda: type("", (), {"available": 3999})())
    rejected(tmp_path / "a.npz", "'a': needs 4,000 bytes of memory, but only 3,999 are free", look_up="a")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16, "c8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values(dtype, value):
    array = np.ones((7, 11), dtype)
    files.check_finite("a", array)
    array[3, 4] = value
    array[6, 10] = value
    with pytest.raises(UserError, match=r"^a: 2 of its 77 values are NaN or infinite"):
        files.check_finite("a", array)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16])
def test_finite_values_whose_sum_overflows(dtype):
    files.check_finite("a", np.full(1000, ml_dtypes.finfo(dtype).max, dtype))
    files.check_finite("a", np.zeros(0, dtype))
    files.check_finite("a", np.array(ml_dtypes.finfo(dtype).min, dtype))


# --- memory --------------------------------------------------------------------------------------------

_MEASURE = """
import pathlib, sys
import numpy, psutil
from vit_jax.errors import UserError
from vit_jax.weights import files
def memory(key):  # not getrusage, which starts from the parent's peak
    return next(int(l.split()[1]) for l in pathlib.Path("/proc/self/status").read_text().splitlines() if key in l)
before = memory("VmRSS")  # once, so that memory that is not freed counts for later files
for path in sys.argv[1:]:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    try:
        stored = files.open_file(path)
        for name in stored.arrays:
            stored.arrays[name]
        said = "READ"
    except UserError as error:
        said = str(error).splitlines()[0]
    print(memory("VmHWM") - before, said)
"""


def bombs(folder):
    """Files of a few MB that claim gigabytes, by name, with a part of the error message."""
    block = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = block.compress(header(f"({2**30},)")) + block.compress(bytes(2**26)) + block.flush(zlib.Z_FULL_FLUSH)
    zeros = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    data += (zeros.compress(bytes(2**26)) + zeros.flush(zlib.Z_FULL_FLUSH)) * 63 + b"\x03\x00"
    name, size = b"a.npy", 128 + 2**32
    (folder / "bomb.npz").write_bytes(archive_of(name, data, size - 2**16))  # zip stores sizes below 2**32
    with zipfile.ZipFile(folder / "many.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for index in range(12):
            archive.writestr(f"{index}.npy", header("(5000000,)") + bytes(20_000_000))
    # The largest allowed directory: zipfile creates an object of about 600 bytes for every 48 bytes.
    entry = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0) + b"aa"
    directory = entry * 41_000
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 65_535, 65_535, len(directory), 4, 0)
    (folder / "directory.npz").write_bytes(b"PK\x03\x04" + directory + end)
    helpers_torch.write(folder / "operations.pth", b"\x80\x02" + b"}" * 19_000_000)
    text = "\U0001f600" + "x" * 19_000_000
    helpers_torch.write(folder / "text.pth", b"\x80\x02X" + struct.pack("<I", len(text) + 3) + text.encode() + b".")
    with zipfile.ZipFile(folder / "many.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("a/data/0", bytes(110_000_000))
    (folder / "lists.msgpack").write_bytes(b"\x81\xa1a" + b"\xdd\xff\xff\xff\xff" * 10**6)
    (folder / "maps.msgpack").write_bytes(b"\xdf\xff\xff\xff\xff\xa1a" * 10**6)
    write_safe(folder / "header.safetensors", b'{"a":[' + b"{}," * 660_000 + b"{}]}", b"")
    keys = b",".join(b'"%x":{}' % index for index in range(170_000))
    write_safe(folder / "keys.safetensors", b"{" + keys + b"}", b"")
    write_safe(folder / "shape.safetensors", safe(shape=[2**45]), bytes(8))
    write_zip(folder / "shape.npz", [("a.npy", header("(70000, 70000)") + bytes(24))])
    return {
        "bomb.npz": "as in a zip bomb",
        "many.npz": "as in a zip bomb",
        "directory.npz": "two members are named 'aa'",
        "operations.pth": "its pickle has more than 1,000,000 operations",
        "text.pth": "no tensors were found",
        "many.pth": "as in a zip bomb",
        "lists.msgpack": "is a list",
        "maps.msgpack": "nested too deeply",
        "header.safetensors": "no dtype, shape and data_offsets for 'a'",
        "keys.safetensors": "no dtype, shape and data_offsets for '0'",
        "shape.safetensors": "is inconsistent",
        "shape.npz": "is inconsistent",
    }


def measured(paths):
    """For each file, read in one separate process: the growth of its peak memory in bytes, and the message."""
    output = run_command(_MEASURE, *paths, stderr=subprocess.PIPE)
    found = [line.split(" ", 1) for line in output.splitlines()]
    return [(int(grown) * 1024, message) for grown, message in found]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory that Linux records")
def test_rejecting_a_file_needs_little_memory(tmp_path):
    expected = bombs(tmp_path)
    paths = [tmp_path / name for name in expected]
    for path, words, (grown, message) in zip(paths, expected.values(), measured(paths), strict=True):
        assert words in message, (path, message)
        assert grown < 200e6 + path.stat().st_size, (path, grown)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory that Linux records")
def test_reading_needs_the_memory_of_one_array(tmp_path):
    arrays = {str(index): np.ones(2**22, np.float32) for index in range(8)}
    files.write_npz(tmp_path / "a.npz", arrays)
    files.write_safetensors(tmp_path / "b.safetensors", arrays)
    np.savez_compressed(tmp_path / "c.npz", a=np.random.default_rng(0).standard_normal(2**22, np.float32))
    few = {name: arrays[name] for name in "012"}
    helpers_torch.save(few, tmp_path / "d.pth")
    (tmp_path / "e.msgpack").write_bytes(serialization.msgpack_serialize(few))
    found = measured(sorted(tmp_path.iterdir()))
    assert [message for _, message in found] == ["READ"] * 5
    assert all(0.9 * 2**24 < grown < 1.5 * 2**24 for grown, _ in found), found  # an array is 2**24 bytes


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [files.write_npz, files.write_safetensors])
def test_a_failed_write_keeps_the_old_file(tmp_path, write, monkeypatch):
    path = tmp_path / "a"
    write(path, {"a": np.ones(3)})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="a cannot be written: No space left on device"):
            write(path, {"a": np.zeros(3)})
    with pytest.raises(UserError, match="cannot be written"):
        write(path, {"a": np.array([None])})
    with pytest.raises(UserError, match="cannot be written: "):
        write(path / "b", {"a": np.zeros(3)})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_missing_directories_are_created(tmp_path):
    files.write_npz(tmp_path / "new" / "er" / "a.npz", {"a": np.ones(3)})
    assert files.open_file(tmp_path / "new" / "er").arrays["a"].sum() == 3


@pytest.mark.parametrize("name", ["../a", "/a", "a\nb"])
def test_names_that_cannot_be_read_are_not_written(tmp_path, name):
    with pytest.raises(UserError, match="cannot be written"):
        files.write_npz(tmp_path / "a.npz", {name: np.ones(3)})


def test_non_contiguous_arrays(tmp_path):
    values = np.arange(24.0).reshape(2, 3, 4)
    arrays = {"t": values.T, "s": values[:, ::2], "b": values.astype(">f8")}
    for write in (files.write_npz, files.write_safetensors):
        write(tmp_path / "a", arrays)
        stored = files.open_file(tmp_path / "a")
        for name, array in arrays.items():
            np.testing.assert_array_equal(stored.arrays[name], array)
