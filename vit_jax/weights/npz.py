"""NumPy's .npz archives read with suspicion: nothing is unpickled, and no size is believed before it is checked.

An .npz is a zip archive of .npy members (numpy.lib.format). `entries` checks the archive's directory and the header of
every member against each other and against the file; `read` brings one array, and its check sum. numpy.load does
neither, holds the data twice while it reads a compressed member, and allocates whatever a header asks for.

Both raise ValueError with the reason as a clause that follows the file's name; `vit_jax.weights.files` makes it the
user's message.
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

_DIRECTORY = 2 * 10**6  # bytes of zip directory that are read: about 15,000 members
_HEADER = 10_000  # bytes of a member's header, numpy's own limit
_EXPANDED = 100 * 10**6  # bytes that compressed members may expand to in any file,
_EXPANSION = 4  # and beyond that so many times the file's size: weights hardly compress, bombs do
_BLOCK = 2**18
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED, _UTF8 = 0x1, 0x800


class PickledError(ValueError):
    """The archive is one that torch.save wrote."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one array lies in the archive, and what it is.

    Attributes:
        shape, dtype: of the array as it is returned, in the machine's byte order.
        stored: the dtype in the file.
        fortran_order: the first axis varies fastest.
        start, size: of the member's data in the file, compressed or not; bytes.
        header: bytes of the .npy header at the beginning of the (expanded) member.
        compressed: by deflate; else stored as it is.
        crc: the CRC-32 of the expanded member.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stored: np.dtype
    fortran_order: bool
    start: int
    size: int
    header: int
    compressed: bool
    crc: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The arrays of the archive by name, without .npy, in the order of its directory.

    Raises:
        ValueError: the archive is damaged, lies about itself, or holds something else than plain arrays.
    """
    members, end = _directory(file, size)
    expanded = sum(member.file_size for member in members if member.compress_type == zipfile.ZIP_DEFLATED)
    if expanded > _EXPANDED + _EXPANSION * size:
        raise ValueError(
            f"its {size:,} bytes expand to {expanded:,}, as a zip bomb's do and weights' do not; if it is yours, "
            "write it again with numpy.savez"
        )
    found: dict[str, Entry] = {}
    covered = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        start = _data_start(file, member)
        if member.header_offset < covered or start + member.compress_size > end:
            raise ValueError(f"member {member.filename!r} overlaps another one or the end of the archive")
        covered = start + member.compress_size
        found[member.orig_filename] = _entry(file, member, start)
    return {member.orig_filename.removesuffix(".npy"): found[member.orig_filename] for member in members}


def _directory(file: BinaryIO, size: int) -> tuple[list[zipfile.ZipInfo], int]:
    """The members that the archive lists, their names checked, and where that list begins in the file."""
    try:
        with zipfile.ZipFile(_Bounded(file, size)) as archive:
            members, end = archive.infolist(), archive.start_dir
    except zipfile.BadZipFile as error:
        raise ValueError("it is truncated or damaged: its zip directory is missing or broken") from error
    except (NotImplementedError, OverflowError, UnicodeError, struct.error, EOFError) as error:
        raise ValueError(f"its zip directory is damaged ({error})") from error
    seen = set()
    for member in members:
        _check_member(member)
        if member.orig_filename in seen:
            raise ValueError(f"it holds two members named {member.orig_filename!r}")
        seen.add(member.orig_filename)
    if not members:
        raise ValueError("it holds no arrays")
    return members, end


class _Bounded(io.RawIOBase):
    """The file for zipfile, which would believe any size of directory and make an object of every 46 bytes of it."""

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
        if wanted > _DIRECTORY:
            raise ValueError(f"its zip directory has {wanted:,} bytes; at most {_DIRECTORY:,} are read")
        return self._file.read(wanted)


def _check_member(member: zipfile.ZipInfo) -> None:
    """Raises ValueError unless the member has a plain name and a size that its data can have."""
    name = member.orig_filename
    shown = repr(name[:80])
    if name.endswith(".pkl"):
        raise PickledError
    if len(name) > 512 or not name.isprintable() or "\\" in name:
        raise ValueError(f"member {shown} has a name that no array has")
    if not name.endswith(".npy"):
        raise ValueError(f"member {shown} is no .npy array")
    if any(part in ("", ".", "..", ".npy") for part in name.split("/")) or ":" in name.split("/")[0]:
        raise ValueError(f"member {shown} has a path for a name")
    if member.flag_bits & _ENCRYPTED:
        raise ValueError(f"member {shown} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"member {shown} is compressed by something else than deflate")
    # Deflate makes at most 1,032 bytes of one.
    possible = member.compress_size if member.compress_type == zipfile.ZIP_STORED else 1040 * member.compress_size
    if member.file_size > possible or (possible == member.compress_size != member.file_size):
        raise ValueError(f"member {shown} claims {member.file_size:,} bytes, more or less than its data can give")


def _data_start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the member's data begins, from the header before it, which must name the same member."""
    file.seek(member.header_offset)
    local = file.read(_LOCAL_HEADER.size)
    if len(local) == _LOCAL_HEADER.size:
        signature, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack(local)
        name = file.read(name_length)
        encoded = member.orig_filename.encode("utf-8" if member.flag_bits & _UTF8 else "cp437")
        if (signature, name, method, flags & _ENCRYPTED) == (b"PK\x03\x04", encoded, member.compress_type, 0):
            return member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    raise ValueError(f"member {member.orig_filename!r} is not where the zip directory says, or is another one")


