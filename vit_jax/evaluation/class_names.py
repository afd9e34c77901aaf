"""Which of a model's classes each class of a dataset is, by their names."""

import collections
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from vit_jax.errors import UserError, few


def are_names(names: Sequence[str]) -> bool:
    """Returns whether class names are names: not '0', '1', ..., nor ids of WordNet, such as 'n01440764'."""
    return not _are_numbers(names) and not _are_ids(names)


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(index) for index in range(len(names))]


def _are_ids(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def match(
    ours: Sequence[str], theirs: Sequence[str], model: str, data: str
) -> tuple[Int32[np.ndarray, " data_classes"], str]:
    """Returns the index of the model's class for each class of the data, and a line that says how they were matched.

    Upper and lower case, spaces and underscores make no difference. A name with commas, such as 'tench, Tinca tinca',
    also stands for each of its parts, unless another class has the same. Ids of WordNet are matched with ids. Where one
    of the two has numbers or ids instead of names, their classes must be equally many, and their order is assumed to be
    the same.

    Args:
        ours: class names of the model.
        theirs: class names of the data.
        model: the name of the model, for messages.
        data: the name of the data.

    Raises:
        UserError: a class of the data is none of the model's, two are the same, or the numbers of classes differ.
    """
    same = np.arange(len(theirs), dtype=np.int32)
    if [*map(_form, ours)] == [*map(_form, theirs)]:
        return same, f"all {len(ours):,} classes of {model} and of {data} have the same names in the same order"
    index_of = _index(ours)
    found = [index_of.get(_form(name), -1) for name in theirs]
    named = are_names(ours), are_names(theirs)
    if not all(named) and (-1 in found or (not any(named) and not _are_ids(ours))):
        without = data if named[0] else model
        if len(ours) != len(theirs):
            way_out = "name those of the model with --classes=TXT"
            if named[0]:
                way_out = "name its classes as the model does"
            raise UserError(
                f"{model} has {len(ours):,} classes, {data} has {len(theirs):,}, and {without} has no class names to "
                f"match them by\n  use data with the same classes, or {way_out}"
            )
        return same, f"{without} has no class names: the {len(ours):,} classes are assumed to be in the same order"
    if unknown := [name for name, index in zip(theirs, found, strict=True) if index < 0]:
        raise UserError(
            f"{len(unknown):,} of the {len(theirs):,} classes of {data} are none of the {len(ours):,} of {model}, or "
            f"not one alone: {few(unknown)}\n  its classes are {few(ours, 6)}\n"
            "  name the classes of the data as the model does, or those of the model with --classes=TXT"
        )
    if twice := [index for index, count in collections.Counter(found).items() if count > 1]:
        names = [name for name, index in zip(theirs, found, strict=True) if index == twice[0]]
        raise UserError(
            f"{few(names)} of {data} are the same class of {model}: {ours[twice[0]]}\n  merge these classes of the data"
        )
    among = f", of which {data} has {len(theirs):,}" if len(theirs) < len(ours) else ""
    return np.array(found, np.int32), (
        f"classes are matched by name; accuracy is among all {len(ours):,} classes of {model}{among}"
    )


def _index(names: Sequence[str]) -> dict[str, int]:
    """The index of the class that a name stands for; names of several classes are left out."""
    whole, parts = collections.defaultdict(list), collections.defaultdict(list)
    for index, name in enumerate(names):
        whole[_form(name)].append(index)
        for part in {_form(part) for part in name.split(",")}:
            parts[part].append(index)
    unique = {form: indices[0] for form, indices in parts.items() if len(indices) == 1}
    for form, indices in whole.items():  # a whole name has precedence over a part of another one
        if len(indices) == 1:
            unique[form] = indices[0]
        else:
            unique.pop(form, None)
    return unique


def _form(name: str) -> str:
    """A name as it is compared."""
    return re.sub(r"[\s_]+", "", unicodedata.normalize("NFC", name).casefold())
