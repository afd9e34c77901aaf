"""Sharding rules: names of parameters, errors, and a training step on a state that is really sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from toy import make_state

from vit_jax import sharding

WIDTH = 16
FSDP: sharding.Rules = (("head/.*", PartitionSpec()), (".*/kernel", PartitionSpec("data")), (".*", PartitionSpec()))


def parameters():
    generator = np.random.default_rng(0)

    def draw(*shape):
        return generator.normal(0, 0.3, shape).astype(np.float32)

    blocks = {f"block_{i}": {"up": {"kernel": draw(WIDTH, WIDTH), "bias": draw(WIDTH)}} for i in range(2)}
    return {"encoder": blocks, "head": {"kernel": draw(WIDTH, 3)}}


def loss(parameters, inputs):
    for block in parameters["encoder"].values():
        inputs = jnp.tanh(inputs @ block["up"]["kernel"] + block["up"]["bias"])
    return jnp.mean(jnp.square(inputs @ parameters["head"]["kernel"]))


def trained(rules, optimizer):
    """The state after three updates on eight devices, with a batch that the devices share."""
    mesh = sharding.make_mesh(8)
    start = make_state(parameters(), optimizer, average=True)
    layout = sharding.state_sharding(start, mesh, rules)

    def update(state, inputs):
        gradients = jax.grad(loss)(state.parameters, inputs)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        return state.replace(parameters=optax.apply_updates(state.parameters, updates), optimizer=optimizer_state)

    step = jax.jit(update, in_shardings=(layout, sharding.data_sharding(mesh)), out_shardings=layout, donate_argnums=0)
    state = jax.device_put(start, layout)
    inputs = jax.device_put(np.random.default_rng(1).normal(size=(32, WIDTH)).astype("f"), sharding.data_sharding(mesh))
    for _ in range(3):
        state = step(state, inputs)
    return state


def test_the_default_rules_replicate_everything():
    mesh = sharding.make_mesh(8)
    state = make_state(parameters(), optax.adam(1e-2), average=True)
    layout = sharding.state_sharding(state, mesh)
    assert jax.tree.structure(layout) == jax.tree.structure(state)
    assert set(jax.tree.leaves(layout)) == {sharding.replicated(mesh)}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-2),
        optax.partition(
            {"matrix": optax.sgd(1e-2, momentum=0.9), "other": optax.adam(1e-2)},
            lambda tree: jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "other", tree),
        ),
    ],
    ids=["adamw", "partition"],
)
def test_a_sharded_state_trains_as_a_replicated_one(optimizer):
    sharded, replicated = trained(FSDP, optimizer), trained(sharding.RULES, optimizer)
    kernel, bias = (sharded.parameters["encoder"]["block_0"]["up"][name] for name in ("kernel", "bias"))
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(WIDTH // 8, WIDTH)}
    assert {shard.data.shape for shard in bias.addressable_shards} == {(WIDTH,)}
    assert sharded.parameters["head"]["kernel"].sharding.is_fully_replicated
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(sharded.optimizer)
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("encoder/block_0/up/kernel")
    ]
    assert moments and all(moment.sharding == kernel.sharding for moment in moments)
    assert sharded.averaged["encoder"]["block_1"]["up"]["kernel"].sharding == kernel.sharding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), sharded, replicated)


def test_the_first_rule_that_matches_the_whole_name_applies():
    mesh, tree = sharding.make_mesh(8), {"a": {"kernel": np.zeros((8, 8))}, "b": {"kernel": np.zeros((8, 8))}}
    rules = (("kernel", PartitionSpec("data")), ("a/.*", PartitionSpec(None, "data")), (".*", PartitionSpec()))
    layout = sharding.state_sharding(tree, mesh, rules)
    assert layout["a"]["kernel"].spec == PartitionSpec(None, "data")
    assert layout["b"]["kernel"].spec == PartitionSpec()


@pytest.mark.parametrize(
    "shape, rules, message",
    [
        ((12, 8), FSDP, r"encoder/kernel has shape \(12, 8\): axis 0 of size 12 cannot be divided among 8 devices"),
        ((8,), ((".*", PartitionSpec(None, "data")),), r"encoder/kernel has shape \(8,\)"),
        ((8,), (("head/.*", PartitionSpec()),), "no sharding rule matches 'encoder/kernel'"),
    ],
)
def test_an_array_that_cannot_be_laid_out_is_named(shape, rules, message):
    with pytest.raises(ValueError, match=message):
        sharding.state_sharding({"encoder": {"kernel": np.zeros(shape)}}, sharding.make_mesh(8), rules)
