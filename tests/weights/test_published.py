"""Every published model that has a name here, as timm itself makes it (without its weights), against what we infer."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vit_jax.models.parameters import parameter_shapes
from vit_jax.weights import timm as family
from vit_jax.weights.files import Stored
from vit_jax.weights.published import PUBLISHED

GELUS = {"GELU": "exact", "GELUTanh": "tanh", "SiLU": "tanh"}  # SwiGLU has none: the field stays as it is
POOLINGS = {"token": "token", "avg": "mean", "map": "map"}


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
    without_row = model.class_token and theirs.no_embed_class
    ours = sum(math.prod(shape) for shape in parameter_shapes(model, found.grid, found.channels).values())
    assert ours == sum(one.numel() for one in theirs.parameters()) + (model.width if without_row else 0)
