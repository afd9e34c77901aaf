"""The published models: their table, the names that a user may write for them, and what timm itself makes of each."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from vit_jax import convert
from vit_jax.models.parameters import parameter_shapes
from vit_jax.weights import published
from vit_jax.weights import timm as family
from vit_jax.weights.files import Stored
from vit_jax.weights.published import PUBLISHED

GELUS = {"GELU": "exact", "GELUTanh": "tanh", "SiLU": "tanh"}  # SwiGLU has none: the field stays as it is
POOLINGS = {"token": "token", "avg": "mean", "map": "map"}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_the_page_is_the_generated_one():
    spec = importlib.util.spec_from_file_location("published_page", ROOT / "docs" / "published.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert page("published.md") == script.markdown(), "run python docs/published.py"


def test_the_models_of_the_other_page_have_the_same_rows():
    rows = [line for line in page("weights.md").splitlines() if line.startswith("| `") and "/huggingface.co/" in line]
    assert len(rows) > 3 and not set(rows) - set(page("published.md").splitlines())
    assert f"{len(PUBLISHED)} published models have a short name" in page("weights.md")


def test_the_list_has_every_name_and_fits_100_columns(capsys):
    assert convert.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split() and line.split()[0] in PUBLISHED]
    assert [row[0] for row in rows] == list(PUBLISHED)
    assert [f"timm/{row[-1]}" for row in rows] == [one.hub for one in PUBLISHED.values()]
    assert max(map(len, lines)) <= 100
    assert len([line for line in lines if "licence cc-by-nc-4.0" in line]) == 1


def test_the_list_is_filtered_by_a_part_of_the_name(capsys):
    assert convert.main(["--list=AugReg-B16"]) == 0
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("augreg")]
    assert found == [name for name in PUBLISHED if name.startswith("augreg-b16")]
    assert convert.main(["--list", "augrec-b16-224"]) == 2
    assert "nearest: augreg-b16-224" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("augreg-b16", "augreg-b16-in21k"),
        ("augreg_B16_224", "augreg-b16-224"),
        ("ViT-B_16.npz", "augreg-b16-in21k"),
        ("B/16", "augreg-b16-in21k"),
        ("ViT-L_32.npz", "vit-l32-in21k"),
        ("R50+ViT-B_16.npz", "vit-r50-b16-in21k"),
        ("Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz", "augreg-ti16-in21k"),
        ("vit_base_patch16_224", "augreg-b16-224"),
        ("vit_large_patch16_384", "augreg-l16-384"),
        ("vit_base_patch16_224.augreg_in22k", "augreg-b16-in21k"),
        ("google/vit-base-patch16-224-in21k", "augreg-b16-in21k"),
        ("facebook/dinov2-base", "dinov2-b14"),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", "dinov3-b16"),
        ("facebook/dino-vits8", "dino-s8"),
        ("facebook/deit-tiny-patch16-224", "deit-ti16-224"),
        ("vit_b_16", "augreg-b16-in21k"),
        ("dino", "dino-"),
    ],
)
def test_names_of_other_projects_resemble_ours(written, meant):
    assert published.nearest_models(written)[0].startswith(meant)


@pytest.mark.parametrize("written", ["", "weights.npz", "runs/cifar10", "resnet50", "model.safetensors", "checkpoint"])
def test_other_words_resemble_no_model(written):
    assert published.nearest_models(written) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_inferred_is_what_timm_makes(timm, name):
    import torch

    with torch.device("meta"):
        theirs = timm.create_model(PUBLISHED[name].hub.partition("/")[2])
    size = theirs.pretrained_cfg["input_size"]
    config = {
        "architecture": theirs.pretrained_cfg["architecture"],
        "num_features": theirs.num_features,
        "global_pool": theirs.global_pool,
        "pretrained_cfg": {"input_size": size},
    }
    listed = PUBLISHED[name]
    assert listed.parameters == sum(one.numel() for one in theirs.parameters())
    assert (3, listed.image_size, listed.image_size) == tuple(size)
    assert (listed.classes or 0) == theirs.num_classes
    assert listed.licence == theirs.pretrained_cfg["license"]
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    dtypes = dict.fromkeys(shapes, np.dtype("float32"))
    stored = Stored(Path("x"), "safetensors", {}, shapes, dtypes, json.loads(json.dumps(config)), {})
    found = family.describe(stored, {})
    model, block = found.model, theirs.blocks[0]
    assert model.heads == block.attn.num_heads
    assert model.gelu == GELUS[type(block.mlp.act).__name__]
    assert model.layer_norm_epsilon == block.norm1.eps
    assert model.pooling == POOLINGS[theirs.global_pool]
    # The last pixels that the patch does not divide are not looked at.
    assert found.image_size() == tuple(side // 14 * 14 if model.patch_size == 14 else side for side in size[1:])
    without_row = model.class_token and found.grid is not None and getattr(theirs, "no_embed_class", False)
    ours = sum(math.prod(shape) for shape in parameter_shapes(model, found.grid, found.channels).values())
    # Our biases of keys, where timm has those of queries and values alone; and the row of the class token.
    more = model.depth * model.width if any(len(rule.names) > len(rule.paths) for rule in found.rules) else 0
    more += model.width if without_row else 0
    assert ours == sum(one.numel() for one in theirs.parameters()) + more
