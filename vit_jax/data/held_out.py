"""The split `test` of a folder that has none: a part of each class, chosen by a hash of the file names."""

import collections

from vit_jax.data import listing
from vit_jax.errors import UserError, few

FRACTION = 0.2  # where data.held_out is not set

Files = list[tuple[str, int]]  # paths with class indices, sorted by a hash of the paths


def divide(files: Files, fraction: float) -> tuple[Files, Files]:
    """Returns the files that stay in `train`, and those that are held out, each in the order of `files`.

    Of a class of n files, the first round(fraction * n) are held out: at least one and at most n - 1, none of a class
    of one. Which these are depends on the names of the files of that class alone; a further file moves at most one of
    the others.
    """
    counts = collections.Counter(label for _, label in files)
    remaining = {label: min(count - 1, max(1, round(fraction * count))) for label, count in counts.items()}
    kept, held_out = [], []
    for name, label in files:
        (held_out if remaining[label] > 0 else kept).append((name, label))
        remaining[label] -= 1
    return kept, held_out


def make_splits(root: str, files: Files, class_names: tuple[str, ...], fraction: float) -> tuple[dict[str, Files], str]:
    """Returns the files of `train` and `test`, and a line on how they were divided.

    Args:
        root: the directory, for error messages.
        files: all of them, as of `divide`.
        class_names: by class index.
        fraction: of each class that is held out.

    Raises:
        UserError: no class has two files.
    """
    kept, held_out = divide(files, fraction)
    if not held_out:
        raise UserError(
            f"dataset 'folder': no class of {root} has two images, so none can be held out for testing\n"
            "  add images to its class folders: at least two per class; about 50 are a start"
        )
    total, tested = (collections.Counter(label for _, label in part) for part in (files, held_out))
    shown = [f"{listing.printable(name)} {tested[label]} of {total[label]}" for label, name in enumerate(class_names)]
    single = [listing.printable(name) for label, name in enumerate(class_names) if total[label] == 1]
    note = (
        f"{100 * fraction:g} % of each class, held out of train by a hash of the file names because there is no folder "
        f"test: {few(shown, 10)}"
    )
    if single:
        note += f"; a single image stays in train: {few(single)}"
    return {"train": kept, "test": held_out}, note
