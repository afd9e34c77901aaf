"""Writes docs/published.md, a table of the published models: python docs/published.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vit_jax.weights.published import by_source, millions  # noqa: E402

INTRODUCTION = """\
# Published models

Each of these names can be given wherever weights are: `--config.checkpoint.init_from=NAME`, `--init=NAME`,
`weights.load("NAME")`. The first use downloads the model from its repository on the Hugging Face Hub;
[weights.md](weights.md#published-models) says where it is stored, and what to do without a network.
`vit-jax convert --list` prints this table, `vit-jax convert --list=b16` the models with `b16` in their names.

A model without classes is an encoder: fine-tune it, or evaluate its features ([transfer.md](transfer.md)). A model with
the data `ImageNet-21k, ImageNet-1k` was pre-trained on the first and fine-tuned on the second. The parameters include
those of the classifier.

`python docs/published.py` generates this page from `vit_jax/weights/published.py`.
"""


def markdown() -> str:
    """The text of the page: a table per paper."""
    parts = [INTRODUCTION]
    for source, models in by_source():
        rows = ["| Name | Parameters | Image size | Classes | Data | Repository |", "|---|---|---|---|---|---|"]
        for name, one in models.items():
            classes = f"{one.classes:,}" if one.classes else "none"
            link = f"[{one.hub.removeprefix('timm/')}](https://huggingface.co/{one.hub})"
            cells = (f"`{name}`", millions(one.parameters), str(one.image_size), classes, ", ".join(one.data), link)
            rows.append(f"| {' | '.join(cells)} |")
        licence = next(iter(models.values())).licence
        parts.append("\n".join([f"## {source}", "", f"Licence: {licence}.", "", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "published.md").write_text(markdown())
