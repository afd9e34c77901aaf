"""Text towers and zero-shot classification against transformers, as make_text_references.py has recorded them."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax import predict, zero_shot
from vit_jax.errors import UserError
from vit_jax.weights import files, texts, tokenizer

# Those of make_text_references.py.
TEXTS = ("a cat", "a photo of a tiny dog", "Cats,  and DOGS!", "cat, dog, cat, dog, cat, dog, cat, dog, cat, dog, cat")


@pytest.fixture(scope="module")
def recorded(request):
    return request.path.parent / "references_text"


@pytest.fixture
def tokenizers():
    return pytest.importorskip("tokenizers", reason="the optional library tokenizers is not installed")


def copied(recorded, name, folder, arrays=None, **configs):
    """A copy of a recording with other arrays, or JSON files changed or, for None, without them."""
    shutil.copytree(recorded / name, folder, dirs_exist_ok=True)
    for config, changes in configs.items():
        path = folder / f"{config}.json"
        if changes is None:
            path.unlink()
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if arrays is not None:
        files.write_safetensors(folder / "model.safetensors", arrays)
    return folder


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_text_features_are_those_of_transformers(recorded, name):
    numbers = np.load(recorded / name / "numbers.npz")
    tower = texts.load_text(recorded / name)
    assert len(jax.tree.leaves(tower.parameters)) == len(tower.parameters["encoder"]) * 0 + _leaves(tower)
    with jax.default_matmul_precision("highest"):
        close(tower.embed(numbers["ids"]), numbers["text_features"])


def _leaves(tower):
    return 2 + 2 * 12 + 2 + 2 - 2 * 4  # tables, blocks, norm and head; queries, keys and values are one layer
