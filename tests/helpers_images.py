"""Image files of many kinds and what they show, computed from the arrays that were written."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

Image.init()  # all formats
SHAPE = (9, 12, 3)
generator = np.random.default_rng(0)
GREY, RGB = generator.integers(0, 256, SHAPE[:2], np.uint8), generator.integers(0, 256, SHAPE, np.uint8)
DEEP, DEEP_RGB = generator.integers(0, 65536, SHAPE[:2], np.uint16), generator.integers(0, 65536, SHAPE, np.uint16)
OPAQUE = GREY > 99
ALPHA = OPAQUE * np.uint8(255)


# --- files, written byte by byte where Pillow does not write them ---


def saved(image, kind, **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def png(depth, color, rows, *chunks, damaged=()) -> bytes:
    """A PNG file; `rows` of packed pixels, `chunks` (kind, content) before them; checksums of `damaged` are wrong."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content) ^ (kind in damaged)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", SHAPE[1], SHAPE[0], depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def packed(values, depth):
    """Rows of values of up to 16 bits, of which `depth` are kept, without gaps."""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(*values.shape, 2), axis=2)
    return np.packbits(bits[..., 16 - depth :].reshape(len(values), -1), axis=1)


def tiff(array, photometric=1, sample_format=1, planar=1, bits=None, content=None, tags=()) -> bytes:
    """An uncompressed little-endian TIFF file of an array; further `tags` are (tag, type, count, four bytes)."""
    samples = (array.shape[2:] or (1,))[0]
    content = array.tobytes() if content is None else content
    shorts = {256: array.shape[1], 257: array.shape[0], 258: bits or array.dtype.itemsize * 8, 259: 1, 262: photometric}
    shorts |= {277: samples, 278: array.shape[0], 284: planar, 339: sample_format}
    strips = samples if planar == 2 else 1
    end = 8 + 2 + 12 * (len(shorts) + 2 + len(tags)) + 4
    start, length = end + 8 * strips * (strips > 1), len(content) // strips
    offsets = struct.pack(f"<{strips}I", *(start + length * k for k in range(strips)))
    lengths = struct.pack("<I", length) * strips
    entries = [(tag, 3, 1, struct.pack("<I", value)) for tag, value in shorts.items()] + list(tags)
    entries.append((273, 4, strips, offsets if strips == 1 else struct.pack("<I", end)))
    entries.append((279, 4, strips, lengths if strips == 1 else struct.pack("<I", end + 4 * strips)))
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    more = offsets + lengths if strips > 1 else b""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4) + more + content


def exif(*entries, more=b"") -> bytes:
    """EXIF data with a directory of (tag, type, count, four bytes)."""
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4) + more


def jpeg(*segments, has_jfif=True) -> bytes:
    """The file JPEG with further segments (marker, content)."""
    texts = [struct.pack(">BBH", 255, marker, len(text) + 2) + text for marker, text in segments]
    return JPEG[:2] + b"".join(texts) + JPEG[2 if has_jfif else 20 :]


JPEG = saved(np.add.outer(np.arange(0, 90, 10), np.arange(12)).astype(np.uint8)[..., None].repeat(3, 2), "JPEG")
SHOWN = np.asarray(Image.open(io.BytesIO(JPEG)))
TURN = (0x0112, 3, 1, b"\x06\0\0\0")  # the orientation: to be seen turned clockwise
ODD_EXIF = {
    "model-of-numbers": exif(TURN, (0x0110, 5, 1, b"\x26\0\0\0"), more=bytes(8)),
    "gps-of-unknown-type": exif(TURN, (0x8825, 4, 1, b"\x26\0\0\0"), more=b"\1\0\1\0\x16\0\2\0\0\0N\0\0\0\0\0\0\0"),
    "resolution-of-one-number": exif(TURN, (0x011A, 3, 1, b"\1\0\0\0")),
    "directory-in-itself": exif(TURN, (0x8769, 4, 1, b"\x08\0\0\0"), (0x8825, 4, 1, b"\x08\0\0\0")),
    "directory-nowhere": exif(TURN, (0x8769, 4, 1, b"\xff\xff\xff\x7f"), (0x8825, 2, 4, b"abcd")),
    "unknown-type": exif(TURN, (0x0132, 77, 9, bytes(4))),
    "huge-count": exif(TURN, (0x0132, 2, 0xFFFFFFF0, b"\x08\0\0\0")),
    "ends-early": exif(TURN, (0x0132, 2, 20, b"\xf0\0\0\0"))[:36],
    "orientation-of-four-bytes": exif((0x0112, 4, 1, b"\x06\0\0\0")),
    "two-orientations": exif((0x0112, 3, 2, b"\x06\0\x06\0")),
}
UPRIGHT_EXIF = {
    "nothing": b"Exif\0\0",
    "noise": b"Exif\0\0" + bytes(range(40)),
    "orientation-42": exif((0x0112, 3, 1, b"\x2a\0\0\0")),
    "orientation-text": exif((0x0112, 2, 4, b"6\0\0\0")),
}


