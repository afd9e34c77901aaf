"""One image: from the bytes of a file to an array of the wanted size and number of channels."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(encoded: bytes | Path, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """An image that Pillow reads (JPEG, PNG, WebP, ...), with the height, width and channels of `shape`.

    Grey, palette and CMYK images become RGB where that is wanted; what is transparent is laid on white, and 16 bits
    become 8. A camera's note of how it was held (EXIF) is followed. See `resize_and_crop` for the size.

    Raises:
        OSError, ValueError, SyntaxError: it is no image, or is damaged or truncated.
    """
    from PIL import Image

    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        return convert(image, shape)


def convert(image: Any, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """The same of an image that Pillow has opened."""
    from PIL import Image, ImageOps

    mode = _MODES[shape[2]]
    if _is_turned(image):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if mode != "RGBA" and (image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image if image.mode == mode else image.convert(mode)
    return resize_and_crop(np.asarray(image).reshape(image.height, image.width, shape[2]), shape[:2])


def _is_turned(image: Any) -> bool:
    from PIL import ExifTags

    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except (SyntaxError, ValueError, LookupError, struct.error):  # the note is damaged, the image need not be
        return False


def resize_and_crop(
    image: UInt8[np.ndarray, "height width channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "new_height new_width channels"]:
    """Scales by one factor until `size` (height, width) is covered, bicubic as in Pillow, then crops at the centre."""
    from PIL import Image

    height, width, channels = image.shape
    if (height, width) == tuple(size):
        return image
    factor = max(size[0] / height, size[1] / width)
    new_height, new_width = max(size[0], round(height * factor)), max(size[1], round(width * factor))
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    resized = np.asarray(picture.resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = (new_height - size[0]) // 2, (new_width - size[1]) // 2
    cropped = resized[top : top + size[0], left : left + size[1]]
    return cropped.reshape(*size, channels)
