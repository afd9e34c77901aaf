"""Writes the table of families in docs/weights.md from vit_jax/weights/registry.py: python docs/families.py."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vit_jax.weights.registry import FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "weights.md"
HEADER = "| models | names of | for example | checked against | licence of the weights | |\n|---|---|---|---|---|---|\n"
# The table, and what is around it.
AROUND = re.compile(r"(<!-- families: python docs/families.py -->\n\n).*?(\n<!-- end of families -->\n)", re.DOTALL)


def table() -> str:
    """A row per family."""
    rows = []
    for one in FAMILIES:
        examples = ", ".join(f"`{name}`" if " " not in name else name for name in one.examples)
        cells = (one.models, one.naming, examples, one.checked_against, one.licence, one.notes)
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |") + "\n")
    return HEADER + "".join(rows)


def markdown(page: str) -> str:
    """The text of the page with the table as it is now."""
    return AROUND.sub(lambda match: match[1] + table() + match[2], page)


if __name__ == "__main__":
    PAGE.write_text(markdown(PAGE.read_text()))
