"""Draws docs/layers.svg from the imports of vit_jax: python docs/layers.py.

Boxes are packages, with their number of files, in the layers that tests/helpers_imports.py lists; a box may import from
its own layer and from those below it. Arrows point at what is imported, with the number of imports between modules.
Arrows that follow from others are left out (an arrow from training to objectives and one from objectives to models
imply one from training to models); the tooltip of a box lists all that it imports. Imports of a higher layer are red.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers_imports import LAYERS, module_imports, unit, unit_imports  # noqa: E402

WIDTH, ROW, BOX = 900, 84, (140, 40)
RANK = {name: (level, column) for level, layer in enumerate(LAYERS) for column, name in enumerate(layer)}
HEAD = """<style> text { font-family: DejaVu Sans, Arial, sans-serif; font-size: 14px; text-anchor: middle }
.count { font-size: 12px; stroke: white; stroke-width: 5px; paint-order: stroke } .band { fill: #f3f5f7 }
.box { fill: white; stroke: #456 } .line { stroke: #345; marker-end: url(#end) } .up { stroke: #d22 }
</style>
<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#345"/></marker></defs>"""


def centers() -> dict[str, tuple[float, float]]:
    """The middle of every box; the top layer is the first row. Rows are offset so that arrows pass between boxes."""
    found = {}
    for row, layer in enumerate(reversed(LAYERS)):
        offset = (0, 190, 0, 60, -60, 60, 0, -150, 150, 0)[row % 10]
        for column, name in enumerate(layer):
            found[name] = (WIDTH / 2 + offset + 290 * (column - (len(layer) - 1) / 2), ROW * (row + 0.5))
    return found


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that `start` imports through others."""
    direct = graph.get(start, set())
    return set().union(*(graph.get(name, set()) | reachable(graph, name) for name in direct))


def draw() -> str:
    """The text of the SVG file."""
    imports = module_imports()
    counts, center = unit_imports(imports), centers()
    # Without upward arrows there is no cycle.
    graph = {name: {b for a, b in counts if a == name and RANK[a] > RANK[b]} for name in center}
    arrows, labels, boxes = [], [], []
    for source, target in sorted(counts):
        up = RANK[source][0] < RANK[target][0]
        if not up and target in reachable(graph, source):
            continue
        (x, y), (to_x, to_y) = center[source], center[target]
        direction = (to_y > y) - (to_y < y)
        wide = BOX[0] / 2 if y == to_y else 60
        shift = max(-wide, min(wide, to_x - x if y == to_y else (to_x - x) * 0.25))
        ends = (x + shift, y + direction * BOX[1] / 2, to_x - shift, to_y - direction * BOX[1] / 2)
        line = 'x1="{:.0f}" y1="{:.0f}" x2="{:.0f}" y2="{:.0f}"'.format(*ends)
        arrows.append(f'<line class="line{" up" * up}" {line}/>')
        near = 0.5 if y == to_y else 15 / abs(ends[3] - ends[1])  # in the gap below its own row, where no box is
        middle = f'x="{ends[0] + near * (ends[2] - ends[0]):.0f}" y="{ends[1] + near * (ends[3] - ends[1]) + 4:.0f}"'
        labels.append(f'<text class="count" {middle}>{counts[source, target]}</text>')
    for name, (x, y) in center.items():
        files = sum(unit(module) == name for module in imports)
        all_of_it = ", ".join(f"{b} {count}" for (a, b), count in sorted(counts.items()) if a == name) or "nothing"
        corner = f'x="{x - BOX[0] / 2:.0f}" y="{y - BOX[1] / 2:.0f}"'
        boxes.append(f'<g><title>{name} imports {all_of_it}</title><rect class="box" rx="5" {corner}')
        boxes.append(f' width="{BOX[0]}" height="{BOX[1]}"/><text x="{x:.0f}" y="{y + 5:.0f}">{name} ({files})</text>')
        boxes.append("</g>")
    rows = range(len(LAYERS))
    bands = [f'<rect class="band" y="{ROW * row + 10}" width="{WIDTH}" height="{ROW - 20}"/>' for row in rows]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {ROW * len(LAYERS)}">'
    return "\n".join([svg, HEAD, *bands, *arrows, *boxes, *labels, "</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs" / "layers.svg").write_text(draw())
