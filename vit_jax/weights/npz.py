"""Safe reading of NumPy's .npz archives: nothing is unpickled, and every size is checked before it is used.

An .npz file is a zip archive of .npy members (numpy.lib.format). `entries` checks the archive's directory and the
header of every member against each other and against the file; `read` reads one array and verifies its checksum.
numpy.load checks neither, holds the data twice while it reads a compressed member, and allocates as much memory as a
header claims.

Both raise ValueError with the reason; `vit_jax.weights.files` turns it into a UserError that names the file.
"""

import dataclasses
import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np

from vit_jax.errors import one_line

_MAX_DIRECTORY = 2 * 10**6  # bytes of zip directory: about 15,000 members
_MAX_HEADER = 10_000  # bytes of a member's header, numpy's own limit
# Compressed members may expand to this many bytes, plus this multiple of the file's size. Weights hardly compress.
_EXPANDED = 100 * 10**6
_EXPANSION = 4
_BLOCK = 2**18
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED, _UTF8 = 0x1, 0x800


@dataclasses.dataclass(frozen=True)
class Member:
    """The position of a member's data in the archive.

    Attributes:
        start, size: of the (possibly compressed) data in the file, bytes.
        expanded: number of bytes of the expanded data.
        compressed: with deflate; otherwise uncompressed.
        crc: the CRC-32 of the expanded data.
    """

    start: int
    size: int
    expanded: int
    compressed: bool
    crc: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """The position and format of one array in the archive.

    Attributes:
        shape, dtype: of the array as it is returned, in the machine's byte order.
        stored: the dtype in the file.
        fortran_order: the first axis varies fastest.
        header: bytes of the .npy header at the beginning of the (expanded) member.
        member: where the header and the array are.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stored: np.dtype
    fortran_order: bool
    header: int
    member: Member

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def entries(file: BinaryIO, members: Mapping[str, Member]) -> dict[str, Entry]:
    """The arrays of the archive by name (without .npy), in the order of its directory.

    Raises:
        ValueError: a member is corrupt, inconsistent, or something other than a plain array.
    """
    for name in members:
        _check_name(name)
    return {name.removesuffix(".npy"): _entry(file, name, member) for name, member in members.items()}


def members(file: BinaryIO, size: int) -> dict[str, Member]:
    """The members of a zip archive by name, in the order of its directory, which is checked against the file.

    Raises:
        ValueError: the archive is corrupt, inconsistent, or a zip bomb.
    """
    listed, end = _directory(file, size)
    check_expansion(sum(one.file_size for one in listed if one.compress_type == zipfile.ZIP_DEFLATED), size)
    found: dict[str, Member] = {}
    covered = 0
    for one in sorted(listed, key=lambda one: one.header_offset):
        start = _data_start(file, one)
        if one.header_offset < covered or start + one.compress_size > end:
            raise ValueError(f"member {one.filename!r} overlaps another one or the end of the archive")
        covered = start + one.compress_size
        compressed = one.compress_type == zipfile.ZIP_DEFLATED
        found[one.orig_filename] = Member(start, one.compress_size, one.file_size, compressed, one.CRC)
    return {one.orig_filename: found[one.orig_filename] for one in listed}


def check_expansion(expanded: int, size: int) -> None:
    """Raises ValueError if a file of `size` bytes expands to too many."""
    if expanded > _EXPANDED + _EXPANSION * size:
        raise ValueError(
            f"its {size:,} bytes expand to {expanded:,}, as in a zip bomb; "
            "if you trust the file, write it again without compression"
        )


def _directory(file: BinaryIO, size: int) -> tuple[list[zipfile.ZipInfo], int]:
    """The members in the archive's directory, with checked names, and the position of the directory in the file."""
    try:
        with zipfile.ZipFile(_Bounded(file, size)) as archive:
            listed, end = archive.infolist(), archive.start_dir
    except zipfile.BadZipFile as error:
        raise ValueError("truncated or corrupt: its zip directory is missing or invalid") from error
    except (NotImplementedError, OverflowError, UnicodeError, struct.error, EOFError) as error:
        raise ValueError(f"its zip directory is corrupt ({error})") from error
    seen = set()
    for member in listed:
        _check_member(member)
        if member.orig_filename in seen:
            raise ValueError(f"two members are named {member.orig_filename!r}")
        seen.add(member.orig_filename)
    if not listed:
        raise ValueError("it contains no arrays")
    return listed, end


