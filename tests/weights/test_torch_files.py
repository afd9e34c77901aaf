"""Files of torch.save: recorded ones are read bitwise as torch wrote them; hostile ones are refused in three lines."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import helpers_torch
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.weights import files, torch_files

RECORDED = Path(__file__).resolve().parent / "torch_files"
NAMES = sorted(path.name.removesuffix(".safetensors") for path in RECORDED.glob("*.safetensors"))


def rezipped(source, target, compression=zipfile.ZIP_STORED, change=None):
    """Copies an archive, with another compression or changed members."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", compression) as copy:
        for name in archive.namelist():
            data = archive.read(name)
            copy.writestr(name, change(name, data) if change else data)
    return target


def assert_same(path, expected):
    stored, expected = files.open_file(path), files.open_file(expected)
    assert stored.format == "torch"
    assert stored.shapes == expected.shapes and stored.dtypes == expected.dtypes
    for name, array in expected.arrays.items():
        found = stored.arrays[name]
        assert found.flags.c_contiguous and found.dtype == array.dtype and found.shape == array.shape, name
        assert found.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("name", NAMES)
def test_recorded_files(name):
    assert_same(RECORDED / name, RECORDED / f"{name}.safetensors")


@pytest.mark.parametrize("name", ["dtypes.pth", "views.pth", "module.pt"])
def test_compressed(tmp_path, name):
    path = rezipped(RECORDED / name, tmp_path / "a.pth", zipfile.ZIP_DEFLATED)
    assert_same(path, RECORDED / f"{name}.safetensors")


def test_big_endian(tmp_path):
    dtypes = list(files.open_file(RECORDED / "dtypes.pth").dtypes.values())

    def change(name, data):
        if name.endswith("byteorder"):
            return b"big"
        parent, _, key = name.rpartition("/")
        if not parent.endswith("/data"):
            return data
        dtype = dtypes[int(key)]
        unit = dtype.itemsize // (2 if dtype.kind == "c" else 1)
        return np.frombuffer(data, f"u{unit}").byteswap().tobytes()

    assert_same(
        rezipped(RECORDED / "dtypes.pth", tmp_path / "a.pth", change=change), RECORDED / "dtypes.pth.safetensors"
    )


def refused(path, words, read=True):
    with pytest.raises(UserError) as caught:
        stored = files.open_file(path)
        _ = read and [stored.arrays[name] for name in stored.arrays]
    message = str(caught.value)
    lines = message.splitlines()
    assert words in message and str(path) in lines[0] and len(lines) <= 3, message
    assert all(line.isprintable() for line in lines) and len(lines[0]) < 300 + len(str(path)), message
    return message


def test_tensors_that_are_refused():
    refused(RECORDED / "refused_quantized.pth", "'weight': tensors of _rebuild_qtensor (quantized, sparse, ")
    refused(
        RECORDED / "refused_expanded.pth", "'weight': [1000] of float32 with strides [0] is larger than its storage"
    )


@pytest.mark.parametrize("name", ["views.pth", "legacy_views.pth"])
def test_truncated_and_damaged(tmp_path, name):
    data = (RECORDED / name).read_bytes()
    for size in (1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "a.pth").write_bytes(data[:size])
        refused(tmp_path / "a.pth", "")
    at = data.index(np.arange(24, dtype=np.float32).tobytes())
    (tmp_path / "a.pth").write_bytes(data[: at + 8] + b"\x99" + data[at + 9 :])
    if name == "views.pth":
        refused(tmp_path / "a.pth", "its checksum differs")


FLOAT = b"ctorch\nFloatStorage\n"


def storage(kind=FLOAT, key=b"U\x010", numel=b"K\x10", more=b""):
    return b"(U\x07storage" + kind + key + b"U\x03cpu" + numel + more + b"tQ"


def tensor(stored=None, offset=b"K\0", shape=b"K\x04\x85", strides=b"K\x01\x85", function=b"_rebuild_tensor_v2"):
    """The operations that make a tensor, with four of the storage's sixteen numbers."""
    start = b"ctorch._utils\n" + function + b"\n(" + (storage() if stored is None else stored)
    return start + offset + shape + strides + b"\x89}tR"


def content(inside=None, name=b"U\x01x"):
    return b"\x80\x02}(" + name + (tensor() if inside is None else inside) + b"u."


