import jax
import jax.numpy as jnp
import pytest

from vit_jax.models import variants
from vit_jax.models.summary import forward_flops
from vit_jax.models.vit import VisionTransformer


@pytest.mark.parametrize(
    ("name", "size", "classes", "gigaflops"),
    [
        ("S/16", 224, 1000, 27.6),
        ("B/16", 224, 1000, 105.4),
        ("L/16", 224, 1000, 369),
        ("Ti/4", 32, 10, 2.19),
        ("S/4", 32, 10, 8.52),
        ("B/4", 32, 10, 33.6),
    ],
)
def test_three_forward_passes_cost_what_is_known(name, size, classes, gigaflops):
    model = VisionTransformer(classes=classes, **variants.fields(name))
    assert 3 * forward_flops(model, (size, size), 3) / 1e9 == pytest.approx(gigaflops, rel=0.002)


def compiled_flops(model, images):
    parameters = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.jit(model.apply).lower(parameters, images).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("fields", [{}, {"class_token": False, "pooling": "mean", "pre_logits": 64}])
def test_flops_are_what_the_compiler_counts_less_the_elementwise_ones(small, fields):
    model = small(width=128, heads=2, mlp_width=512, **fields)
    counted = compiled_flops(model, jax.ShapeDtypeStruct((2, 8, 12, 5), jnp.float32)) / 2
    assert 0.93 * counted < forward_flops(model, (8, 12), 5) < counted
