"""Flax's .msgpack files: what flax.serialization writes is read bitwise; hostile files are refused in three lines."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import unflatten_dict

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.weights import files

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", ml_dtypes.bfloat16]


def write(path, arrays):
    """Writes arrays, by names with slashes, as flax.serialization does."""
    path.write_bytes(serialization.msgpack_serialize(unflatten_dict(dict(arrays), sep="/")))
    return path


def refused(path, words):
    with pytest.raises(UserError) as caught:
        stored = files.open_file(path)
        _ = [stored.arrays[name] for name in stored.arrays]
    message = str(caught.value)
    assert words in message and str(path) in message and len(message.splitlines()) <= 3, message


def test_what_flax_writes(tmp_path):
    arrays = {}
    for dtype in map(np.dtype, DTYPES):
        for shape in [(), (0, 4), (2, 3, 4), (300,)]:
            values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
            arrays[f"a/{dtype.name}/{'x'.join(map(str, shape)) or 'scalar'}"] = values
    others = {"step": 7, "rate": 0.1, "none": None, "text": "x" * 40, "bytes": b"1", "flag": True, "empty": {}}
    others |= {"complex": 1j, "number": np.float32(3), "large": -(2**40)}
    stored = files.open_file(write(tmp_path / "a.msgpack", arrays | others))
    assert stored.format == "flax" and set(stored.shapes) == set(arrays)
    for name, array in arrays.items():
        found = stored.arrays[name]
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def test_a_model_of_google(helpers, tmp_path):
    model, parameters = helpers.small()
    weights.save(tmp_path / "a.npz", model, parameters)
    arrays = {f"params/{name}": array for name, array in files.open_file(tmp_path / "a.npz").arrays.items()}
    _, found, _ = weights.load(write(tmp_path / "a.msgpack", arrays), heads=3)
    helpers.same(found, parameters)


def to_flax(name, array):
    """An array of a PyTorch model as the Flax models of transformers 4 named and transposed it.

    Linear layers and convolutions have a kernel whose last axis is the output; LayerNorm has a scale.
    """
    *parts, last = name.split(".")
    if last == "weight" and array.ndim == 1:
        last = "scale"
    elif last == "weight":
        last, array = "kernel", array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return "/".join([*parts, last]), np.ascontiguousarray(array)


@pytest.mark.parametrize("name", ["hf_vit", "hf_vit_classifier", "hf_dinov2"])
def test_a_flax_model_of_hugging_face(references, helpers, tmp_path, name):
    """transformers 5 has no Flax models any more: the file is made by renaming the recorded PyTorch model."""
    arrays = dict(to_flax(key, array) for key, array in files.open_file(references / name).arrays.items())
    write(tmp_path / "flax_model.msgpack", arrays)
    shutil.copy(references / name / "config.json", tmp_path)
    model, found, _ = weights.load(tmp_path)
    expected, parameters, _ = weights.load(references / name)
    assert model == expected
    helpers.same(found, parameters)


def array(shape=b"\x91\x02", dtype=b"\xa7float32", data=b"\xc4\x08" + bytes(8), start=b"\x93"):
    inside = start + shape + dtype + data
    return b"\x81\xa1x\xc7" + bytes([len(inside)]) + b"\x01" + inside


HOSTILE = {
    "too few bytes": (array(data=b"\xc4\x04" + bytes(4)), "takes 8 bytes"),
    "an enormous shape": (array(shape=b"\x91\xcf" + b"\xff" * 8), "an impossible shape"),
    "many axes": (array(shape=b"\xdc\x00\x28" + b"\x01" * 40), "an impossible shape"),
    "a product": (array(shape=b"\x92" + b"\xce\x7f\xff\xff\xff" * 2), "is inconsistent"),
    "objects": (array(dtype=b"\xa1O"), "the unsupported dtype 'O'"),
    "structures": (array(dtype=b"\xa5f4,f4"), "the unsupported dtype"),
    "no array": (array(start=b"\x92"), "is not an array"),
    "bytes longer than the file": (array(data=b"\xc6\xff\xff\xff\xff"), "is inconsistent"),
    "an extension longer than the file": (b"\x81\xa1x\xc9\xff\xff\xff\xff\x01", "truncated or corrupt"),
    "a text longer than the file": (b"\x81\xdb\xff\xff\xff\xff", "truncated or corrupt"),
    "a key that is no text": (b"\x81\x01\x01", "number instead of text"),
    "an empty key": (b"\x81\xa0\x01", "the invalid name"),
    "an unprintable key": (b"\x81\xa1\n\x01", "the invalid name"),
    "a list": (b"\x81\xa1x\x93\x01\x02\x03", "is a list"),
    "no map": (b"\x93\x01\x02\x03", "list instead of map"),
    "twice": (array()[:1].replace(b"\x81", b"\x82") + array()[1:] * 2, "two arrays are named 'x'"),
    "nesting": (b"\x81\xa1x" * 100, "nested too deeply"),
    "an unused byte": (b"\x81\xa1x\xc1", "truncated or corrupt"),
    "more after its end": (array() + b"\0", "1 bytes after its end"),
    "nothing": (b"\x80", "contains no arrays"),
    "chunks": (b"\x81\xb9__msgpack_chunked_array__\x01", "in chunks, which is not supported"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    data, words = HOSTILE[case]
    (tmp_path / "a.msgpack").write_bytes(data)
    refused(tmp_path / "a.msgpack", words)


def test_damaged_files(references, tmp_path):
    stored = files.open_file(references / "hf_vit")
    arrays = dict(to_flax(key, stored.arrays[key]) for key in sorted(stored.shapes)[:4])
    data = write(tmp_path / "a.msgpack", arrays).read_bytes()
    generator, counts = np.random.default_rng(0), {"read": 0, "refused": 0}
    for _ in range(200):
        changed = bytearray(data)
        at = generator.integers(len(data))
        if generator.integers(3):
            changed[at] = generator.integers(256)
        else:
            del changed[at : at + generator.integers(1, 50)]
        (tmp_path / "a.msgpack").write_bytes(changed)
        try:
            stored = files.open_file(tmp_path / "a.msgpack")
            _ = [stored.arrays[name] for name in stored.arrays]
            counts["read"] += 1
        except UserError as error:
            assert len(str(error).splitlines()) <= 3
            counts["refused"] += 1
    assert min(counts.values()) > 10, counts


def test_the_bytes_of_the_hostile_files_are_read_when_they_are_not(tmp_path):
    (tmp_path / "a.msgpack").write_bytes(array())
    np.testing.assert_array_equal(files.open_file(tmp_path / "a.msgpack").arrays["x"], np.zeros(2, np.float32))
