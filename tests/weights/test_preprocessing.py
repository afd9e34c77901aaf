"""The preprocessing that files record: pixels as timm and transformers prepare them, mean and std, class names."""

import json
from pathlib import Path

import numpy as np
import pytest

from vit_jax import inference
from vit_jax.data import normalization
from vit_jax.weights import files
from vit_jax.weights.save import flattened
from vit_jax.weights.timm_writer import write as timm_arrays

RECORDED = np.load(Path(__file__).with_name("references_pixels.npz"))
CONFIGS = json.loads(str(RECORDED["configs"]))
IMAGENET, CLIP = (normalization.RED_GREEN_BLUE[name] for name in ("imagenet", "clip"))


@pytest.fixture(scope="module")
def put(helpers, tmp_path_factory):
    """A function that writes a tiny model as timm names its arrays, with other arrays and JSON files; the directory."""

    def put(size=(8, 8), config=None, preprocessor=None, name="model", more=(), classes=3, **fields):
        directory = tmp_path_factory.mktemp("weights") / name
        patch = np.gcd(*size).item()
        model, parameters = helpers.small(size, classes=classes, patch_size=patch, depth=1, heads=3, **fields)
        arrays = {
            key: np.ascontiguousarray(array)
            for key, array in timm_arrays(model, flattened(parameters), size, 3)[0].items()
        }
        arrays |= {key: np.zeros((1, 1, 24), "f") for key in more}
        files.write_safetensors(directory / "model.safetensors", arrays)
        own = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 3, "img_size": list(size)}}
        (directory / "config.json").write_text(json.dumps(own | (config or {})))
        if preprocessor is not None:
            (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        return directory

    return put


@pytest.mark.parametrize("case", CONFIGS)
def test_pixels_are_those_of_timm_and_transformers(put, case):
    """Within one level of 255 in each channel, which is 1 / 255 / std after normalization."""
    config, expected = CONFIGS[case], RECORDED[case]
    kind = {"config": {"pretrained_cfg": config}} if case.startswith("timm") else {"preprocessor": config}
    classifier = inference.of_file(put(expected.shape[:2], **kind))
    pixels, (mean, std) = classifier.pixels(RECORDED["picture"]), (classifier.inputs.mean, classifier.inputs.std)
    assert pixels.shape == expected.shape
    assert np.abs((pixels - expected) * std).max() <= 1e-5 < 1 / 255
    # The picture is not one that any preparation would make the same of.
    plain = inference.of_file(put(expected.shape[:2])).pixels(RECORDED["picture"])
    assert np.abs((plain - 0.0) * 0.5 + 0.5 - (expected * std + mean)).max() > 0.1 or case in ("timm augreg", "CLIP")