# --- what the files show ---


def on_white(colors, opaque=OPAQUE):
    return np.where(opaque if colors.ndim == 2 else opaque[..., None], colors, 255)


def cmyk_to_rgb(values):
    inks = values / 255
    return 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])


def ycbcr_to_rgb(values):
    y, blue, red = np.moveaxis(values.astype(float), 2, 0)
    rgb = y + 1.402 * (red - 128), y - 0.344136 * (blue - 128) - 0.714136 * (red - 128), y + 1.772 * (blue - 128)
    return np.clip(np.stack(rgb, 2), 0, 255)


def cielab_to_srgb(values):
    """CIELAB by its definition, for the white point D50; sRGB adapted to D50."""
    a, b = (values[..., k].view(np.int8).astype(float) for k in (1, 2))
    y = (values[..., 0] * (100 / 255) + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], 2)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    to_linear = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    linear = np.clip(xyz @ np.transpose(to_linear), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _palette():
    image = Image.fromarray(GREY, "P")
    image.putpalette(_PALETTE.tobytes())
    return image


def _odd_avif() -> bytes:
    """An AVIF file that is to be seen turned, and whose EXIF data has a model of another type than text."""
    notes = exif(TURN, (0x0110, 2, 7, b"\x26\0\0\0"), more=b"camera\0\0")
    content = saved(SHOWN, "AVIF", exif=notes, quality=100, subsampling="4:4:4")
    at = content.index(b"\x10\1\2\0")  # the tag and its type
    return content[:at] + struct.pack("<HHI", 0x0110, 5, 1) + content[at + 8 :]


_PALETTE = generator.integers(0, 256, (256, 3), np.uint8)
_TRANSPARENT = np.where(np.isin(np.arange(256), GREY[0]), 0, 255).astype(np.uint8)
_CMYK = generator.integers(0, 256, (*SHAPE[:2], 4), np.uint8)
_LAB = np.stack([100 + GREY // 4, GREY % 16, 248 + GREY % 8], 2)  # a from 0 to 15, b from -8 to -1
_FRAMES = [Image.fromarray(np.full_like(RGB, value)) for value in (10, 200, 90)]


def _key(*values) -> tuple[bytes, bytes]:
    return b"tRNS", struct.pack(f">{len(values)}H", *map(int, values))


# name: the file; what it shows; by how much rounding may differ from that
DECODED = {
    "1-bit": (png(1, 0, packed(GREY >> 7, 1)), (GREY >> 7) * 255, 0),
    "2-bit": (png(2, 0, packed(GREY >> 6, 2)), (GREY >> 6) * 85, 0),
    "4-bit": (png(4, 0, packed(GREY >> 4, 4)), (GREY >> 4) * 17, 0),
    "12-bit-tiff": (tiff(DEEP, bits=12, content=packed(DEEP >> 4, 12).tobytes()), DEEP >> 8, 0),
    "16-bit-png": (png(16, 0, DEEP.astype(">u2")), DEEP >> 8, 0),
    "16-bit-tiff": (tiff(DEEP), DEEP >> 8, 0),
    "16-bit-tiff-compressed": (saved(DEEP, "TIFF", compression="tiff_lzw"), DEEP >> 8, 0),
    "16-bit-jpeg-2000": (saved(DEEP, "JPEG2000"), DEEP >> 8, 0),
    "16-bit-pgm": (b"P5 12 9 65535\n" + DEEP.astype(">u2").tobytes(), DEEP >> 8, 0),
    "12-bit-pgm": (b"P5 12 9 4095\n" + (DEEP >> 4).astype(">u2").tobytes(), DEEP >> 8, 0),
    "16-bit-rgb-png": (png(16, 2, DEEP_RGB.astype(">u2")), DEEP_RGB >> 8, 0),
    "16-bit-rgb-tiff": (tiff(DEEP_RGB, photometric=2), DEEP_RGB >> 8, 0),
    "16-bit-tiff-0-is-white": (tiff(DEEP, photometric=0), (65535 - DEEP) >> 8, 0),
    "8-bit-tiff-0-is-white": (tiff(GREY, photometric=0), 255 - GREY, 0),
    "1-bit-key": (png(1, 0, packed(GREY >> 7, 1), _key(0)), np.full_like(GREY, 255), 0),
    "2-bit-key": (png(2, 0, packed(GREY >> 6, 2), _key(1)), on_white((GREY >> 6) * 85, GREY >> 6 != 1), 0),
    "4-bit-key": (png(4, 0, packed(GREY >> 4, 4), _key(5)), on_white((GREY >> 4) * 17, GREY >> 4 != 5), 0),
    "8-bit-key": (png(8, 0, GREY, _key(GREY[1, 2])), on_white(GREY, GREY[1, 2] != GREY), 0),
    "16-bit-key": (png(16, 0, DEEP.astype(">u2"), _key(DEEP[1, 2])), on_white(DEEP >> 8, DEEP[1, 2] != DEEP), 0),
    "rgb-key": (png(8, 2, RGB, _key(*RGB[1, 2])), on_white(RGB, (RGB[1, 2] != RGB).any(2)), 0),
    "palette": (saved(_palette(), "PNG"), _PALETTE[GREY], 0),
    "palette-transparency": (
        saved(_palette(), "PNG", transparency=_TRANSPARENT.tobytes()),
        on_white(_PALETTE[GREY], _TRANSPARENT[GREY] > 0),
        0,
    ),
    "palette-gif-key": (
        saved(_palette(), "GIF", transparency=int(GREY[3, 4])),
        on_white(_PALETTE[GREY], GREY[3, 4] != GREY),
        0,
    ),
    "grey-alpha": (saved(np.dstack([GREY, ALPHA]), "PNG"), on_white(GREY), 0),
    "rgba": (saved(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), on_white(RGB), 0),
    "16-bit-grey-alpha": (png(16, 4, np.dstack([DEEP, OPAQUE * 65535]).astype(">u2")), on_white(DEEP >> 8), 0),
    "16-bit-rgba": (png(16, 6, np.dstack([DEEP_RGB, OPAQUE * 65535]).astype(">u2")), on_white(DEEP_RGB >> 8), 0),
    "premultiplied-tiff": (
        tiff(np.dstack([GREY * OPAQUE, ALPHA]), tags=[(338, 3, 1, struct.pack("<I", 1))]),
        on_white(GREY),
        0,
    ),
    "cmyk-tiff": (tiff(_CMYK, photometric=5), cmyk_to_rgb(_CMYK), 1),
    "cmyk-jpeg": (
        saved(Image.new("CMYK", SHAPE[1::-1], (30, 60, 90, 20)), "JPEG"),
        cmyk_to_rgb(np.full((9, 12, 4), (30, 60, 90, 20))),
        2,
    ),
    "ycbcr-tiff-compressed": (
        saved(Image.fromarray(RGB, "YCbCr"), "TIFF", compression="tiff_lzw", tiffinfo={530: (1, 1)}),
        ycbcr_to_rgb(RGB),
        1,
    ),
    "lab-tiff": (tiff(_LAB, photometric=8), cielab_to_srgb(_LAB), 3),
    "gamma-and-significant-bits": (png(8, 0, GREY, (b"gAMA", b"\0\0\1\0"), (b"sBIT", b"\3")), GREY, 0),
    "animated-gif": (saved(_FRAMES[0], "GIF", save_all=True, append_images=_FRAMES[1:]), np.full_like(RGB, 10), 0),
    "animated-png": (saved(_FRAMES[0], "PNG", save_all=True, append_images=_FRAMES[1:]), np.full_like(RGB, 10), 0),
    "animated-webp": (
        saved(_FRAMES[0], "WEBP", save_all=True, append_images=_FRAMES[1:], lossless=True),
        np.full_like(RGB, 10),
        0,
    ),
    "tiff-of-three-pages": (
        saved(_FRAMES[0], "TIFF", save_all=True, append_images=_FRAMES[1:]),
        np.full_like(RGB, 10),
        0,
    ),
    "turned-16-bit-png": (saved(DEEP.T[::-1].copy(), "PNG", exif=exif(TURN)), DEEP >> 8, 0),
    "turned-palette-png": (
        saved(_palette().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(TURN)),
        _PALETTE[GREY],
        0,
    ),
    "four-bands-no-alpha": (tiff(np.dstack([RGB, GREY]), photometric=2, content=None), RGB, 0),
    "turned-tiff": (saved(RGB.swapaxes(0, 1)[::-1].copy(), "TIFF", tiffinfo={274: 6}), RGB, 0),
    "xmp-of-numbers": (tiff(GREY, tags=[(700, 3, 2, b"\1\0\2\0")]), GREY, 0),
    "tiff-directory-nowhere": (tiff(GREY, tags=[(34665, 4, 1, b"\xff\xff\xff\x7f"), (34853, 2, 4, b"abcd")]), GREY, 0),
    "png-damaged-text": (png(8, 0, GREY, (b"tEXt", b"a\0b"), damaged=[b"tEXt"]), GREY, 0),
    "png-damaged-profile": (png(8, 0, GREY, (b"iCCP", b"x\0\7abc"), (b"pHYs", b"\1")), GREY, 0),
    "png-long-text": (png(8, 0, GREY, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))), GREY, 0),
    "png-long-profile": (png(8, 0, GREY, (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**21)))), GREY, 0),
    "jpeg-damaged-profile": (jpeg((0xE2, b"ICC_PROFILE\0\7\2abc"), (0xE2, b"ICC_PROFILE\0")), SHOWN, 0),
    "jpeg-damaged-index": (jpeg((0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + bytes(range(60)))), SHOWN, 0),
    "jpeg-damaged-photoshop": (jpeg((0xED, b"Photoshop 3.0\08BIM\3\xed\5")), SHOWN, 0),
    "jpeg-damaged-flashpix": (jpeg((0xE2, b"FPXR\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff")), SHOWN, 0),
    **({"exif-avif": (_odd_avif(), np.rot90(SHOWN, -1), 3)} if "AVIF" in Image.SAVE else {}),
    **{f"exif-{name}": (jpeg((0xE1, text)), np.rot90(SHOWN, -1), 0) for name, text in ODD_EXIF.items()},
    **{
        f"exif-only-{name}": (jpeg((0xE1, text), has_jfif=False), np.rot90(SHOWN, -1), 0)
        for name, text in ODD_EXIF.items()
    },
    **{f"exif-{name}": (jpeg((0xE1, text)), SHOWN, 0) for name, text in UPRIGHT_EXIF.items()},
}


