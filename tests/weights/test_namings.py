"""Against transformers, open_clip and torchvision, as make_tower_references.py has recorded them."""

import functools

import jax
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax import weights
from vit_jax.weights import files
from vit_jax.weights.save import flattened

# What a recording without a config.json is of.
OVERRIDES = {
    name: {"heads": 3} for name in ("torchvision", "torchvision_pre_logits", "openai", "dinov3_swiglu_state_dict")
}
NAMES = [
    *("clip", "clip_vision", "clip_classifier", "siglip", "siglip_classifier", "siglip2_naflex"),
    *("dinov3", "dinov3_swiglu", "dinov3_swiglu_state_dict"),
    *("openai", "openclip", "openclip_quickgelu", "torchvision", "torchvision_pre_logits"),
]


@pytest.mark.parametrize("name", mostly_slow(NAMES, 4))
def test_the_libraries_numbers(references, helpers, name):
    overrides, recorded = OVERRIDES.get(name, {}), np.load(references / name / "numbers.npz")
    model, parameters, report = weights.load(references / name, **overrides)
    helpers.covers(report, files.open_file(references / name).shapes, flattened(parameters))
    features = model.clone(classes=None, pre_logits=None)
    models = {"outputs": model, "pooled": features}
    models |= dict.fromkeys(("tokens", "patches"), features.clone(pooling="none"))

    @functools.partial(jax.jit, static_argnums=2)
    def outputs(parameters, images, kinds):
        return {kind: models[kind].apply({"params": parameters}, images) for kind in kinds}

    def compare(inputs, suffix):
        kinds = tuple(kind for kind in models if kind + suffix in recorded)
        for kind, found in outputs(parameters, recorded[inputs], kinds).items():
            wanted = recorded[kind + suffix]
            found = found[:, -wanted.shape[1] :] if kind == "patches" else found
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=kind + suffix)

    with jax.default_matmul_precision("highest"):
        compare("inputs", "")
        for key in recorded:
            if key.startswith("inputs_"):
                compare(key, key.removeprefix("inputs"))
