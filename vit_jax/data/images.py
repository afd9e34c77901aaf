"""Decoding of single images to arrays of a given size and number of channels.

Everything that reads images calls `decode` or `convert`: training, whether cached or streamed, `data.skip_broken`,
prediction, features. docs/data.md states the rules.
"""

import contextlib
import errno
import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from PIL import Image

from vit_jax.data import image_metadata, listing, pixel_modes, preparation
from vit_jax.data.pixel_modes import ImageError
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.errors import UserError, one_line

RULES = 3  # increased whenever an image may be decoded differently: part of the key of every cache

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LARGE = 2**26  # pixels; larger images are decoded one at a time, since each needs gigabytes
_one_at_a_time = threading.Lock()

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Errors of the machine: the same file can be read later, or elsewhere.
_NOT_THE_FILE = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.ESTALE}
# Where in a file these bytes are, and what that means.
_OTHER_CONTENT = (
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"pk\x03\x04", "a zip archive"),
    (0, b"%pdf", "a PDF document"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<", "an HTML or XML page"),
    (0, b"{", "JSON"),
    (0, b"ii*\0", "a TIFF file with pixels of another type, or damaged"),
    (0, b"mm\0*", "a TIFF file with pixels of another type, or damaged"),
    (0, b"ii+\0", "a BigTIFF file with pixels of another type, or damaged"),
    (0, b"mm\0+", "a BigTIFF file with pixels of another type, or damaged"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; download the file with git lfs pull"),
    (0, b"\x89hdf", "an HDF5 file"),
    (0, b"\x93numpy", "a NumPy file; of arrays, set config.data.name=arrays"),
    (0, b"\xff\x0a", "a JPEG XL image; convert it to PNG"),
    (4, b"jxl ", "a JPEG XL image; convert it to PNG"),
    (4, b"ftyphei", "a HEIC photo; convert it to JPEG or PNG"),
    (4, b"ftyphev", "a HEIC photo; convert it to JPEG or PNG"),
    (4, b"ftypmif1", "a HEIF photo; convert it to JPEG or PNG"),
    (4, b"ftypmsf1", "a HEIF photo; convert it to JPEG or PNG"),
    (4, b"ftypcrx", "a raw photo; convert it to JPEG or PNG"),
    (4, b"ftypavi", "an AVIF image, which this Pillow cannot read, or damaged"),
    (4, b"ftyp", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
    (8, b"avi ", "a video"),
    (128, b"dicm", "a DICOM file; write its pixels as PNG, with its window applied"),
    (344, b"n+1", "a NIfTI file; write its slices as PNG"),
)

# Pillow warns about metadata that it cannot read, and about large images that are within its limit; it logs errors that
# it also raises.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def decode(
    encoded: bytes | Path, shape: tuple[int, int, int], how: Preparation = COVER
) -> UInt8[np.ndarray, "height width channels"]:
    """Returns an image in any format that Pillow reads, with the height, width and channels of `shape`.

    The EXIF orientation is applied. Grey, palette and CMYK images are converted to RGB if `shape` has three channels;
    transparent pixels are blended with white; integers of 12 and 16 bits are reduced to their upper 8 bits. The first
    image of an animation or of several pages is read. `how` it is resized and cropped is that of training by default.

    Raises:
        ImageError: whatever is wrong with the image; nothing else is raised because of its content.
        UserError: the machine cannot read the file now, for example because too many files are open.
    """
    image = load(encoded, shape[2])
    try:
        return preparation.fit(image, shape[:2], how)
    except MemoryError as error:
        raise _explained(error, "the image") from error


def convert(
    image: Image.Image, shape: tuple[int, int, int], how: Preparation = COVER
) -> UInt8[np.ndarray, "height width channels"]:
    """Returns `decode` of an image that Pillow has opened.

    Raises:
        ImageError, UserError: as `decode`.
    """
    try:
        return preparation.fit(_decode(image, shape[2]), shape[:2], how)
    except ImageError:
        raise
    except Exception as error:
        raise _explained(error, "the image") from error


def load(encoded: bytes | Path, channels: int) -> Image.Image:
    """Returns an image as `decode` does, but in its own size.

    Raises:
        ImageError, UserError: as `decode`.
    """
    try:
        with _open(encoded) as file:
            return _decode_file(file, channels)
    except (ImageError, UserError):
        raise
    except Exception as error:
        raise _explained(error, "the image" if isinstance(encoded, bytes) else encoded) from error


def median_size(files: Iterable[Path]) -> tuple[int, int] | None:
    """Returns the median height and the median width of image files, without decoding them; None if none can be read.

    The EXIF orientation is not applied.
    """
    sizes = []
    for path in files:
        try:
            with _open(path) as file, Image.open(file) as image:
                sizes.append((image.height, image.width))
        except (OSError, ValueError, ImageError, Image.DecompressionBombError):
            continue
    return tuple(map(int, np.median(sizes, axis=0))) if sizes else None


def _open(encoded: bytes | Path) -> io.BufferedIOBase:
    """Opens an image, but nothing that would block or never end."""
    if isinstance(encoded, bytes):
        return io.BytesIO(encoded)
    kind = stat.S_IFMT(os.stat(encoded).st_mode)
    if kind != stat.S_IFREG:
        raise ImageError(f"it is {_KINDS.get(kind, 'not a file')}", is_final=False)
    return open(encoded, "rb")  # not by its path: Pillow would map it into memory, and die if it is truncated meanwhile


def _decode_file(file: io.BufferedIOBase, channels: int) -> Image.Image:
    try:
        return _decode_opened(file, channels)
    except (ImageError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception as error:
        try:  # often, the metadata is damaged and the pixels are whole
            return _decode_opened(io.BytesIO(image_metadata.removed(file)), channels)
        except Exception as other:
            if not isinstance(error, PIL.UnidentifiedImageError):
                raise error from other
        file.seek(0)
        raise ImageError(_content(file.read(512))) from error


def _decode_opened(file: io.BufferedIOBase, channels: int) -> Image.Image:
    with Image.open(file) as image:
        image_metadata.keep_orientation(image)
        return _decode(image, channels)


def _decode(image: Image.Image, channels: int) -> Image.Image:
    """Returns an opened image in its own size, in the mode with that number of channels, turned as it is to be seen."""
    if not image.width * image.height:
        raise ImageError("it has no pixels")
    with _one_at_a_time if image.width * image.height > _LARGE else contextlib.nullcontext():
        layout = pixel_modes.layout_of(image)
        image.load()
        return pixel_modes.to_mode(image_metadata.turned(image), _MODES[channels], layout)


def _explained(error: Exception, name: str | Path) -> ImageError | UserError:
    """Returns our error for one that was raised while `name` was read: Pillow's decoders raise many types."""
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, the limit; reduce its size")
    if isinstance(error, MemoryError):
        return ImageError("it needs more memory than there is", is_final=False)
    if not isinstance(error, OSError):
        return ImageError(one_line(error) if str(error) else f"damaged ({type(error).__name__})")
    if error.errno in _NOT_THE_FILE:
        return UserError(
            f"{name} cannot be read now: {error.strerror}\n  check the machine and its disks: the file may be whole"
        )
    # Without a number, the error is Pillow's own; and Pillow seeks where damaged files say.
    return ImageError(_reason(error, name), is_final=error.errno in (None, errno.EINVAL))


def _reason(error: OSError, name: str | Path) -> str:
    if error.errno == errno.ENOENT:
        if not os.path.islink(name):
            return "no such file"
        return one_line(f"it is a link to {listing.printable(os.readlink(name))}, which does not exist")
    if error.errno == errno.ELOOP:
        return "it is a loop of links"
    return one_line(error.strerror.lower() if error.strerror else error)


def _content(start: bytes) -> str:
    """Returns why a file that starts with these bytes is no image."""
    if not start:
        return "it is empty (0 bytes)"
    start = start.lower()
    found = [name for offset, part, name in _OTHER_CONTENT if start.startswith(part, offset)]
    found += [name for offset, part, name in _OTHER_CONTENT if offset == 0 and start.lstrip().startswith(part)]
    return "not an image, or a format that Pillow does not support" + (f": it is {found[0]}" if found else "")


def resize_and_crop(
    image: UInt8[np.ndarray, "height width channels"], size: tuple[int, int], how: Preparation = COVER
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """Returns the image resized and cropped to `size` (height, width); as it is if that is its size."""
    if image.shape[:2] == tuple(size):
        return image
    opened = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return preparation.fit(opened, size, how)