class _Bounded(io.RawIOBase):
    """A file wrapper that limits the directory size; zipfile has no limit and creates an object for every 46 bytes."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._file.tell(), 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > _MAX_DIRECTORY:
            raise ValueError(f"its zip directory has {wanted:,} bytes; at most {_MAX_DIRECTORY:,} are allowed")
        return self._file.read(wanted)


def _check_name(name: str) -> None:
    """Raises ValueError unless the member's name is that of an array."""
    if not name.endswith(".npy"):
        raise ValueError(f"member {name[:80]!r} is not a .npy array")
    if any(part in ("", ".", "..", ".npy") for part in name.split("/")) or ":" in name.split("/")[0]:
        raise ValueError(f"member {name[:80]!r} has a path as its name")


def _check_member(member: zipfile.ZipInfo) -> None:
    """Raises ValueError unless the member has a plain name and a possible size."""
    name = member.orig_filename
    shown = repr(name[:80])
    if len(name) > 512 or not name.isprintable() or "\\" in name:
        raise ValueError(f"member {shown} has an invalid name")
    if member.flag_bits & _ENCRYPTED:
        raise ValueError(f"member {shown} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"member {shown} uses a compression other than deflate")
    # Deflate expands one byte to at most 1,032.
    possible = member.compress_size if member.compress_type == zipfile.ZIP_STORED else 1040 * member.compress_size
    if member.file_size > possible or (possible == member.compress_size != member.file_size):
        raise ValueError(f"member {shown} claims {member.file_size:,} bytes, which its data cannot expand to")


def _data_start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """The position of the member's data, from its local header, which must match the directory."""
    file.seek(member.header_offset)
    local = file.read(_LOCAL_HEADER.size)
    if len(local) == _LOCAL_HEADER.size:
        signature, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack(local)
        name = file.read(name_length)
        encoded = member.orig_filename.encode("utf-8" if member.flag_bits & _UTF8 else "cp437")
        if (signature, name, method, flags & _ENCRYPTED) == (b"PK\x03\x04", encoded, member.compress_type, 0):
            return member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    raise ValueError(f"member {member.orig_filename!r} does not match the zip directory")


def _entry(file: BinaryIO, name: str, member: Member) -> Entry:
    file.seek(member.start)
    head = file.read(min(member.size, _MAX_HEADER + 128))
    if member.compressed:
        try:
            head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, _MAX_HEADER + 128)
        except zlib.error as error:
            raise ValueError(f"member {name!r} is corrupt ({error})") from error
    shape, fortran_order, stored, header = _npy_header(head, name)
    actual = member.expanded - header
    expected = math.prod(shape) * stored.itemsize
    if expected != actual:
        raise ValueError(
            f"member {name!r} is inconsistent: {list(shape)} of {stored} takes {expected:,} bytes, "
            f"but it has {actual:,}"
        )
    # numpy cannot name bfloat16 and writes it as two untyped bytes.
    dtype = np.dtype(ml_dtypes.bfloat16) if stored.kind == "V" else stored.newbyteorder("=")
    return Entry(shape, dtype, stored, fortran_order, header, member)


