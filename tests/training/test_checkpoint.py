import chex
import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.training.checkpoint import METRIC, Checkpoints


@pytest.fixture(scope="module")
def trained(toy, make_config):
    """A run with all that a state can hold, after some steps."""
    run = toy(make_config(optimizer={"average_decay": 0.9}, model={"dropout": 0.1}), devices=2)
    return run, run.run(run.start(), 3)[0]


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def test_a_state_comes_back_bitwise_with_its_metadata(trained, tmp_path):
    _, state = trained
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"config": {"train": {"seed": 3}}, "seconds": 1.5})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3]
        assert checkpoints.metadata() == {"config": {"train": {"seed": 3}}, "seconds": 1.5}
        restored = checkpoints.restore(abstract(state))
    chex.assert_trees_all_equal(state, restored)
    chex.assert_trees_all_equal_dtypes(state, restored)
    assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True))


def test_what_is_trained_on_during_a_save_does_not_reach_it(trained, tmp_path):
    run, state = trained
    kept = jax.device_get(state)
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        for _ in range(3):
            state, _ = run.run(state, 2)  # donates the buffers that were saved
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state))
    chex.assert_trees_all_equal(kept, jax.device_get(restored))


@pytest.mark.parametrize(
    "scores, kept, best",
    [
        ([0.5, 0.9, 0.6, 0.7, 0.2], [2, 4, 5], 2),
        ([0.5, 0.6, 0.7, 0.8, 0.9], [4, 5], 5),
        ([None, 0.6, None, None, None], [2, 4, 5], 2),
        ([0.5, float("nan"), 0.3, float("nan"), float("nan")], [1, 4, 5], 1),
        ([None] * 5, [4, 5], None),
    ],
)
def test_the_newest_and_the_best_are_kept(trained, tmp_path, scores, kept, best):
    _, state = trained
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        for step, score in enumerate(scores, 1):
            checkpoints.save(state.replace(step=state.step * 0 + step), {}, None if score is None else {METRIC: score})
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        assert checkpoints.steps() == kept
        assert checkpoints.best() == (best and (best, scores[best - 1]))


def test_a_step_that_is_not_there_is_said(trained, tmp_path):
    _, state = trained
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="none"):
            checkpoints.restore(abstract(state))
        checkpoints.save(state, {})
        checkpoints.wait()
        with pytest.raises(UserError, match="step 7\n  there are: 3"):
            checkpoints.restore(abstract(state), 7)
