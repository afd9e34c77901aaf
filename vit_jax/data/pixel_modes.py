"""What the numbers in an image mean: how each of Pillow's modes becomes 8-bit grey, RGB or RGBA, or why it cannot."""

import dataclasses

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

_COLORS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
_INTEGERS = {"I", "I;16", "I;16L", "I;16B", "I;16N"}
_UNSIGNED = {None, "PNG", "ICO", "TIFF", "JPEG2000", "PPM", "IM"}  # formats with 16 bits and no sign; None: arrays
_SCALED = {"PNG", "PPM"}  # formats whose mode I has values from 0 to 65,535
_REFUSED_FORMATS = {
    "EPS": "a drawing, which an interpreter of PostScript would have to run: convert it to PNG",
    "WMF": "a drawing: convert it to PNG",
    "FITS": "a FITS file, whose scale and offset (BSCALE, BZERO) are not applied: convert it to 8 or 16 bits",
}
_CONVERT = "scale all images alike: (255 * (x - black) / (white - black)).round().clip(0, 255).astype('uint8')"
_GREY_KEYS = {"L;2": 85, "L;4": 17}  # by Pillow's name of the layout of a PNG file: the step between two grey values
# Tags of TIFF files.
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _SAMPLE_FORMAT = 254, 258, 262, 277, 284, 338, 339
_SUBSAMPLING = 530


class ImageError(Exception):
    """An image that cannot be read; its text is the reason, in one line, for the message of a caller that names it.

    Attributes:
        is_final: the content is the reason, so that the image will not be readable later either.
    """

    def __init__(self, reason: str, *, is_final: bool = True):
        super().__init__(reason)
        self.is_final = is_final


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the file says about its numbers and Pillow does not apply.

    Attributes:
        bits: of integers in a mode with 16 bits.
        is_inverted: 0 is white, in such a mode.
        key: the grey value that is transparent, if there is one.
        has_alpha: False if the fourth channel is not opacity, although Pillow takes it for that.
    """

    bits: int = 16
    is_inverted: bool = False
    key: int | None = None
    has_alpha: bool = True


def layout_of(image: Image.Image) -> Layout:
    """Returns the layout of an image that is opened and not loaded.

    Raises:
        ImageError: no rule says how its numbers become colors.
    """
    if image.format in _REFUSED_FORMATS:
        raise ImageError(f"it is {_REFUSED_FORMATS[image.format]}")
    if image.mode in _INTEGERS:
        _check_integers(image)
    elif image.mode == "F":
        raise ImageError(f"its pixels are floats, for which black and white are not defined; {_CONVERT}")
    elif image.mode not in _COLORS:
        raise ImageError(f"its pixels have Pillow's mode {image.mode}, which is not supported; convert it to RGB")
    return _layout_of_tiff(image) if image.format == "TIFF" else _layout_of_key(image)


def _check_integers(image: Image.Image) -> None:
    if image.mode == "I" and image.format not in _SCALED:
        raise ImageError(f"its integers have 32 bits or a sign: black and white are not defined; {_CONVERT}")
    if image.format not in _UNSIGNED:
        raise ImageError(f"black and white are not defined for integers in {image.format} files; {_CONVERT}")


def _layout_of_tiff(image: Image.Image) -> Layout:
    tags, is_raw = image.tag_v2, image.info.get("compression") == "raw"
    bits, samples = tags.get(_BITS, (1,)), tags.get(_SAMPLES, 1)
    if tags.get(_SUBFILE, 0) & 1:
        raise ImageError("it holds a preview of the picture, as raw photos do; convert the picture to PNG or JPEG")
    if 2 in tags.get(_SAMPLE_FORMAT, ()):
        raise ImageError(f"its integers have a sign: black and white are not defined; {_CONVERT}")
    if tags.get(_PLANAR) == 2 and samples > 1 and (image.mode == "LAB" or (is_raw and max(bits) > 8)):
        raise ImageError("it is a TIFF file with separate planes, which Pillow reads wrongly; save it as PNG")
    is_whole = image.mode == "YCbCr" and tuple(tags.get(_SUBSAMPLING, (2, 2))) == (1, 1)
    if is_raw and tags.get(_PHOTOMETRIC) == 6 and not is_whole:
        raise ImageError("it is a TIFF file in YCbCr without compression, which Pillow reads wrongly; save it as PNG")
    covered = [max(tile[1][axis] for tile in image.tile) for axis in (2, 3)] if image.tile else image.size
    if sorted(covered) != sorted(image.size):  # the orientation may exchange them
        raise ImageError("damaged: some of its strips are missing")
    is_inverted, has_alpha = tags.get(_PHOTOMETRIC, 0) == 0, image.mode != "RGBA" or _EXTRA in tags
    return Layout(12 if bits == (12,) else 16, is_inverted=is_inverted, has_alpha=has_alpha)


def _layout_of_key(image: Image.Image) -> Layout:
    key = image.info.get("transparency")
    stored = image.tile[0][3] if image.format == "PNG" and image.tile else None  # Pillow's name of the layout
    if isinstance(key, tuple) and stored == "RGB;16B":
        raise ImageError("one of its 16-bit colors is transparent, and Pillow keeps 8 bits only; save it with 8 bits")
    if not isinstance(key, int) or image.mode not in {"1", "L", *_INTEGERS}:
        return Layout()
    return Layout(key=255 * (key > 0) if image.mode == "1" else key * _GREY_KEYS.get(stored, 1))


def to_mode(image: Image.Image, mode: str, layout: Layout) -> Image.Image:
    """Returns a loaded image in mode L, RGB or RGBA; for L and RGB, transparent pixels are blended with white."""
    if image.mode in _INTEGERS:
        image = _reduced(image, layout)
    elif not layout.has_alpha:
        image = image.convert("RGB")
    elif layout.key is not None:
        values = np.asarray(image.convert("L"))
        image = _grey(values, values == layout.key)
    elif image.mode == "LAB":
        image = image.convert("RGB")
    elif image.mode == "La":
        image = image.convert("LA")
    if mode != "RGBA" and image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == mode else image.convert(mode)


def _reduced(image: Image.Image, layout: Layout) -> Image.Image:
    """Returns the upper 8 bits of an image of integers."""
    values = np.asarray(image)
    if image.mode == "I" and values.size and not 0 <= values.min() <= values.max() < 65536:
        raise ImageError(f"its integers are not between 0 and 65,535; {_CONVERT}")
    if values.size and 0 < values.max() < 2 ** (layout.bits - 8):
        raise ImageError(f"its integers have {layout.bits} bits, but are at most {values.max()}: black; {_CONVERT}")
    grey = (values >> (layout.bits - 8)).astype(np.uint8)
    is_transparent = None if layout.key is None else values == layout.key
    return _grey(255 - grey if layout.is_inverted else grey, is_transparent)


def _grey(
    values: UInt8[np.ndarray, "height width"], is_transparent: Bool[np.ndarray, "height width"] | None
) -> Image.Image:
    if is_transparent is None:
        return Image.fromarray(values)
    return Image.fromarray(np.dstack([values, np.where(is_transparent, 0, 255).astype(np.uint8)]))