def _header_only(width, height) -> bytes:
    return b"P5 %d %d 255\n" % (width, height)


_SIGNED = (DEEP - 1024).astype(np.int16)
# name: the file, and words of the reason
REFUSED = {
    "float-tiff": (tiff((GREY / 255).astype(np.float32), sample_format=3), "floats"),
    "float-tiff-to-255": (tiff(GREY.astype(np.float32), sample_format=3), "floats"),
    "portable-float-map": (b"Pf\n12 9\n-1.0\n" + (GREY / 255).astype("<f4").tobytes(), "floats"),
    "signed-32-bit-tiff": (tiff(_SIGNED.astype(np.int32), sample_format=2), "sign"),
    "signed-16-bit-tiff": (tiff(_SIGNED, sample_format=2), "sign"),
    "signed-8-bit-tiff": (tiff(GREY.view(np.int8), sample_format=2), "sign"),
    "unsigned-32-bit-tiff": (tiff(DEEP.astype(np.uint32)), "32 bits"),
    "32-bit-tiff-to-255": (tiff(GREY.astype(np.int32), sample_format=2), "32 bits"),
    "float-rgb-tiff": (tiff(RGB.astype(np.float32), photometric=2, sample_format=3), "another type"),
    "16-bit-planes": (tiff(np.moveaxis(DEEP_RGB, 2, 0).reshape(SHAPE), 2, planar=2), "separate planes"),
    "lab-planes": (tiff(np.moveaxis(_LAB, 2, 0).reshape(SHAPE), 8, planar=2), "separate planes"),
    "16-bit-color-key": (png(16, 2, DEEP_RGB.astype(">u2"), _key(*DEEP_RGB[1, 2])), "16-bit colors"),
    "postscript": (saved(RGB, "EPS"), "drawing"),
    "fits": (
        b"SIMPLE  =                    T".ljust(80)
        + b"".join(
            line.ljust(80)
            for line in (
                b"BITPIX  =                   16",
                b"NAXIS   =                    2",
                b"NAXIS1  =                   12",
                b"NAXIS2  =                    9",
                b"END",
            )
        ).ljust(2800)
        + DEEP.astype(">i2").tobytes().ljust(2880, b"\0"),
        "FITS",
    ),
    "more-pixels-than-the-limit": (_header_only(20000, 10000), "178,956,970 pixels"),
    "absurd-size": (_header_only(2**31 - 1, 2**31 - 1), "178,956,970 pixels"),
    "zero-bytes": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html>404</html>", "HTML"),
    "gzip": (b"\x1f\x8b\x08\0" + JPEG, "gzip"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "pdf": (saved(RGB, "PDF"), "PDF"),
    "text": (b"cat, dog\n", "not an image"),
    "heic": (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "HEIC photo; convert it"),
    "video-of-a-live-photo": (b"\0\0\0\x14ftypqt  \0\0\2\0", "a video"),
    "dicom": (b"\0" * 128 + b"DICM\2\0\0\0UL", "DICOM"),
    "json": (b'{"error": 404}', "JSON"),
    "preview-in-a-raw-photo": (tiff(RGB, photometric=2, tags=[(254, 4, 1, struct.pack("<I", 1))]), "preview"),
    "8-bits-in-16": (saved((DEEP >> 8), "PNG"), "16 bits, but are at most"),
    **{
        f"truncated-{kind}": (saved(RGB.repeat(5, 0), kind)[:-40], "")
        for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "ICO", "TGA", "PPM", "AVIF")
        if kind in Image.SAVE
    },
}


