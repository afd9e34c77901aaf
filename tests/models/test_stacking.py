from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.block_config import BlockConfig
from vit_jax.models.encoder import Encoder
from vit_jax.models.stacking import stack_blocks, unstack_blocks


def loss_and_gradients(model, images):
    def loss(parameters):
        return jnp.square(model.apply({"params": parameters}, images)).mean()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "fields",
    [
        {"position": "relative", "layer_scale": 0.1, "qk_norm": True},
        {},
        {"position": "learned", "position_at": "layers", "parallel": True},
    ],
    ids=str,
)
def test_scanned_and_unrolled_are_the_same_from_each_others_parameters(small, draw, randomise, fields):
    images = draw(2, 4, 4, 3)
    unrolled = small(**fields)
    scanned = unrolled.clone(scan=True)
    parameters = randomise(unrolled, images, scale=0.2)["params"]
    stacked = stack_blocks(parameters)
    expected = jax.eval_shape(scanned.init, jax.random.key(0), images)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(stacked, expected)
    chex.assert_trees_all_equal(unstack_blocks(stacked), parameters)
    with jax.default_matmul_precision("highest"):
        loss, gradients = loss_and_gradients(unrolled, images)(parameters)
        other_loss, other_gradients = loss_and_gradients(scanned, images)(stacked)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    chex.assert_trees_all_close(unstack_blocks(other_gradients), gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_rematerialisation_changes_no_bit(small, draw, randomise, scan):
    images = draw(2, 4, 4, 3)
    model = small(scan=scan)
    parameters = randomise(model, images)["params"]
    kept = loss_and_gradients(model, images)(parameters)
    chex.assert_trees_all_equal(loss_and_gradients(model.clone(remat=True), images)(parameters), kept)


def products(jaxpr):
    """Matrix products in a traced program and all that it calls."""
    inner = [value for equation in jaxpr.eqns for value in equation.params.values()]
    inner = [getattr(value, "jaxpr", value) for value in inner]
    here = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return here + sum(products(value) for value in inner if hasattr(value, "eqns"))


@pytest.mark.parametrize(
    ("remat", "again"),
    # Of a block's six products nobody needs the last one's result; only scores and mixture have no parameters.
    [("none", 0), ("dots", 0), ("dots_no_batch", 2), ("full", 5), (True, 5)],
)
def test_a_policy_computes_again_what_it_does_not_keep(small, draw, randomise, remat, again):
    images = draw(2, 4, 4, 3)
    model = small()
    parameters = randomise(model, images)["params"]

    def count(model):
        def loss(parameters):
            return model.apply({"params": parameters}, images, train=True).sum()

        return products(jax.make_jaxpr(jax.grad(loss))(parameters).jaxpr)

    assert count(model.clone(remat=remat)) == count(model) + again * model.depth


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "dots_no_batch"])
def test_a_policy_changes_no_bit(small, draw, randomise, remat):
    images = draw(2, 4, 4, 3)
    model = small(depth=1)
    parameters = randomise(model, images)["params"]
    kept = loss_and_gradients(model, images)(parameters)
    chex.assert_trees_all_equal(loss_and_gradients(model.clone(remat=remat), images)(parameters), kept)


def test_an_unknown_policy_is_refused(small):
    with pytest.raises(ValueError, match="remat is 'dotz': one of none, full, dots, dots_no_batch"):
        small(remat="dotz")


@pytest.mark.usefixtures("quick_compilation")
def test_rematerialisation_draws_the_same_dropout(small, draw, randomise):
    images = draw(2, 4, 4, 3)
    model = small(depth=1, dropout=0.3, stochastic_depth=0.3, stochastic_depth_schedule="constant")
    variables = randomise(model, images)

    def run(model):
        return jax.jit(partial(model.apply, train=True))(variables, images, rngs={"dropout": jax.random.key(0)})

    np.testing.assert_array_equal(run(model.clone(remat=True)), run(model))


@pytest.mark.usefixtures("quick_compilation")
def test_layers_of_a_scan_start_differently(draw):
    module = Encoder(depth=3, config=BlockConfig(heads=1, mlp_width=12), scan=True)
    kernels = jax.jit(module.init)(jax.random.key(0), draw(1, 2, 8))["params"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernels.shape == (3, 8, 12)
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1 and np.abs(kernels[1] - kernels[2]).max() > 0.1


@pytest.mark.slow
def test_a_scan_drops_branches_at_each_layers_rate(randomise):
    examples, depth, last = 4096, 4, 0.6
    module = Encoder(depth=depth, config=BlockConfig(heads=1, mlp_width=1), stochastic_depth=last, scan=True)
    tokens = jnp.zeros((examples, 1, depth))
    variables = randomise(module, tokens[:1], scale=0)
    # Layer i adds one to channel i, and nothing else does anything.
    variables["params"]["blocks"]["mlp"]["down"]["bias"] = jnp.eye(depth)
    _, captured = module.apply(
        variables, tokens, train=True, rngs={"dropout": jax.random.key(1)}, mutable=["intermediates"]
    )
    outputs = np.asarray(captured["intermediates"]["blocks"]["output"][0])[-1, :, 0]
    for layer in range(depth):
        rate = last * layer / (depth - 1)
        assert abs((outputs[:, layer] == 0).mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / examples)
        np.testing.assert_allclose(outputs[outputs[:, layer] != 0, layer], 1 / (1 - rate), rtol=1e-5)
    both = ((outputs[:, 2] == 0) & (outputs[:, 3] == 0)).mean()
    assert abs(both - 0.4 * 0.6) < 4 * np.sqrt(0.24 * 0.76 / examples)


def test_ten_blocks_and_more_stay_in_order():
    tree = {"encoder": {f"block_{i}": {"leaf": jnp.full(2, i)} for i in range(12)} | {"norm": {"scale": jnp.ones(1)}}}
    stacked = stack_blocks(tree)
    np.testing.assert_array_equal(stacked["encoder"]["blocks"]["leaf"][:, 0], np.arange(12))
    assert stack_blocks(stacked) is stacked and unstack_blocks(tree) is tree
    chex.assert_trees_all_equal(unstack_blocks(stacked), tree)


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="the tree has no encoder blocks, only head: it must have"):
        stack_blocks({"head": {}})


@pytest.mark.slow
def test_one_program_serves_all_layers_of_a_scan(small, draw, randomise):
    images = draw(1, 4, 4, 3)
    counts = []
    for depth in (2, 8):
        model = small(scan=True, depth=depth)
        counts += [str(jax.make_jaxpr(model.apply)(randomise(model, images), images)).count("dot_general")]
    assert counts[0] == counts[1]
