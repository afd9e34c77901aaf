"""Every pretrained tag in timm's files of plain Vision Transformers: it is read, or refused with a reason."""

import collections
import gzip
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.weights import towers
from vit_jax.weights.files import Stored
from vit_jax.weights.load import FAMILIES

HERE = Path(__file__).resolve().parent
# Patterns of the tags that are refused, and of what the messages say.
REFUSED = {
    r"vit_base_mci_": "only ResNet v2 is supported as a stem",
    r"vit_base_patch16_rpn_|eva02_enormous_": "its blocks have LayerNorms after attention and MLP",
    r"vit_s?relpos_": "relative positions that a network computes|its positions are relative",
    r"vit_\w+_rope_mixed_": "rotary positions with learned frequencies",
    r"vit_\w+_sapiens2": "several of its heads share keys and values",
    r"vit_(dlittle|dwee)_": "differential attention",
    r"vit_(dpwee|pwee)_": "not a known Vision Transformer",
    r"test_vit3\.": "its mean includes class token and registers",
}


def stored(row) -> Stored:
    """A file of a tag, without the values of its arrays."""
    shapes = {name: tuple(shape) for name, shape in row["shapes"].items()}
    dtypes = dict.fromkeys(shapes, np.dtype(np.float32))
    return Stored(Path("model.safetensors"), "safetensors", {}, shapes, dtypes, row["config"], {})


def check(tag, row):
    """The model of a tag agrees with timm's in what its arrays do not determine; None if it is refused."""
    reason = next((why for pattern, why in REFUSED.items() if re.match(pattern, tag)), None)
    try:
        found = towers.describe(stored(row), FAMILIES, None, {})
    except UserError as error:
        assert reason is not None and re.search(reason, str(error)), f"{tag}: {error}"
        assert str(error).count("\n") <= 2, tag
        return None
    assert reason is None and found.head_refusal is None, tag
    model = found.model
    assert row["heads"] == model.heads, tag
    assert row["gelu"] in (None, model.gelu) or model.mlp == "swiglu", tag
    assert row["epsilon"] in (None, model.layer_norm_epsilon), tag
    return model


def walk(table):
    models, kinds = {}, {}
    for tag, row in table.items():  # many tags are of one architecture
        kind = json.dumps([row["config"]["architecture"], row["gelu"], row["shapes"]])
        if kind not in kinds:
            kinds[kind] = check(tag, row)
        models[tag] = kinds[kind]
    read = [tag for tag, model in models.items() if model is not None]
    print(f"{len(read)} of {len(models)} tags of timm are read")
    return models


def recorded():
    return json.loads(gzip.decompress((HERE / "timm_tags.json.gz").read_bytes()))


@pytest.mark.slow
def test_the_tags_of_timm_that_are_read():
    models = walk(recorded())
    assert len(models) == 452 and sum(model is not None for model in models.values()) == 419
    positions = collections.Counter(model.position for model in models.values() if model is not None)
    assert {"dinov3", "learned_eva02", "learned_pe", "rotary", "learned_rotary", "eva02", "relative_class"} < {
        *positions
    }
    assert positions["dinov3"] == sum(bool(re.search("dinov3|lingbot", tag)) for tag in models)


@pytest.mark.slow
def test_the_recorded_tags_are_those_of_timm(timm):
    spec = importlib.util.spec_from_file_location("make_tags", HERE / "make_tags.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    made = json.loads(json.dumps(maker.table(timm)))
    walk(made)
    assert made == recorded()