def valid_files() -> list[bytes]:
    """Returns files of every format that Pillow writes, for each mode that it writes."""
    options = {
        "TIFF": ({}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "packbits"}),
        "JPEG": ({}, {"progressive": True}, {"exif": ODD_EXIF["model-of-numbers"]}),
        "PNG": ({}, {"save_all": True, "append_images": _FRAMES}, {"exif": ODD_EXIF["unknown-type"]}),
        "TGA": ({}, {"compression": "tga_rle"}),
        **{kind: ({}, {"save_all": True, "append_images": _FRAMES}) for kind in ("GIF", "WEBP", "MPO")},
    }
    files = []
    for kind in sorted(Image.SAVE.keys() - {"PDF"}):
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"):
            for more in options.get(kind, ({},)):
                try:
                    image = Image.fromarray(DEEP) if mode == "I;16" else Image.fromarray(RGB).convert(mode)
                    files.append(saved(image, kind, **more))
                except (OSError, ValueError, KeyError, TypeError, AttributeError):
                    continue  # this format does not have this mode
    return files


def mutated(random, files) -> bytes:
    """Returns one of the files with flipped bits, with bytes overwritten, cut out or cut off, or with another in it."""
    content = bytearray(random.choice(files))
    start, stop = random.randrange(len(content)), random.randrange(len(content))
    kind = random.randrange(7)
    if kind == 0:
        for _ in range(random.choice([1, 2, 8, 32])):
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    elif kind == 1:  # absurd sizes
        header = random.randrange(min(len(content), 64))
        content[header : header + 4] = bytes([random.choice([0, 1, 0x7F, 0x80, 0xFF])]) * random.choice([2, 4, 8])
    elif kind == 2:
        for _ in range(random.choice([1, 4, 16])):
            content[random.randrange(min(len(content), 200))] = random.randrange(256)
    elif kind == 3:
        content[start : start + 16] = bytes([random.choice([0, 255])]) * random.choice([2, 4, 16])
    elif kind == 4:
        content = content[:start] + content[stop:]
    elif kind == 5:
        content = content[:start] + random.choice(files)[stop:]
    else:
        content = content[:start]
    return bytes(content)
