"""A report of what was done with every array of a file, and where every parameter of the model comes from."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_jax.data.normalization import Statistics
from vit_jax.errors import few
from vit_jax.models.stacking import stacked_path
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights.describe import Decision

# In the order of the table. Those in PLAIN leave the values unchanged; rows with others are always shown.
ACTIONS = ("loaded", "transposed", "reshaped", "fused", "split", "resampled", "adapted", "initialized", "ignored")
PLAIN = ("loaded", "transposed", "reshaped", "fused", "split")
SHOWN = 4  # rows with the same action and detail, unless verbose


@dataclasses.dataclass(frozen=True)
class Row:
    """What was done with the arrays of one rule.

    Attributes:
        action: one of `ACTIONS`.
        names: names of the file's arrays; none if the parameters were initialized.
        paths: paths of our parameters ('encoder/block_0/mlp/up/kernel'); none if the arrays were ignored.
        detail: the change, or the reason.
    """

    action: str
    names: tuple[str, ...]
    paths: tuple[str, ...]
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of loading a file. Every array of the file and every parameter is in exactly one row.

    Attributes:
        source: the file.
        label: its naming convention.
        model: the loaded model.
        image_size: height and width of the images that its position embedding is for; None for any size.
        channels: number of channels of its images.
        normalization: of the images it was trained on, a value of `config.data.normalization`.
        rows: one per rule, and one per array that was ignored or initialized.
        decisions: options of the model that the arrays do not determine, and where their values come from.
        notes: what else a user should know.
        statistics: mean and std of each channel of these images; None if unknown, for a run without its dataset.
        assumed: a line on what mean and std were assumed and why, if they are not recorded; else ''.
        class_names: of its only head, if they are known.
        evaluation: other recorded options of evaluation (`preprocessing.EVALUATION`), such as 'crop_pct' and 'loss'.
        resampling: how position embeddings are resampled for other images, one of `resampling.METHODS`.
    """

    source: str
    label: str
    model: VisionTransformer
    image_size: tuple[int, int] | None
    channels: int
    normalization: str
    rows: tuple[Row, ...]
    decisions: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = ()
    statistics: Statistics | None = None
    assumed: str = ""
    class_names: tuple[str, ...] | None = None
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resampling: str = "bilinear"

    def counts(self) -> dict[str, int]:
        """The number of rows per action, in the order of the table."""
        found = collections.Counter(row.action for row in self.rows)
        return {action: found[action] for action in ACTIONS if found[action]}

    def table(self, verbose: bool = False) -> str:
        """The report as text: arrays that were changed, ignored or initialized; with `verbose`, all arrays."""
        lines = [f"{self.source}: {self.label}, {self._arrays()} arrays", f"model: {self._model()}"]
        lines += [f"  {one.field} {one.value!r}: {one.source}" for one in self.decisions]
        parameters = sum(len(row.paths) for row in self.rows)
        lines += [f"{parameters} parameters; rows {self._counts()}"]
        lines += self._rows([row for row in self.rows if verbose or row.action not in PLAIN], verbose)
        return "\n".join(lines + [f"note: {note}" for note in self._all_notes()])

    def changes(self, source: str) -> str:
        """The report without what describes the model, for one that is known; `source` is what the user wrote."""
        lines = [f"initial parameters: {source}, {self.label}, {self._arrays()} arrays: {self._counts()}"]
        lines += self._rows([row for row in self.rows if row.action not in PLAIN], verbose=False)
        return "\n".join(lines + [f"note: {note}" for note in self._all_notes()])

    def _all_notes(self) -> tuple[str, ...]:
        return (*self.notes, self.assumed) if self.assumed else self.notes

    def _arrays(self) -> int:
        return sum(len(row.names) for row in self.rows)

    def _counts(self) -> str:
        return ", ".join(f"{number} {action}" for action, number in self.counts().items())

    def __str__(self) -> str:
        return self.table()

    def _model(self) -> str:
        model, size = self.model, self.image_size
        images = "images of any size" if size is None else f"images {size[0]}x{size[1]}"
        head = "no head" if model.classes is None else f"{model.classes} classes"
        channels = "1 channel" if self.channels == 1 else f"{self.channels} channels"
        stem = "" if model.stem is None else f"stem {model.stem}, "
        return (
            f"{stem}patch {model.patch_size}, width {model.width}, {model.depth} blocks, {model.heads} heads, MLP "
            f"{model.mlp_width}, pooling {model.pooling}, {head}; {images}, {channels}"
        )

    def _rows(self, rows: list[Row], verbose: bool) -> list[str]:
        alike: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(rows, key=lambda row: ACTIONS.index(row.action)):
            alike.setdefault((row.action, row.detail), []).append(row)
        lines = []
        for (action, detail), same in alike.items():
            if action == "ignored" and len(same) > 1 and not verbose:
                lines.append(f"  {action:<11}  {len(same)} arrays: {few(map(_names, same))}  ({detail})")
                continue
            shown = same if verbose else same[:SHOWN]
            for row in shown:
                more = f" and {len(same) - SHOWN} more" if row is shown[-1] and len(same) > len(shown) else ""
                lines.append(f"  {action:<11}  {_names(row)}{more}{f'  ({detail})' if detail else ''}")
        return lines


def _names(row: Row) -> str:
    def short(names: tuple[str, ...]) -> str:
        return ", ".join(names if len(names) < 4 else [*names[:2], f"... {names[-1]}"])

    return " -> ".join(short(names) for names in (row.names, row.paths) if names)


def stack_rows(rows: list[Row]) -> list[Row]:
    """The rows for a model whose blocks are stacked: one row per stacked parameter."""
    merged: dict[tuple[str, ...], Row] = {}
    for row in rows:
        paths = tuple(dict.fromkeys(map(stacked_path, row.paths)))
        before = merged.get(paths)
        if not paths or before is None:
            merged[paths or row.names] = dataclasses.replace(row, paths=paths)
            continue
        action = row.action if before.action in PLAIN else before.action
        details = "; ".join(dict.fromkeys(filter(None, [before.detail, row.detail])))
        merged[paths] = Row(action, before.names + row.names, paths, details)
    return list(merged.values())