def _entry(file: BinaryIO, member: zipfile.ZipInfo, start: int) -> Entry:
    compressed = member.compress_type == zipfile.ZIP_DEFLATED
    file.seek(start)
    head = file.read(min(member.compress_size, _HEADER + 128))
    if compressed:
        try:
            head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, _HEADER + 128)
        except zlib.error as error:
            raise ValueError(f"member {member.filename!r} is damaged ({error})") from error
    shape, fortran_order, stored, header = _npy_header(head, member.filename)
    held = member.file_size - header
    asked = math.prod(shape) * stored.itemsize
    if asked != held:
        raise ValueError(
            f"member {member.filename!r} lies: {list(shape)} of {stored} takes {asked:,} bytes, and {held:,} are there"
        )
    # numpy has no name for bfloat16 and writes it as two bytes without a meaning.
    dtype = np.dtype(ml_dtypes.bfloat16) if stored.kind == "V" else stored.newbyteorder("=")
    return Entry(shape, dtype, stored, fortran_order, start, member.compress_size, header, compressed, member.CRC)


def _npy_header(head: bytes, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """The array's shape, whether its order is Fortran's, its dtype, and the bytes that all this took.

    numpy's own reader parses it, as a literal that cannot run anything, and takes whatever shape it finds there.
    """
    stream = io.BytesIO(head)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        with warnings.catch_warnings(action="ignore"):  # that Python 2 wrote it
            shape, fortran_order, dtype = readers[version](stream, max_header_size=_HEADER)
    except Exception as error:  # also SyntaxError, MemoryError and RecursionError of Python's own parser
        raise ValueError(f"member {name!r} has no readable .npy header") from error
    if dtype.hasobject:
        raise ValueError(f"member {name!r} holds pickled Python objects, which can run code as they are read")
    if dtype.kind not in "biufcSU" and not (dtype.kind == "V" and dtype.itemsize == 2 and not dtype.names):
        raise ValueError(f"member {name!r} is of {dtype}, which no weight is")
    if dtype.shape or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError(f"member {name!r} claims the shape {str(shape)[:80]}")
    return shape, fortran_order, dtype, stream.tell()


def read(file: BinaryIO, entry: Entry, out: np.ndarray) -> np.ndarray:
    """The array of `entry`, in `out`: as many bytes (uint8) as it has.

    Raises:
        ValueError: the member is shorter or longer than it says, or damaged.
    """
    file.seek(entry.start)
    crc = _inflate(file, entry, out) if entry.compressed else _copy(file, entry, out)
    if crc != entry.crc:
        raise ValueError("it is damaged: its check sum differs from the archive's")
    array = out.view(entry.stored)
    if not entry.stored.isnative:
        array = array.byteswap(inplace=True)
    array = array.view(entry.dtype)
    return array.reshape(entry.shape[::-1]).T if entry.fortran_order else array.reshape(entry.shape)


def _copy(file: BinaryIO, entry: Entry, out: np.ndarray) -> int:
    """Reads a stored member; returns the CRC-32, taken of each block while the processor's cache still has it."""
    crc = zlib.crc32(file.read(entry.header))
    for start in range(0, len(out), _BLOCK):
        block = out[start : start + _BLOCK]
        fill(file, block)
        crc = zlib.crc32(block, crc)
    return crc


def fill(file: BinaryIO, out: np.ndarray) -> None:
    """Reads as many bytes as `out` (uint8) has; ValueError if the file ends before that."""
    done = 0
    while done < len(out):
        got = file.readinto(memoryview(out)[done:])  # Linux reads at most 2 GB at once
        if not got:
            raise ValueError("the file ends before the array does")
        done += got


def _inflate(file: BinaryIO, entry: Entry, out: np.ndarray) -> int:
    """Expands a member block by block, never beyond what it claims; returns the CRC-32."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    left, done, crc = entry.size, -entry.header, 0
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
            raise ValueError(f"it is damaged ({error})") from error
        tail = inflater.unconsumed_tail
        crc = zlib.crc32(block, crc)
        if done + len(block) > len(out):
            raise ValueError("it expands to more than it claims")
        skipped = min(max(-done, 0), len(block))
        out[done + skipped : done + len(block)] = np.frombuffer(block, np.uint8)[skipped:]
        done += len(block)
    if done != len(out):
        raise ValueError("it expands to less than it claims")
    return crc


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an uncompressed archive, as numpy.savez does, in the order of `arrays`; bfloat16 as two bytes each.

    Raises:
        ValueError: an array has a dtype that .npz has no name for, or a name that cannot be one.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            array = np.asarray(array)
            if array.dtype == ml_dtypes.bfloat16:
                array = array.view("V2")
            elif array.dtype.kind not in "biufcSU":
                raise ValueError(f"{name} is of {array.dtype}, which .npz cannot hold; write .safetensors")
            member = zipfile.ZipInfo(f"{name}.npy")
            _check_member(member)
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
