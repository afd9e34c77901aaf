"""What became of every array of a file, and where every array of the model came from."""

import collections
import dataclasses

from vit_jax.models.vit import VisionTransformer
from vit_jax.weights.describe import Decision

# In the order of the table: what needs a look comes last, and is shown even where the table is short.
ACTIONS = ("taken", "transposed", "reshaped", "fused", "split", "resampled", "adapted", "initialised", "ignored")
PLAIN = ("taken", "transposed", "reshaped", "fused", "split")
SHOWN = 4  # rows of one kind and reason, where the table is short


@dataclasses.dataclass(frozen=True)
class Row:
    """One rule's arrays.

    Attributes:
        action: one of `ACTIONS`.
        names: the file's arrays; none where ours were initialised.
        paths: our parameters ('encoder/block_0/mlp/up/kernel'); none where the file's were ignored.
        detail: from what to what, or why.
    """

    action: str
    names: tuple[str, ...]
    paths: tuple[str, ...]
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What loading did. Every array of the file and every array of the model is in exactly one row.

    Attributes:
        source: the file.
        label: whose naming it has.
        model: the model loaded.
        image_size: height and width of the images that its table of positions is for; None where any will do.
        channels: of its images.
        normalization: of the images it was trained on, as `config.data.normalization` names it.
        rows: one for each rule, and for what was ignored or initialised.
        decisions: fields of the model that the arrays do not tell, and who told them.
        notes: what else a user should know.
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

    def counts(self) -> dict[str, int]:
        """Rows of each action there is, in the order of the table."""
        found = collections.Counter(row.action for row in self.rows)
        return {action: found[action] for action in ACTIONS if found[action]}

    def table(self, verbose: bool = False) -> str:
        """The report as text: what was changed, left out or made up; with `verbose`, every array."""
        arrays = sum(len(row.names) for row in self.rows)
        lines = [f"{self.source}: {self.label}, {arrays} arrays", f"model: {self._model()}"]
        lines += [f"  {one.field} {one.value!r}: {one.source}" for one in self.decisions]
        parameters = sum(len(row.paths) for row in self.rows)
        lines += [f"{parameters} parameters; rows " + ", ".join(f"{n} {action}" for action, n in self.counts().items())]
        lines += self._rows([row for row in self.rows if verbose or row.action not in PLAIN], verbose)
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def __str__(self) -> str:
        return self.table()

    def _model(self) -> str:
        model, size = self.model, self.image_size
        images = "images of any size" if size is None else f"images {size[0]}x{size[1]}"
        head = "no head" if model.classes is None else f"{model.classes} classes"
        stem = "" if model.stem is None else f"stem {model.stem}, "
        return (
            f"{stem}patch {model.patch_size}, width {model.width}, {model.depth} blocks, {model.heads} heads, MLP "
            f"{model.mlp_width}, pooling {model.pooling}, {head}; {images}, {self.channels} channels"
        )

    def _rows(self, rows: list[Row], verbose: bool) -> list[str]:
        alike: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(rows, key=lambda row: ACTIONS.index(row.action)):
            alike.setdefault((row.action, row.detail), []).append(row)
        lines = []
        for (action, detail), same in alike.items():
            shown = same if verbose else same[:SHOWN]
            for row in shown:
                more = f" and {len(same) - SHOWN} more" if row is shown[-1] and len(same) > len(shown) else ""
                lines.append(f"  {action:<11}  {_names(row)}{more}{f'  ({detail})' if detail else ''}")
        return lines


def _names(row: Row) -> str:
    short = lambda names: ", ".join(names if len(names) < 4 else [*names[:2], f"... {names[-1]}"])  # noqa: E731
    return " -> ".join(short(names) for names in (row.names, row.paths) if names)
