"""What image files contain beside pixels: it must not make whole pictures unreadable."""

import io
import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import ExifTags, Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_JFIF, _EXIF, _ADOBE, _SCAN, _FILL = 0xE0, 0xE1, 0xEE, 0xDA, 0xFF  # markers of JPEG files


def turned(image: Image.Image) -> Image.Image:
    """Returns an image with its EXIF orientation applied; EXIF data that cannot be read is ignored.

    Unlike `ImageOps.exif_transpose`, this does not write the EXIF data again, which fails for many tags.
    """
    turn = _TURNS.get(_orientation(image.getexif))
    return image if turn is None else image.transpose(turn)


def keep_orientation(image: Image.Image) -> None:
    """Removes from an opened TIFF file what Pillow would read while it loads the pixels, except the orientation."""
    if image.format == "TIFF":
        _orientation(image.getexif)
        exif = image.getexif()
        for tag in [tag for tag in exif if tag != ExifTags.Base.Orientation]:
            del exif[tag]
        image.info.pop("xmp", None)


def _orientation(read: Callable[[], Image.Exif]) -> int | None:
    found = None
    for _ in range(2):  # after a failure, the second call returns what was read before it
        try:
            found = read().get(ExifTags.Base.Orientation)
            break
        except Exception as error:  # Pillow raises many types
            logging.getLogger(__name__).debug("EXIF data cannot be read: %s", error)
    return found if isinstance(found, int) else None


def removed(file: io.BufferedIOBase) -> bytes:
    """Returns a JPEG, PNG or AVIF file with its pixels and its orientation, without other metadata.

    Raises:
        ValueError: it is another format, or ends too early.
    """
    file.seek(0)
    start = file.read(len(_PNG))
    file.seek(0)
    if start == _PNG:
        return _PNG + b"".join(_png_chunks(file.read()))
    if start.startswith(_JPEG):
        return _JPEG + b"".join(_jpeg_segments(file.read()))
    if start[4:] == b"ftyp":  # AVIF, which has the orientation elsewhere: an empty directory of EXIF data
        return re.sub(rb"(II\*\0\x08\0\0\0|MM\0\*\0\0\0\x08)..", rb"\1\0\0", file.read(), flags=re.DOTALL)
    raise ValueError("a format whose metadata cannot be removed")


def _png_chunks(data: bytes) -> Iterator[bytes]:
    position, kind = len(_PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + length + 12]
        checksum = struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and chunk[-4:] == checksum):
            yield chunk
        position += len(chunk)


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    position, marker = len(_JPEG), 0
    while marker != _SCAN:
        marker, length = struct.unpack_from(">xBH", data, position)
        segment = data[position : position + length + 2] if marker != _FILL else b"\xff"
        if marker == _EXIF:
            yield _only_orientation(segment)
        elif not 0xE0 <= marker <= 0xEF or marker in (_JFIF, _ADOBE):
            yield segment
        position += len(segment)
    yield data[position:]


def _only_orientation(segment: bytes) -> bytes:
    """Returns a segment of EXIF data with nothing but the orientation; empty if there is none."""
    exif, kept = Image.Exif(), Image.Exif()

    def read() -> Image.Exif:
        exif.load(segment[4:])
        return exif

    orientation = _orientation(read)
    if orientation is None:
        return b""
    kept[ExifTags.Base.Orientation] = orientation
    content = kept.tobytes()
    return struct.pack(">BBH", 0xFF, _EXIF, len(content) + 2) + content
