"""Draws the learning curves of runs from their metrics.jsonl.

python docs/learning_curve.py runs/digits docs/digits.png
python docs/learning_curve.py runs/chain/scratch runs/chain/finetune docs/chain.png

Of one run: training, validation and test. Of several: the test alone, a colour a run. A run of several seeds is drawn
by the mean of its seeds, with a band from the least to the most.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

SPLITS = ("train", "validation", "test")


def read(workdir: Path) -> list[list[dict]]:
    """The records of a run, or of each of its seeds."""
    seeds = sorted(workdir.glob("seed-*")) or [workdir]
    return [[json.loads(line) for line in (seed / "metrics.jsonl").read_text().splitlines()] for seed in seeds]


def curve(records: list[list[dict]], name: str) -> Iterator[tuple[int, float, float, float]]:
    """Step, mean, least and most over the seeds, for each step that all of them have."""
    tables = [{line["step"]: line[name] for line in lines if name in line} for lines in records]
    for step in sorted(set.intersection(*map(set, tables))):
        values = [table[step] for table in tables]
        yield step, sum(values) / len(values), min(values), max(values)


def draw(panel: Axes, records: list[list[dict]], name: str, label: str) -> bool:
    """Draws one metric of a run; whether it has it."""
    points = list(curve(records, name))
    if points:
        steps, means, minima, maxima = zip(*points, strict=True)
        (line,) = panel.plot(steps, means, label=label, marker="" if name.startswith("train/") else "o", markersize=4)
        panel.fill_between(steps, minima, maxima, color=line.get_color(), alpha=0.2, linewidth=0)
    return bool(points)


def main(*arguments: str) -> None:
    """One panel for the loss and one for the accuracy, against the step."""
    *workdirs, out = map(Path, arguments)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for workdir in workdirs:
        records = read(workdir)
        for panel, metric in zip(panels, ("loss", "accuracy"), strict=True):
            if len(workdirs) == 1:
                for split in SPLITS:
                    draw(panel, records, f"{split}/{metric}", split)
            else:
                draw(panel, records, f"test/{metric}", workdir.name)
    for panel, metric in zip(panels, ("loss", "accuracy"), strict=True):
        panel.set(xlabel="step", ylabel=metric if len(workdirs) == 1 else f"test {metric}")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
