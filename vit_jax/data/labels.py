"""Labels and class names as users have them: integers from 0, and text files with one name per line."""

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError, few, one_line

# Without class names, the number of classes is the largest label + 1. Labels that need more classes than this, and ten
# times as many as there are different labels, are ids.
MAX_SPARSE_CLASSES = 1000
_RENUMBER = "renumber them: classes, labels = np.unique(labels, return_inverse=True)"
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_names(path: Path, option: str = "") -> tuple[str, ...]:
    """Returns the class names in a text file: UTF-8 with or without a byte order mark, one name per line.

    Lines end as on any system. Blank lines at the end are dropped; names may repeat, as ImageNet's do.

    Args:
        path: of the file.
        option: the option that names the file, such as '--classes', for error messages.

    Raises:
        UserError: the file cannot be read, is in another encoding, or has a blank line before a name.
    """
    shown = f"{option}={path}" if option else str(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{shown} cannot be read: {error.strerror}\n  correct the path, or check its permissions"
        ) from error
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content:
        encoding = "UTF-16 or no text"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        encoding = encoding or f"another encoding, such as Latin-1: line {number} has byte 0x{content[error.start]:02x}"
    if encoding is not None:
        named = next((name for name in ("UTF-16", "UTF-32") if name in encoding), None)
        others = "" if named else " (LATIN1 may be GBK, SHIFT_JIS, CP1251 or another)"
        raise UserError(
            f"{shown} is not UTF-8, but {encoding}\n"
            f"  convert it{others}: iconv -f {named or 'LATIN1'} -t UTF-8 {path.name} > utf8.txt"
        )
    if text.lstrip().startswith(("{", "[")) and _is_json(text):
        raise UserError(f"{shown} is JSON\n  expected: plain text with one class name per line, that of label 0 first")
    names = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while names and not names[-1].strip():
        names.pop()
    blank = [number for number, name in enumerate(names, 1) if not name.strip()]
    if blank:
        raise UserError(f"{shown}: line {blank[0]} is blank, and names follow\n  expected: one class name per line")
    return tuple(names)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def check_type(labels: np.ndarray, count: int, where: str) -> None:
    """Checks that labels are integers of at least 0, one per example.

    Args:
        labels: as stored.
        count: number of examples.
        where: the file, for error messages.

    Raises:
        UserError: they are not; says how to convert them.
    """
    expected = f"expected: non-negative integers of shape ({count},)"
    if labels.shape != (count,):
        way_out = ""
        if labels.shape == (count, 1):
            way_out = "; for example labels[:, 0]"
        elif labels.ndim == 2 and len(labels) == count:
            way_out = "; of one-hot labels: labels.argmax(axis=1)"
        raise UserError(f"{where}: labels have dtype {labels.dtype} and shape {labels.shape}\n  {expected}{way_out}")
    if labels.dtype.kind in "bf":
        raise UserError(f"{where}: labels have dtype {labels.dtype}\n  {expected}: labels.astype(np.int64)")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{where}: labels have dtype {labels.dtype}\n  {expected}; {_RENUMBER}")
    if labels.min() < 0:
        raise UserError(
            f"{where}: {(labels < 0).sum():,} of {count:,} labels are negative, the smallest is {labels.min()}\n"
            f"  {expected}; remove examples without a label, or {_RENUMBER}"
        )


def count_classes(labels: Iterable[np.ndarray], where: str) -> int:
    """Returns the number of classes of labels without class names: the largest label + 1.

    Args:
        labels: of each split, of `check_type`.
        where: the directory, for error messages.

    Raises:
        UserError: the labels are ids: there are far more classes than different labels.
    """
    different = np.unique(np.concatenate([np.unique(part).astype(np.uint64) for part in labels]))
    count, largest = len(different), int(different[-1])
    if largest >= max(MAX_SPARSE_CLASSES, 10 * count):
        shown = few([str(label) for label in different])
        raise UserError(
            f"{where}: the largest label is {largest}, but there are only {count:,} different labels: {shown}\n"
            f"  labels are classes from 0, not ids; {_RENUMBER}\n"
            "  or name every class in classes.txt, one per line"
        )
    return largest + 1


def check_range(labels: np.ndarray, names: Sequence[str], where: str) -> None:
    """Checks that every label is the index of a class name.

    Raises:
        UserError: one is not.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        raise UserError(
            f"{where}: {len(wrong):,} of {len(labels):,} labels are no class; example {wrong[0]:,} has "
            f"{labels[wrong[0]]}\n  allowed: 0 to {len(names) - 1}"
        )


def without_examples(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Returns the names of the classes without examples."""
    counts = np.bincount(labels.astype(np.int64), minlength=len(names))
    return [name for name, count in zip(names, counts, strict=True) if not count]


def reason_of(error: BaseException) -> str:
    """Returns why NumPy could not read an array, in one line, with what to do about Python objects in it."""
    if "allow_pickle" in str(error):
        return "it holds Python objects, which are never unpickled; convert it: np.array(values.tolist())"
    return one_line(error)
