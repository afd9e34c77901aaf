"""FLOPs and memory estimates compared with recorded values: costs.json, made by closed formulas of every layer."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers import mostly_slow

from vit_jax.models import variants
from vit_jax.models.masked_autoencoder import MaskedAutoencoder
from vit_jax.models.masked_patches import MaskedPatchPrediction
from vit_jax.models.summary import forward_flops, training_bytes
from vit_jax.models.vit import VisionTransformer

RECORDED = json.loads(Path(__file__).with_name("costs.json").read_text())


@pytest.mark.parametrize("row", mostly_slow(RECORDED["options"], 6), ids=lambda row: str(row[0]))
def test_costs_of_options_are_as_recorded(small, row):
    fields, size, flops, parameters, activations = row
    dtypes = {name: jnp.dtype(value) for name, value in fields.items() if name.endswith("dtype")}
    stem = {"stem": tuple(fields["stem"])} if "stem" in fields else {}
    model, size = small(**{**fields, **dtypes, **stem}), tuple(size)
    assert forward_flops(model, size, 3) == flops
    found = training_bytes(model, size, 3, 4)
    assert (found["parameters"], found["activations"]) == (parameters, activations)


@pytest.mark.parametrize("name", mostly_slow(RECORDED["variants"], 4))
def test_costs_of_variants_are_as_recorded(name):
    flops, *activations = RECORDED["variants"][name]
    model = VisionTransformer(classes=1000, **variants.fields(name))
    assert forward_flops(model, (224, 224), 3) == flops
    settings = [
        (remat, dtype) for remat in (False, True, "dots", "dots_no_batch") for dtype in (jnp.float32, jnp.bfloat16)
    ]
    models = [model.clone(remat=remat, dtype=dtype) for remat, dtype in settings]
    assert [training_bytes(one, (224, 224), 3, 128)["activations"] for one in models] == activations


@pytest.mark.parametrize("row", RECORDED["pretraining"], ids=lambda row: str(row[0]))
def test_flops_of_pretraining_are_as_recorded(small, row):
    fields, autoencoder, prediction = row
    backbone = small(classes=None, pooling="none", **fields)
    decoder = {"decoder_width": 8, "decoder_depth": 3, "decoder_heads": 2, "decoder_mlp_width": 20}
    assert forward_flops(MaskedAutoencoder(backbone, **decoder), (8, 12), 3) == autoencoder
    assert forward_flops(MaskedPatchPrediction(backbone, (0.5,) * 3, (0.5,) * 3), (8, 12), 3) == prediction
