"""Draws the learning curve of a run from its metrics.jsonl (needs matplotlib).

python docs/learning_curve.py runs/digits docs/digits.png
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def main(workdir: str, out: str) -> None:
    """One panel for the loss and one for the accuracy, of training and of evaluation, against the step."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, name in zip(panels, ("loss", "accuracy"), strict=True):
        for split in ("train", "validation", "test"):
            points = [(line["step"], line[f"{split}/{name}"]) for line in lines if f"{split}/{name}" in line]
            if points:
                panel.plot(
                    *zip(*points, strict=True), label=split, marker="" if split == "train" else "o", markersize=4
                )
        panel.set(xlabel="step", ylabel=name)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