LARGE = b"\x8a\x09" + b"\0" * 8 + b"\x01"  # 2**64
HOSTILE = {
    "beyond the storage": (content(tensor(offset=b"K\x0d")), "is larger than its storage"),
    "shape beyond the storage": (content(tensor(shape=b"K\x11\x85")), "is larger than its storage"),
    "strides beyond the storage": (content(tensor(strides=b"K\x06\x85")), "is larger than its storage"),
    "repeated values": (content(tensor(shape=b"K\xff\x85", strides=b"K\0\x85")), "is larger than its storage"),
    "an enormous shape": (content(tensor(shape=LARGE + b"\x85")), "its shape, strides or offset are invalid"),
    "negative strides": (content(tensor(strides=b"J\xff\xff\xff\xff\x85")), "its shape, strides or offset are invalid"),
    "a shape of text": (content(tensor(shape=b"U\x011\x85")), "its shape, strides or offset are invalid"),
    "a shape of bools": (content(tensor(shape=b"\x88\x85")), "its shape, strides or offset are invalid"),
    "40 axes": (content(tensor(shape=b"(" + b"K\x01" * 40 + b"t", strides=b"(" + b"K\x01" * 40 + b"t")), "invalid"),
    "fewer strides": (content(tensor(strides=b")")), "its shape, strides or offset are invalid"),
    "no arguments": (content(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "its description is corrupt"),
    "a parameter of nothing": (content(b"ctorch._utils\n_rebuild_parameter\nN\x85R"), "a parameter of no tensor"),
    "no storage": (content(tensor(b"N")), "its reference to a storage is invalid"),
    "no such storage": (content(tensor(storage(key=b"U\x017"))), "its storage is missing"),
    "storage outside": (content(tensor(storage(key=b"U\x0a../version"))), "its storage is missing"),
    "the claimed storage is too small": (content(tensor(storage(numel=b"K\x03"))), "is larger than its storage"),
    "the storage is smaller than claimed": (
        content(tensor(storage(numel=b"K\x7f"), shape=b"K\x7f\x85")),
        "is larger than its storage",
    ),
    "an unknown dtype": (content(tensor(storage(b"cos\nsystem\n"))), "its dtype is not supported"),
    "an unprintable name": (content(name=b"U\x02a\n"), "the invalid name 'a\\n'"),
    "an empty name": (content(name=b"U\0"), "the invalid name ''"),
    "a long name": (content(name=b"X" + struct.pack("<I", 10**5) + b"x" * 10**5), "the invalid name 'xxx"),
    "two of a name": (
        b"\x80\x02}(U\x03a.b" + tensor() + b"U\x01a}U\x01b" + tensor() + b"su.",
        "two tensors are named 'a.b'",
    ),
    "a tensor alone": (b"\x80\x02" + tensor() + b".", "the invalid name ''"),
    "nested dictionaries": (b"\x80\x02" + b"}U\x01x" * 50 + tensor() + b"s" * 50 + b".", "nested too deeply"),
    "deeply nested lists": (b"\x80\x02" + b"(" * 20_000 + b"l" * 20_000 + b".", "no tensors were found"),
    "an enormous place in the memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "no tensors were found"),
    "an enormous text": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f" + b"abc.", "corrupt or truncated"),
    "enormous bytes": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x0fabc.", "corrupt or truncated"),
    "an enormous frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "no tensors were found"),
    "an enormous number as a key": (b"\x80\x02}\x8b\xf0\x49\2\0" + b"\x7f" * 150_000 + b"Ns.", "no tensors were found"),
    "a cycle": (b"\x80\x02}q\0U\x01xh\0s.", "no tensors were found"),
    "an empty stack": (b"\x80\x020.", "corrupt or truncated"),
    "no mark": (b"\x80\x02Nt.", "corrupt or truncated"),
    "nothing in the memo": (b"\x80\x02h\x07.", "corrupt or truncated"),
    "attributes of a dictionary": (b"\x80\x02}}b.", "corrupt or truncated"),
    "items of a number": (b"\x80\x02K\x01NNs.", "corrupt or truncated"),
    "a text as a persistent id": (b"\x80\x02P0\n.", "its pickle has PERSID"),
    "an extension code": (b"\x80\x02\x82\x01.", "its pickle has EXT1"),
    "no end": (b"\x80\x02}", "corrupt or truncated"),
    "no pickle": (b"hello", "corrupt or truncated"),
    "nothing": (b"", "corrupt or truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(tmp_path, case):
    pickled, words = HOSTILE[case]
    refused(helpers_torch.write(tmp_path / "a.pth", pickled), words)


def test_the_tensor_of_the_hostile_pickles_is_read_when_it_is_not(tmp_path):
    values = np.arange(16, dtype=np.float32)
    path = helpers_torch.write(tmp_path / "a.pth", content(tensor(offset=b"K\x0c")), [values.tobytes()])
    np.testing.assert_array_equal(files.open_file(path).arrays["x"], values[12:])


@pytest.mark.parametrize(("leaf", "words"), [(b"N", "more than 1,000 entries"), (tensor(), "more than 100 tensors")])
def test_dictionaries_that_share_entries_do_not_multiply(tmp_path, monkeypatch, leaf, words):
    monkeypatch.setattr(torch_files, "_MAX_ENTRIES", 1000)
    monkeypatch.setattr(torch_files, "_MAX_TENSORS", 100)
    pickled = b"\x80\x02}U\x01t" + leaf + b"sq\x000"
    for level in range(8):  # each has the one before it 20 times
        entries = b"".join(b"U\x01%ch%c" % (65 + number, level) for number in range(20))
        pickled += b"}(" + entries + b"uq%c0" % (level + 1)
    refused(helpers_torch.write(tmp_path / "a.pth", pickled + b"h\x08."), words)


MODULE = b"c__main__\nX\n)\x81}(U\x0b_parametersh%cU\x08_buffersh%cU\x08_modulesh%cub"


def test_modules_in_place_of_their_own_parts_do_not_multiply(tmp_path):
    pickled = b"\x80\x02}q\0" + b"".join(MODULE % (i, i, i) + b"q%c" % (i + 1) for i in range(60))
    refused(helpers_torch.write(tmp_path / "a.pth", pickled + b"0" * 61 + b"h\x3c."), "no tensors were found")


def test_long_names_are_kept_once(tmp_path):
    """Of a text of 10 kB as the name of 1,500 classes, and of a long number as the key of 1,500 dictionaries."""
    text = b"\x8d" + struct.pack("<Q", 10_000) + b"x" * 10_000 + b"\x94"
    number = b"\x8a\xff" + b"\x7f" * 255 + b"\x94"
    pickled = b"\x80\x04" + text + number + b"](" + b"h\0h\0\x93" * 1500 + b"}h\1Ns" * 1500 + b"e\x87."
    path = helpers_torch.write(tmp_path / "a.pth", pickled)
    tracemalloc.start()
    refused(path, "objects that cannot be listed")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6, peak


def test_tensors_that_share_a_storage_do_not_multiply_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.weights.npz._EXPANDED", 0)
    pickled = b"\x80\x02}(U\x03abc" + tensor(shape=b"K\x10\x85") + b"q\0"
    pickled += b"".join(b"U\x03%03dh\0" % number for number in range(900)) + b"u."
    refused(helpers_torch.write(tmp_path / "a.pth", pickled), "as in a zip bomb")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"byteorder": b"middle"}, "its byte order is neither little nor big"),
        ({"more": [("b/data.pkl", b"\x80\x02N.")]}, "it has 2 members called data.pkl"),
        ({"more": [("a/data/0", bytes(64))]}, "two members are named 'a/data/0'"),
        ({"more": [("a/x\n", b"")]}, "has an invalid name"),
        ({"compression": zipfile.ZIP_BZIP2}, "a compression other than deflate"),
        ({"storages": [bytes(12)]}, "is larger than its storage"),
        ({"storages": []}, "its storage is missing"),
    ],
)
def test_hostile_archives(tmp_path, options, words):
    refused(helpers_torch.write(tmp_path / "a.pth", content(), **options), words)


def test_encrypted_members_and_bombs(tmp_path):
    path = helpers_torch.write(tmp_path / "a.pth", content())
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    refused(path, "is encrypted")
    refused(helpers_torch.write(path, content(), [bytes(2 * 10**8)], compression=zipfile.ZIP_DEFLATED), "a zip bomb")
    refused(helpers_torch.write(path, b"\x80\x02" + b"N0" * 10**7 + b"N."), "its pickle has more than 20,000,000 bytes")


def test_other_pickles(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.ones(2)}))
    refused(tmp_path / "a.pkl", "it has no tensors of PyTorch")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(torch_files._MAGIC, 2))
    refused(tmp_path / "a.pkl", "corrupt or truncated")
    stream = io.BytesIO()
    for part in (torch_files._MAGIC, 1001, {"little_endian": True}, {}, [["x"]]):
        pickle.dump(part, stream, 2)
    (tmp_path / "a.pkl").write_bytes(stream.getvalue())
    refused(tmp_path / "a.pkl", "its list of storages is corrupt")
