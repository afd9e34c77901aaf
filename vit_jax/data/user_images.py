"""Images as a user gives them: paths, directories, contents of files, images of Pillow, arrays."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from vit_jax import arguments, terminal
from vit_jax.data import images as image_files
from vit_jax.data import listing
from vit_jax.data.listing import LeftOut
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.errors import UserError, one_line

# A path, the contents of an image file or a file opened for reading bytes, an opened image of Pillow, or an array.
Image = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | np.ndarray | jax.Array | PIL.Image.Image
_BYTES = (bytes, bytearray, memoryview)


def read(
    image: Image, shape: tuple[int, int, int], how: Preparation = COVER
) -> UInt8[np.ndarray, "height width channels"] | str:
    """Returns an image as the model takes it, before normalization; or the reason why it cannot be read.

    Args:
        image: as a user gives it.
        shape: height, width and channels of the result.
        how: it is resized and cropped; by default as in training.
    """
    try:
        if not isinstance(image, np.ndarray):
            return _decode_other(image, shape, how)
        if image.dtype != np.uint8:
            return f"the array has dtype {image.dtype}, not uint8"
        if not _is_image_shape(image.shape):
            return f"the array has shape {image.shape}, not [height, width] or [height, width, 1, 3 or 4]"
        opened = PIL.Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        return image_files.convert(opened, shape, how)
    except (image_files.ImageError, UserError) as error:
        return one_line(error)


def _decode_other(
    image: Image, shape: tuple[int, int, int], how: Preparation
) -> UInt8[np.ndarray, "height width channels"]:
    """Returns what `read` does, of anything but an array."""
    if isinstance(image, PIL.Image.Image):
        return image_files.convert(image, shape, how)
    return image_files.decode(image if isinstance(image, bytes) else Path(image), shape, how)


def each_image(images: Image | Iterable[Image]) -> Iterator[Image]:
    """Yields one image or several: paths as text, arrays as those of NumPy; bytes and Pillow's images as they are.

    Raises:
        UserError: something else is among them.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUST":  # of paths, or of other images
        images = images.ravel().tolist()
    is_array = hasattr(images, "__array__") and not isinstance(images, PIL.Image.Image)
    single = isinstance(images, (str, *_BYTES, os.PathLike, PIL.Image.Image)) or hasattr(images, "read")
    if single or (is_array and np.ndim(images) < 4):
        yield _as_image("images", images)
        return
    if not isinstance(images, Iterable):
        raise _not_an_image("images", images)
    for index, image in enumerate(np.asarray(images) if is_array else images):
        yield _as_image(f"images[{index}]", image)


def _as_image(name: str, image: Any) -> Image:
    if hasattr(image, "read"):
        image = image.read()
        if not isinstance(image, bytes):
            raise UserError(f"{name} is a file that was opened for reading text\n  open it with the mode 'rb'")
        return image
    if isinstance(image, _BYTES):  # a path only if there is such a file: contents of images are none
        image = bytes(image)
        return os.fsdecode(image) if os.path.exists(image) else image
    if isinstance(image, str | os.PathLike):
        return os.fsdecode(image)
    if isinstance(image, PIL.Image.Image):
        return image
    if not hasattr(image, "__array__"):
        raise _not_an_image(name, image)
    return np.asarray(image)


def checked(index: int, image: Image) -> Image:
    """Returns the image; raises UserError if it is an array that cannot be an image."""
    if not isinstance(image, np.ndarray):
        return image
    if image.dtype != np.uint8:
        raise UserError(
            f"images[{index}] has pixels of dtype {image.dtype}\n  allowed: uint8, from 0 to 255; "
            "of floats from 0 to 1, pass (255 * image).round().astype('uint8')"
        )
    if not _is_image_shape(image.shape):
        raise UserError(
            f"images[{index}] has shape {list(image.shape)}\n"
            "  allowed: [height, width], or [height, width, channels] with 1, 3 or 4 channels"
            f"{_what_to_pass(image.shape)}"
        )
    return image


def _what_to_pass(shape: tuple[int, ...]) -> str:
    """Returns what to pass in place of a wrong array [..., ..., ...]."""
    if len(shape) != 3:
        return ""
    if shape[0] in (1, 3, 4):
        return "\n  of [channels, height, width], pass np.moveaxis(image, 0, -1)"
    return "\n  of gray images [images, height, width], pass images[..., None]"


def _is_image_shape(shape: tuple[int, ...]) -> bool:
    """Returns whether a shape is [height, width], or [height, width, channels] with 1, 3 or 4 channels; none is 0."""
    return len(shape) in (2, 3) and shape[2:] in ((), (1,), (3,), (4,)) and 0 not in shape


def _not_an_image(name: str, value: Any) -> UserError:
    return UserError(
        f"{name} is {arguments.shown(value)}\n  allowed: a path, bytes of an image file, an image of Pillow, or a "
        "uint8 array\n  pass a list of pixels as np.asarray(image, np.uint8)"
    )


def expand(images: Iterable[Image], say: Callable[[str], Any] = terminal.warn) -> Iterator[Image]:
    """Yields the images; in place of a directory, the images below it, sorted by path; links are followed.

    Args:
        images: paths and arrays.
        say: called with a line about what is left out of a directory; by default, that is printed to stderr.
    """
    for image in images:
        if not isinstance(image, np.ndarray) and os.path.isdir(image):
            yield from _images_below(Path(image), say)
        else:
            yield image


def _images_below(directory: Path, say: Callable[[str], Any]) -> list[Path]:
    extensions = {name for name, format_ in PIL.Image.registered_extensions().items() if format_ in PIL.Image.OPEN}
    found, left_out = [], LeftOut(directory)
    for path in map(Path, listing.files_below(directory, left_out)):
        if path.suffix.lower() in extensions:
            found.append(path)
        else:
            left_out.add("without the extension of an image", path)
    if text := left_out.describe():
        say(f"{listing.printable(str(directory))}: {text}")
    return sorted(found)
