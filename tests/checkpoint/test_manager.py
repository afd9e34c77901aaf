import errno
import gc
import math
import os
import resource
import tempfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from vit_jax.checkpoint.manager import METRIC, Checkpoints, SaveFailed
from vit_jax.errors import UserError
from vit_jax.training.state import TrainState

# With VIT_JAX_TEST_THOROUGH=1 all of them; in CI a part, for its time.
THOROUGH = bool(os.environ.get("VIT_JAX_TEST_THOROUGH"))


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


def test_a_save_that_the_disk_refuses_is_told_of_in_a_line(trained, tmp_path, capfd, caplog):
    """A limit on the size of files is a disk that refuses, by the system itself."""
    _, state = trained
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            checkpoints.save(state, {})
            with pytest.raises(SaveFailed) as failed:
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(failed.value) == f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}"
        assert checkpoints.steps() == [] and list(checkpoints.folder.iterdir()) == []
        checkpoints.save(state, {})
        checkpoints.wait()
        chex.assert_trees_all_equal(state, checkpoints.restore(abstract(state)))
    gc.collect()  # tasks whose errors nobody took speak when they go
    assert "".join(capfd.readouterr()) + caplog.text == ""


def test_a_step_that_is_not_there_is_said(trained, tmp_path):
    _, state = trained
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="none"):
            checkpoints.restore(abstract(state))
        checkpoints.save(state, {})
        checkpoints.wait()
        with pytest.raises(UserError, match="step 7\n  there are: 3"):
            checkpoints.restore(abstract(state), 7)


def tiny(step, size=2):
    """A state of almost nothing."""
    counts = [jnp.asarray(value, jnp.int32) for value in (step, 0, 0)]
    return TrainState(
        *counts, parameters={"a": jnp.full(size, step, jnp.float32)}, optimizer=(), averaged=None, metrics={}
    )


scores = some.one_of(some.none(), some.just(float("nan")), some.integers(0, 3).map(lambda number: number / 3))


@pytest.mark.slow
@settings(max_examples=500 if THOROUGH else 60, deadline=None)
@given(measured=some.lists(scores, min_size=1, max_size=8), keep=some.integers(1, 3), keep_best=some.integers(0, 2))
def test_whatever_is_measured_the_newest_and_the_best_are_there(measured, keep, keep_best):
    with tempfile.TemporaryDirectory() as folder:
        for step, score in enumerate(measured, 1):
            with Checkpoints(Path(folder), keep, keep_best) as checkpoints:
                checkpoints.save(tiny(step), {}, None if score is None else {METRIC: score})
                checkpoints.wait()
                there = checkpoints.steps()
            so_far = measured[:step]
            assert set(there) >= set(range(1, step + 1)[-keep:])
            ranked = [(value, at) for at, value in enumerate(so_far, 1) if value is not None and not math.isnan(value)]
            # What an earlier turn has dropped was beaten then, and is beaten still.
            assert set(there) >= {at for _, at in sorted(ranked)[max(0, len(ranked) - keep_best) :]}
            assert len(there) <= keep + keep_best


@pytest.mark.slow
def test_three_hundred_saves_and_restores_cost_neither_memory_nor_files(tmp_path):
    process, sizes, files = psutil.Process(), [], []
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tiny(0, size=250_000)
    )
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(300):
            checkpoints.save(tiny(step, size=250_000), {})
            checkpoints.wait()
            np.testing.assert_array_equal(checkpoints.restore(like).parameters["a"], float(step))
            sizes.append(process.memory_info().rss)
            files.append(process.num_fds())
    assert np.median(sizes[-50:]) < 1.05 * np.median(sizes[50:100])
    assert max(files[-50:]) <= max(files[50:100]) + 2
