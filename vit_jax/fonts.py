"""Fonts for pictures: the one of Pillow, or one of the machine's that has the characters of a text."""

import functools
import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

# Where systems keep their fonts; searched only for characters that Pillow's own font lacks.
DIRECTORIES = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)
MAX_FONTS = 200  # that are tried
# Parts of the names of fonts with many scripts: they are tried first.
_WIDE = (
    *("dejavusans", "notosans", "cjk", "unicode", "unifont", "wqy", "freesans", "fallback", "arial"),
    *("pingfang", "hiragino", "segoe", "msyh", "malgun", "nirmala"),
)
_STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "mono", "serif", "math")
_NO_CHARACTER = "\U0010fffe"  # no font has a glyph for it: it is drawn as a box, like every missing character


@functools.cache
def fit(text: str, size: int) -> tuple["FreeTypeFont", str]:
    """Returns a font, and the text as this font can draw it.

    Characters that no font of the machine has are written without accents, or as escapes: never as boxes.

    Args:
        text: one line.
        size: of the font, pixels.
    """
    from PIL import ImageFont

    text = unicodedata.normalize("NFC", text)
    default = ImageFont.load_default(size)
    missing = _missing(default, text)
    if not missing:
        return default, text
    best = default
    for path in _files(DIRECTORIES):
        font = _open(path, size)
        lacks = missing if font is None else _missing(font, text)
        if len(lacks) < len(missing):
            best, missing = font, lacks
        if not missing:
            break
    return best, "".join(_spelled(best, character) if character in missing else character for character in text)


def _missing(font: "FreeTypeFont", text: str) -> set[str]:
    from PIL import ImageFont

    font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)  # the other one draws a lone accent on a circle
    box = _glyph(font, _NO_CHARACTER)
    return {character for character in text if not character.isspace() and _glyph(font, character) == box}


def _glyph(font: "FreeTypeFont", character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def _spelled(font: "FreeTypeFont", character: str) -> str:
    plain = "".join(part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part))
    return plain if plain and not _missing(font, plain) else character.encode("ascii", "backslashreplace").decode()


@functools.cache
def _files(directories: tuple[str, ...]) -> tuple[Path, ...]:
    """Returns the font files of the machine, those with many scripts and plain styles first."""
    found = []
    for directory in directories:
        for folder, _, names in os.walk(os.path.expanduser(directory)):
            found += [Path(folder, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]

    def order(path: Path) -> tuple[bool, int, str]:
        name = path.stem.lower()
        return not any(part in name for part in _WIDE), sum(style in name for style in _STYLES), name

    return tuple(sorted(found, key=order)[:MAX_FONTS])


def _open(path: Path, size: int) -> "FreeTypeFont | None":
    """Returns a font; None if it cannot be used at this size."""
    from PIL import ImageFont

    try:
        font = ImageFont.truetype(path, size)
        _glyph(font, _NO_CHARACTER)
    except (OSError, ValueError):
        return None
    return font
