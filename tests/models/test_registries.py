"""Every option beside every other: it builds, runs, and every parameter gets a finite gradient that is not all zero."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import THOROUGH, mostly_slow

from vit_jax.models.activations import FORMS
from vit_jax.models.mlp import MLPS
from vit_jax.models.pooling import POOLINGS
from vit_jax.models.positions import POSITIONS

POSITION = [
    *({"position": name, "position_at": at} for name, kind in POSITIONS.items() for at in kind.at),
    *({"position": name, "position_width": 4} for name, kind in POSITIONS.items() if kind.fixed and "input" in kind.at),
]
POOLING = [
    *({"pooling": name, "class_token": True, "registers": 1} for name in POOLINGS),
    *({"pooling": name, "class_token": False} for name, kind in POOLINGS.items() if not kind.needs_class_token),
    {"pooling": "map", "pool_heads": 1},
    {"pooling": "mean", "class_token": True, "norm_after_pooling": True},
]
BLOCK = [
    {},
    *({"mlp": name} for name in MLPS),
    *({"gelu": name} for name in FORMS),
    {"qkv_bias": False},
    {"qk_norm": True},
    {"norm": "rms", "qk_norm": True},
    {"attention_norm": True, "mlp_norm": True},
    {"mlp": "swiglu", "mlp_norm": True},
    {"input_norm": "patches"},
    {"input_norm": "tokens"},
    {"final_norm": False},
    {"layer_scale": 0.1},
    {"parallel": True},
    {"dropout": 0.1, "attention_dropout": 0.1},
    {"stochastic_depth": 0.1},
    {"stochastic_depth": 0.1, "stochastic_depth_schedule": "constant"},
    {"remat": True},
    {"scan": True},
    {"pre_logits": 4},
    {"classes": {"one": 2, "other": 3}},
]
AXES = (POSITION, POOLING, BLOCK)


def pairs_once():
    """Few triples in which every two options of different axes meet."""
    left = {
        (a, b, i, j)
        for a, b in itertools.combinations(range(3), 2)
        for i in range(len(AXES[a]))
        for j in range(len(AXES[b]))
    }
    triples = []
    while left:

        def covered(t):
            return [(a, b, t[a], t[b]) for a, b in itertools.combinations(range(3), 2)]

        best = max(itertools.product(*(range(len(axis)) for axis in AXES)), key=lambda t: len(left & set(covered(t))))
        left -= set(covered(best))
        triples.append(best)
    return triples


def fields_of(triple):
    fields = {key: value for axis, index in zip(AXES, triple, strict=True) for key, value in axis[index].items()}
    needed = {"class_token": True} if POSITIONS[fields["position"]].needs_class_token else {}
    final = {"final_norm": True} if "norm_after_pooling" in fields else {}
    return {**fields, **needed, **final}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def check(small, randomise, draw, fields):
    images = draw(2, 4, 4, 3)
    model = small(depth=1, **fields)
    variables = randomise(model, images)

    def loss(parameters):
        outputs = model.apply({"params": parameters}, images, train=True, rngs={"dropout": jax.random.key(0)})
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(outputs))

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(leaf)), name
        # In the last block, no patch's output is read by the class token's head: there, offsets do nothing.
        unread = model.pooling in ("token", "token_register") and name.endswith("['positions']['offsets']")
        assert np.any(leaf != 0) or unread, name


def name_of(triple):
    return "-".join(f"{key}={value}" for key, value in fields_of(triple).items())


EACH = [tuple(index % len(axis) for axis in AXES) for index in range(max(map(len, AXES)))]


@pytest.mark.parametrize("triple", mostly_slow(EACH, 14), ids=name_of)
def test_every_option_trains(small, randomise, draw, triple):
    check(small, randomise, draw, fields_of(triple))


@pytest.mark.slow
@pytest.mark.parametrize("triple", pairs_once()[:: 1 if THOROUGH else 10], ids=name_of)
def test_every_pair_of_options_trains(small, randomise, draw, triple):
    check(small, randomise, draw, fields_of(triple))
