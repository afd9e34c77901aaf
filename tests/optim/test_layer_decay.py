"""Layer-wise learning-rate decay, compared with a table written by hand and with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax import config as options
from vit_jax import optim
from vit_jax.config.check import check_config
from vit_jax.models.stacking import stack_blocks, unstack_blocks
from vit_jax.models.vit import VisionTransformer
from vit_jax.optim import layer_decay, trainable
from vit_jax.training import setup

# Factors of a model with three blocks and a decay of 0.5.
TABLE = {
    "embedding/projection/kernel": 0.0625,
    "embedding/projection/bias": 0.0625,
    "positions/table": 0.0625,
    "class_token": 0.0625,
    "registers": 0.0625,
    "encoder/block_0/mlp/up/kernel": 0.125,
    "encoder/block_0/norm_mlp/scale": 0.125,
    "encoder/block_1/attention/qkv/bias": 0.25,
    "encoder/block_2/attention/out/kernel": 0.5,
    "encoder/norm/scale": 1.0,
    "head/logits/kernel": 1.0,
    "head/logits/bias": 1.0,
}


def by_name(tree):
    return {trainable.name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def parameters():
    model = VisionTransformer(classes=3, patch_size=2, width=8, depth=3, heads=2, mlp_width=8, registers=1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))))["params"]
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)


def test_factors_equal_the_table(parameters):
    made = by_name(layer_decay.factors(0.5, parameters, 3))
    assert {name: made[name] for name in TABLE} == TABLE
    assert set(made.values()) == set(TABLE.values())


def test_stacked_blocks_have_one_factor_per_block(parameters):
    made = by_name(layer_decay.factors(0.5, stack_blocks(parameters), 3))
    kernel = made["encoder/blocks/mlp/up/kernel"]
    assert kernel.shape == (3, 1, 1) and kernel.ravel().tolist() == [0.125, 0.25, 0.5]
    assert made["encoder/blocks/mlp/up/bias"].shape == (3, 1)
    assert made["head/logits/kernel"] == 1.0 and made["class_token"] == 0.0625


def test_a_stem_has_the_factor_of_the_embedding():
    tree = {"stem": {"convolution_root": {"kernel": np.zeros(1)}}, "pooling": {"probe": np.zeros(1)}}
    assert by_name(layer_decay.factors(0.1, tree, 1)) == {
        "stem/convolution_root/kernel": pytest.approx(0.01),
        "pooling/probe": 1.0,
    }


def section(**values):
    config = options.default()
    config.optimizer.update(learning_rate=0.1, schedule="constant", **values)
    return config.optimizer


def gradients_of(parameters):
    """Gradients of three steps."""
    generator = np.random.default_rng(1)
    return [jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype("f"), parameters) for _ in range(3)]


def trained(section, parameters, gradients, factors):
    chain = optim.make(section, len(gradients), factors)

    @jax.jit
    def run(moved, gradients):
        state = chain.init(moved)
        for gradient in gradients:
            updates, state = chain.update(gradient, state, moved)
            moved = jax.tree.map(jnp.add, moved, updates)
        return moved

    return run(parameters, gradients)


def adamw(value, gradients, factor, decay):
    mean = square = 0.0
    for step, gradient in enumerate(gradients, start=1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        move = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
        value = value - 0.1 * factor * (move + decay * value)
    return value


def sgd(value, gradients, factor, decay):
    velocity = 0.0
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient + decay * value
        value = value - 0.1 * factor * velocity
    return value


@pytest.mark.parametrize("name, reference", [("adamw", adamw), ("sgd", sgd)])
@pytest.mark.parametrize("scan", mostly_slow([True, False], 2))
def test_updates_equal_numpy(parameters, name, reference, scan):
    gradients = gradients_of(parameters)
    arrange = stack_blocks if scan else lambda tree: tree
    start, moves = arrange(parameters), list(map(arrange, gradients))
    made = trained(section(name=name, weight_decay=0.3, beta2=0.99), start, moves, layer_decay.factors(0.5, start, 3))
    made = by_name(unstack_blocks(made))
    steps = list(map(by_name, gradients))
    for path, value in by_name(parameters).items():
        here = [step[path].astype(np.float64) for step in steps]
        factor = next(TABLE[other] for other in TABLE if other.split("/")[:2] == path.split("/")[:2])
        expected = reference(value.astype(np.float64), here, factor, 0.3 if path.endswith("kernel") else 0.0)
        np.testing.assert_allclose(made[path], expected, rtol=1e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("scan", [False, True])
def test_layer_decay_works_with_frozen_parameters(scan):
    """With plain SGD an update is -learning rate * factor * gradient; frozen parameters have none."""
    config = options.default()
    config.model.update(variant="Ti/4", width=16, depth=2, heads=2, mlp_width=16, scan=scan)
    config.optimizer.update(name="sgd", momentum=0.0, learning_rate=0.1, schedule="constant", layer_decay=0.5)
    config.optimizer.frozen = "embedding/*,encoder/*/mlp/*"
    config.train.update(steps=2, batch_size=8)
    config.mesh.devices = 1
    check_config(config)
    run = setup.assemble(config, setup.check(config), setup.load_sources(config))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), run.abstract_state().parameters)
    chosen = trainable.select(ones, run.mask)
    updates, _ = jax.jit(lambda ones: run.optimizer.update(ones, run.optimizer.init(ones), ones))(chosen)
    made = {name: -10 * np.asarray(leaf) for name, leaf in by_name(updates).items()}
    assert not any("/mlp/" in name or name.startswith("embedding") for name in made)
    assert made["head/logits/kernel"] == pytest.approx(1.0)
    assert made["positions/table"] == pytest.approx(0.125)
    path = "encoder/{}/attention/out/kernel"
    blocks = made[path.format("blocks")] if scan else [made[path.format(f"block_{i}")] for i in range(2)]
    assert blocks[0] == pytest.approx(0.25) and blocks[1] == pytest.approx(0.5)


@pytest.mark.parametrize("objective", ["masked_autoencoder", "masked_patches"])
def test_in_pre_training_layer_decay_applies_to_the_backbone_only(objective):
    config = options.default()
    config.model.update(variant="Ti/4", width=16, depth=2, heads=2, mlp_width=16, position="learned")
    config.optimizer.update(name="sgd", momentum=0.0, learning_rate=0.1, schedule="constant", layer_decay=0.5)
    config.train.update(objective=objective, label_smoothing=0.0, steps=2, batch_size=8)
    config.mesh.devices = 1
    check_config(config)
    run = setup.assemble(config, setup.check(config), setup.load_sources(config))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), run.abstract_state().parameters)
    updates, _ = jax.jit(lambda ones: run.optimizer.update(ones, run.optimizer.init(ones), ones))(ones)
    made = {name: -10 * float(np.asarray(leaf).ravel()[0]) for name, leaf in by_name(updates).items()}
    assert made["backbone/positions/table"] == pytest.approx(0.125)
    assert made["backbone/encoder/block_0/mlp/up/kernel"] == pytest.approx(0.25)
    assert made["backbone/encoder/block_1/mlp/up/kernel"] == pytest.approx(0.5)
    around = [value for name, value in made.items() if not name.startswith("backbone/")]
    assert around and around == pytest.approx([1.0] * len(around))


@pytest.mark.slow
def test_a_decay_of_one_changes_neither_updates_nor_state(parameters):
    gradients = gradients_of(parameters)
    plain = trained(section(), parameters, gradients, None)
    decayed = trained(section(), parameters, gradients, layer_decay.factors(1.0, parameters, 3))
    jax.tree.map(np.testing.assert_array_equal, plain, decayed)
    states = [jax.eval_shape(optim.make(section(), 3, factors).init, parameters) for factors in (None, plain)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
