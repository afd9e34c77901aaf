"""Optimizers, schedules and clipping compared with their formulas in NumPy, optax and the published code."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import config as options
from vit_jax import optim
from vit_jax.models.vit import VisionTransformer

GOLDENS = Path(__file__).parents[1] / "goldens"
PARAMETERS = {"layer": {"kernel": np.full((2, 3), 2.0, np.float32), "bias": np.full(3, 2.0, np.float32)}}
GRADIENTS = {"layer": {"kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}


def section(**values):
    config = options.default()
    config.optimizer.update(values)
    return config.optimizer


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_equal_their_formulas(name):
    steps, warmup, peak, final = 100, 20, 0.5, 0.1
    rate = optim.schedule(
        section(schedule=name, learning_rate=peak, warmup_steps=warmup, final_learning_rate=final), steps
    )
    for step in (0, 1, 10, 19, 20, 21, 60, 99, 100, 150):
        part = min((step - warmup) / (steps - warmup), 1)
        decayed = {
            "cosine": final + (peak - final) * 0.5 * (1 + np.cos(np.pi * part)),
            "linear": peak + (final - peak) * part,
            "constant": peak,
        }[name]
        expected = peak * step / warmup if step < warmup else decayed
        assert float(rate(step)) == pytest.approx(expected, abs=1e-6), step


@pytest.mark.parametrize("name, final", [("cosine", 0.0), ("linear", 1e-5)])
def test_schedules_equal_those_of_the_published_code_after_warm_up(name, final):
    golden = np.load(GOLDENS / "schedule.npz")
    total, warmup, base = int(golden["total"]), int(golden["warmup"]), float(golden["base"])
    rate = optim.schedule(
        section(schedule=name, learning_rate=base, warmup_steps=warmup, final_learning_rate=final), total
    )
    steps = golden["steps"]
    made = np.array([float(rate(int(step))) for step in steps])
    np.testing.assert_allclose(made, golden[name], atol=1e-6)


def clipped(limit):
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(GRADIENTS)))
    return jax.tree.map(lambda leaf: leaf * min(1, limit / norm), GRADIENTS)


def run(section, steps=3):
    chain = optim.make(section, steps)
    parameters = jax.tree.map(jnp.asarray, PARAMETERS)
    state = chain.init(parameters)
    for _ in range(steps):
        updates, state = chain.update(GRADIENTS, state, parameters)
        parameters = jax.tree.map(jnp.add, parameters, updates)
    return parameters


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_equals_its_formula(decoupled):
    values = {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.3, "gradient_clip": 0.5, "beta2": 0.99}
    made = run(section(name="adamw" if decoupled else "adam", **values))
    for name, decay in (("kernel", 0.3), ("bias", 0.0)):
        value, mean, square = PARAMETERS["layer"][name].astype(np.float64), 0.0, 0.0
        for step in (1, 2, 3):
            gradient = clipped(0.5)["layer"][name] + (0 if decoupled else decay * value)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.99 * square + 0.01 * gradient**2
            move = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
            value = value - 0.1 * (move + (decay * value if decoupled else 0))
        np.testing.assert_allclose(made["layer"][name], value, rtol=1e-5, err_msg=name)


def test_sgd_with_momentum_equals_its_formula():
    made = run(
        section(name="sgd", learning_rate=0.1, schedule="constant", momentum=0.9, gradient_clip=0.5, weight_decay=0.2)
    )
    for name, decay in (("kernel", 0.2), ("bias", 0.0)):
        value, velocity = PARAMETERS["layer"][name].astype(np.float64), 0.0
        for _ in range(3):
            velocity = 0.9 * velocity + clipped(0.5)["layer"][name] + decay * value
            value = value - 0.1 * velocity
        np.testing.assert_allclose(made["layer"][name], value, rtol=1e-5, err_msg=name)


def test_only_kernels_decay():
    model = VisionTransformer(classes=3, patch_size=2, width=8, depth=1, heads=2, mlp_width=8)
    parameters = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))))["params"]
    decays = jax.tree_util.tree_leaves_with_path(optim.decay_mask(parameters))
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, decays_here in decays if decays_here}
    block = "encoder/block_0"
    assert names == {
        "embedding/projection/kernel",
        f"{block}/attention/qkv/kernel",
        f"{block}/attention/out/kernel",
        f"{block}/mlp/up/kernel",
        f"{block}/mlp/down/kernel",
        "head/logits/kernel",
    }
    chex.assert_trees_all_equal_structs(optim.decay_mask(parameters), parameters)


def fine_tuning_section():
    return options.load("configs/finetune.py:cifar10").optimizer


def test_the_fine_tuning_schedule_equals_that_of_the_published_code():
    golden, section = np.load(GOLDENS / "schedule.npz"), fine_tuning_section()
    section.update(learning_rate=float(golden["base"]), warmup_steps=int(golden["warmup"]))
    rate = optim.schedule(section, int(golden["total"]))
    made = np.array([float(rate(int(step))) for step in golden["steps"]])
    np.testing.assert_allclose(made, golden["cosine"], atol=1e-6)


def test_the_fine_tuning_schedule_is_that_of_table_4():
    """10,000 steps: warm-up over 500, then a cosine to 0 (arXiv 2010.11929, table 4), in float64."""
    config = options.load("configs/finetune.py:cifar100")
    steps, warmup, peak = config.train.steps, 500, config.optimizer.learning_rate
    assert (steps, config.train.batch_size, config.data.image_size) == (10_000, 512, 384)
    rate = optim.schedule(config.optimizer, steps)
    for step in (0, 1, 250, 499, 500, 501, 5250, 9999, 10_000):
        cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))
        assert float(rate(step)) == pytest.approx(peak * min(step / warmup, cosine), abs=1e-6), step


def test_fine_tuning_updates_equal_numpy():
    """SGD with momentum, gradients clipped to norm 1, no weight decay: six steps, of which some are not clipped."""
    steps, section = 6, fine_tuning_section()
    section.warmup_steps = 2
    chain, generator = optim.make(section, steps), np.random.default_rng(0)
    value = jax.tree.map(lambda leaf: leaf.astype(np.float64), PARAMETERS)
    velocity, made = jax.tree.map(np.zeros_like, value), jax.tree.map(jnp.asarray, PARAMETERS)
    state, clipped = chain.init(made), 0
    for step in range(steps):
        size = 10.0 ** generator.uniform(-1, 1)
        gradient = jax.tree.map(lambda leaf, size=size: size * generator.normal(size=leaf.shape) / 3, PARAMETERS)
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
        clipped += norm > 1
        rate = 0.01 * min(step / 2, 0.5 * (1 + np.cos(np.pi * (step - 2) / (steps - 2))))
        velocity = jax.tree.map(lambda v, g, norm=norm: 0.9 * v + g / max(norm, 1), velocity, gradient)
        value = jax.tree.map(lambda p, v, rate=rate: p - rate * v, value, velocity)
        small = jax.tree.map(lambda leaf: leaf.astype(np.float32), gradient)
        updates, state = chain.update(small, state, made)
        made = jax.tree.map(jnp.add, made, updates)
    assert 0 < clipped < steps
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), made, value)


def test_global_norm_and_clipping_equal_optax():
    draw = np.random.default_rng(0)
    shapes = [(3,), (200, 100), (7,), (2, 2), (17_000,)]  # below and above JOINED_SIZE
    tree = {str(k): jnp.asarray(draw.normal(size=shape), jnp.float32) for k, shape in enumerate(shapes)} | {"no": None}
    squares = sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(tree))
    np.testing.assert_allclose(optim.global_norm(tree), np.sqrt(squares), rtol=1e-6)
    for max_norm in (1.0, 1e6):
        ours, theirs = optim.clip_by_global_norm(max_norm), optax.clip_by_global_norm(max_norm)
        assert ours.init(tree) == theirs.init(tree)
        found, expected = (clip.update(tree, clip.init(tree))[0] for clip in (ours, theirs))
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), found, expected)


def test_the_learning_rate_is_computed_on_the_host(monkeypatch):
    seen = []

    def schedule(count):
        seen.append(jax.config.jax_default_device.platform)
        return jnp.float32(0.25) * count

    assert optim.learning_rate(schedule, 2) == 0.5 and seen == ["cpu"]

    def no_cpu(backend=None):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", no_cpu)
    assert optim.learning_rate(lambda count: jnp.float32(0.25) * count, 2) == 0.5


# Array names of the optimizer state in checkpoints, for one parameter 'layer/kernel': they must never change.
STATE_NAMES = {
    "adamw": ["1/count", "1/mu/layer/kernel", "1/nu/layer/kernel", "3/count"],
    "adam": ["2/count", "2/mu/layer/kernel", "2/nu/layer/kernel", "3/count"],
    "sgd": ["2/trace/layer/kernel", "3/count"],
}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("gradient_clip", [None, 1.0])
def test_the_names_in_the_optimizer_state_do_not_change(name, gradient_clip):
    state = optim.make(section(name=name, gradient_clip=gradient_clip), 10).init({"layer": {"kernel": jnp.ones(2)}})
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths] == STATE_NAMES[name]


def test_every_choice_of_the_config_is_registered():
    choices = options.OPTIONS["optimizer"]
    assert set(choices["name"].choices) == set(optim.OPTIMIZERS) == set(STATE_NAMES)
    assert set(choices["schedule"].choices) == set(optim.SCHEDULES)


def test_an_optimizer_with_two_parameter_groups_can_be_registered(monkeypatch):
    """Momentum without Adam for kernels, Adam for the rest, as Muon has it."""

    def grouped(section):
        groups = {"matrix": optax.trace(section.momentum), "other": optax.scale_by_adam()}
        return [
            optax.partition(groups, lambda tree: jax.tree.map(lambda leaf: ["other", "matrix"][leaf.ndim > 1], tree))
        ]

    monkeypatch.setitem(optim.OPTIMIZERS, "grouped", grouped)
    values = section(name="grouped", learning_rate=0.1, schedule="constant", weight_decay=0.0)
    updated = run(values, steps=2)["layer"]
    np.testing.assert_allclose(updated["kernel"], 2.0 - 0.1 * (1 + 1.9) * GRADIENTS["layer"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(updated["bias"], 2.0 - 0.1 * 2, rtol=1e-5)
    assert int(optim.legacy_update_count(states_after(optim.make(values, 2), 2))) == 2


def states_after(optimizer, updates):
    state = optimizer.init(PARAMETERS)
    for _ in range(updates):
        _, state = optimizer.update(GRADIENTS, state, PARAMETERS)
    return state


def test_the_legacy_update_count_works_for_any_number_of_schedules():
    rate = optax.constant_schedule(0.1)
    two = optax.partition(
        {"kernel": optax.sgd(rate), "bias": optax.adam(rate)}, {"layer": {"kernel": "kernel", "bias": "bias"}}
    )
    for optimizer, expected in ((optax.adam(rate), 3), (two, 3), (optax.sgd(0.1), 0)):
        state = states_after(optimizer, 3)
        assert int(optim.legacy_update_count(state)) == int(jax.jit(optim.legacy_update_count)(state)) == expected
