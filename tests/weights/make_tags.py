"""Makes timm_tags.json.gz: the names and shapes of every pretrained tag in timm's files of plain Vision Transformers.

    python tests/weights/make_tags.py

It takes torch and timm; the tests read what it has written and need neither. Written with timm 1.0.31. Models have one
block, and no memory: their parameters are on torch's 'meta' device.
"""

import gzip
import json
from pathlib import Path

import torch
from make_references import stub_torchvision

TABLE = Path(__file__).resolve().parent / "timm_tags.json.gz"
FILES = ("vision_transformer", "deit", "eva", "beit", "vision_transformer_hybrid", "vision_transformer_relpos")
FORMS = {"GELU": "exact", "GELUTanh": "tanh", "QuickGELU": "quick"}
KEPT = ("tag", "input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode", "num_classes")


def build(timm, tag):
    """A model of one block without memory."""
    fields = {"num_kv_heads": (2,)} if "sapiens2" in tag else {}  # one number per block
    with torch.device("meta"):
        return timm.create_model(tag, depth=1, **fields)


def row(timm, tag):
    """What a file of a tag and its config.json have, and what else its model consists of."""
    model, recorded = build(timm, tag), timm.models.get_pretrained_cfg(tag).to_dict()
    layers = dict(model.named_modules())
    norms = {layer.eps for name, layer in layers.items() if "norm" in name and hasattr(layer, "eps")}
    stem = any(name.startswith("patch_embed.backbone") for name in layers)
    activation = type(layers.get("blocks.0.mlp.act")).__name__
    if "natively QuickGELU" in str(recorded.get("notes")):  # also where the architecture has another
        activation = "QuickGELU"
    config = {"architecture": tag.split(".")[0], "num_features": model.num_features}
    config["global_pool"] = model.global_pool if isinstance(model.global_pool, str) else ""
    return {
        "config": config | {"pretrained_cfg": {key: recorded[key] for key in KEPT if recorded.get(key) is not None}},
        "shapes": {name: list(array.shape) for name, array in model.state_dict().items()},
        "heads": getattr(getattr(model.blocks[0], "attn", None), "num_heads", None),
        "gelu": FORMS.get(activation),
        "epsilon": None if stem else max(norms),
    }


def table(timm):
    """The rows of all tags."""
    module_of = timm.models._registry._model_to_module
    tags = [tag for tag in timm.list_pretrained() if module_of[tag.split(".")[0]] in FILES]
    return {tag: row(timm, tag) for tag in tags}


if __name__ == "__main__":
    stub_torchvision()
    import timm

    text = json.dumps(table(timm), sort_keys=True, separators=(",", ":"))
    TABLE.write_bytes(gzip.compress(text.encode(), mtime=0))
