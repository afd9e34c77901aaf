"""What a config takes from a folder of images: the split that it is tested on, where the folder has none."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import paths, terminal
from vit_jax.checkpoint import run_files
from vit_jax.data import folder, held_out, listing, splits
from vit_jax.training import run_directory

TEST = "test"


def complete_config(config: ConfigDict, workdir: Path | None = None) -> None:
    """Sets `data.held_out`, or `data.test`, where the config needs a split `test` that the folder does not have.

    Args:
        config: not checked yet.
        workdir: run directory. If a run has begun in it, these options are as in its config.json.

    Raises:
        UserError: the folder cannot be read, or has splits without train.
    """
    data = config.data
    expressions = [data[role] for role in ("train", "validation", TEST) if data[role]]
    if data.name != "folder" or data.held_out is not None or data.features or not _names_test(expressions):
        return
    if (begun := _begun(workdir)) is not None:
        data.held_out = begun["held_out"]
        data.test = begun["test"] if begun["held_out"] is None and data.test == TEST else data.test
    elif (other := _stored_validation(data.dir)) is None:
        data.held_out = fraction(data.name, data.dir, expressions)
    elif data.test == TEST and data.validation is None:
        data.test = other
        terminal.warn(f"{listing.printable(data.dir)} has no folder {TEST}: its folder {other} is the test split")


def fraction(name: str, data_dir: str | None, expressions: Iterable[str]) -> float | None:
    """Returns the `held_out` for split expressions that name `test`, if the folder stores train alone; else None."""
    stored = _stored(data_dir) if name == "folder" and _names_test(expressions) else ()
    return held_out.FRACTION if stored == ("train",) else None


def _names_test(expressions: Iterable[str]) -> bool:
    return any(TEST in splits.names(expression) for expression in expressions)


def _stored_validation(data_dir: str | None) -> str | None:
    """Returns the stored validation split of a folder without a test split."""
    stored = _stored(data_dir)
    return None if TEST in stored else next((name for name in stored if name != "train"), None)


def _stored(data_dir: str | None) -> tuple[str, ...]:
    """Returns the stored splits; () where there is no such folder, which is reported when the data is checked."""
    root = None if data_dir is None else paths.expand(data_dir, "config.data.dir")
    return () if root is None or not root.is_dir() else folder.stored_splits(root)


def _begun(workdir: Path | None) -> Mapping[str, Any] | None:
    """The section `data` of the config of the run that has begun in a directory; None if there is none on a folder."""
    if workdir is None or not run_directory.has_begun(workdir):
        return None
    config = run_files.read_config(workdir)
    begun = None if config is None else options.complete(config)["data"]
    return begun if begun is not None and begun["name"] == "folder" else None