def _npy_header(head: bytes, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """The array's shape, whether it is in Fortran order, its dtype, and the length of the header in bytes.

    numpy's own reader parses the header as a literal, which cannot execute code, but does not check the shape.
    """
    stream = io.BytesIO(head)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        with warnings.catch_warnings(action="ignore"):  # about files written by Python 2
            shape, fortran_order, dtype = readers[version](stream, max_header_size=_MAX_HEADER)
    except Exception as error:  # also SyntaxError, MemoryError and RecursionError of Python's parser
        raise ValueError(f"member {name!r} has no readable .npy header: {one_line(error)}") from error
    if dtype.hasobject:
        raise ValueError(f"member {name!r} contains pickled Python objects, which can execute code when they are read")
    if dtype.kind not in "biufcSU" and not (dtype.kind == "V" and dtype.itemsize == 2 and not dtype.names):
        raise ValueError(f"member {name!r} has the unsupported dtype {dtype}")
    if dtype.shape or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError(f"member {name!r} claims the shape {str(shape)[:80]}")
    return shape, fortran_order, dtype, stream.tell()


def read(file: BinaryIO, entry: Entry, out: np.ndarray) -> np.ndarray:
    """The array of `entry`, read into `out` (uint8, `entry.nbytes` long).

    Raises:
        ValueError: the member is corrupt, or shorter or longer than its header claims.
    """
    member = entry.member
    file.seek(member.start)
    if member.compressed:
        crc = inflate(file, member.size, out, entry.header)
    else:
        crc = copy(file, out, zlib.crc32(file.read(entry.header)))
    if crc != member.crc:
        raise ValueError("corrupt: its checksum differs from the archive's")
    array = out.view(entry.stored)
    if not entry.stored.isnative:
        array = array.byteswap(inplace=True)
    array = array.view(entry.dtype)
    return array.reshape(entry.shape[::-1]).T if entry.fortran_order else array.reshape(entry.shape)


def copy(file: BinaryIO, out: np.ndarray, crc: int = 0) -> int:
    """Fills `out` (uint8) from the file; returns the CRC-32, computed per block while the block is in the CPU cache."""
    for start in range(0, len(out), _BLOCK):
        block = out[start : start + _BLOCK]
        fill(file, block)
        crc = zlib.crc32(block, crc)
    return crc


def fill(file: BinaryIO, out: np.ndarray) -> None:
    """Fills `out` (uint8) from the file; ValueError if the file ends before that."""
    done = 0
    while done < len(out):
        got = file.readinto(memoryview(out)[done:])  # Linux reads at most 2 GB per call
        if not got:
            raise ValueError("the file ends before the end of the array")
        done += got


def inflate(file: BinaryIO, left: int, out: np.ndarray, skip: int = 0) -> int:
    """Decompresses `left` bytes of the file into `out`, never beyond it, after `skip` bytes; returns the CRC-32."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    done, crc = -skip, 0
    tail = b""
    while not inflater.eof:
        if not tail:
            tail = file.read(min(_BLOCK, left))
            left -= len(tail)
            if not tail:
                break
        try:
            block = inflater.decompress(tail, _BLOCK)
        except zlib.error as error:
            raise ValueError(f"corrupt ({error})") from error
        tail = inflater.unconsumed_tail
        crc = zlib.crc32(block, crc)
        if done + len(block) > len(out):
            raise ValueError("it expands to more bytes than it claims")
        skipped = min(max(-done, 0), len(block))
        out[done + skipped : done + len(block)] = np.frombuffer(block, np.uint8)[skipped:]
        done += len(block)
    if done != len(out):
        raise ValueError("it expands to fewer bytes than it claims")
    return crc


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an uncompressed archive, as numpy.savez does, in the order of `arrays`; bfloat16 as two bytes each.

    Raises:
        ValueError: .npz cannot store the dtype of an array, or an array has an invalid name.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            array = np.asarray(array)
            if array.dtype == ml_dtypes.bfloat16:
                array = array.view("V2")
            elif array.dtype.kind not in "biufcSU":
                raise ValueError(f"{name} has dtype {array.dtype}, which .npz cannot store; use .safetensors")
            member = zipfile.ZipInfo(f"{name}.npy")
            _check_member(member)
            _check_name(member.orig_filename)
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
