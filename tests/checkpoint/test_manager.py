"""The checkpoint manager: save, restore, rank, keep."""

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

from vit_jax import checkpoints as command
from vit_jax.checkpoint import integrity, orbax_io, orbax_logging
from vit_jax.checkpoint.manager import CheckpointManager, SaveFailed, ranking_score
from vit_jax.errors import UserError

ACCURACY, LOSS = "validation/accuracy", "validation/loss"
# VIT_JAX_TEST_THOROUGH=1 runs all repetitions.
THOROUGH = bool(os.environ.get("VIT_JAX_TEST_THOROUGH"))


@pytest.fixture(scope="module")
def trained(toy, make_config):
    """A run with every kind of array that a state can have, and its state after three steps."""
    run = toy(make_config(optimizer={"average_decay": 0.9}, model={"dropout": 0.1}), devices=2)
    return run, run.run(run.start(), 3)[0]


def abstract(arrays):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), arrays)


def test_arrays_are_restored_bitwise_with_their_metadata(trained, tmp_path):
    arrays = trained[1].to_arrays()
    with CheckpointManager(tmp_path) as manager:
        manager.save(arrays, {"config": {"train": {"seed": 3}}, "seconds": 1.5})
    with CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.steps() == [3]
        assert manager.metadata() == {"config": {"train": {"seed": 3}}, "seconds": 1.5}
        restored = manager.restore(abstract(arrays))
    assert set(restored) == {
        "step",
        "shift",
        "streak",
        "updates",
        "parameters",
        "optimizer",
        "averaged",
        "metrics",
    }
    chex.assert_trees_all_equal(arrays, restored)
    chex.assert_trees_all_equal_dtypes(arrays, restored)
    pairs = zip(jax.tree.leaves(arrays), jax.tree.leaves(restored), strict=True)
    assert all(a.sharding == b.sharding for a, b in pairs)


def test_training_during_a_save_does_not_change_it(trained, tmp_path):
    run, state = trained
    kept = jax.device_get(state.to_arrays())
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    with CheckpointManager(tmp_path) as manager:
        manager.save(state.to_arrays(), {})
        for _ in range(3):
            state, _ = run.run(state, 2)  # donates the buffers that were saved
        manager.wait()
        restored = manager.restore(abstract(state.to_arrays()))
    chex.assert_trees_all_equal(kept, jax.device_get(restored))


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([0.5, 0.9, 0.6, 0.7, 0.2], [2, 4, 5], 2),
        ([0.5, 0.6, 0.7, 0.8, 0.9], [4, 5], 5),
        ([None, 0.6, None, None, None], [2, 4, 5], 2),
        ([0.5, float("nan"), 0.3, float("nan"), float("nan")], [1, 4, 5], 1),
        ([None] * 5, [4, 5], None),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, scores, kept, best):
    with CheckpointManager(tmp_path, keep=2, keep_best=1) as manager:
        for step, score in enumerate(scores, 1):
            manager.save(tiny(step), {}, None if score is None else {ACCURACY: score})
    with CheckpointManager(tmp_path, keep=2, keep_best=1) as manager:
        assert manager.steps() == kept
        assert manager.best() == (best and (best, scores[best - 1]))
        if best is None:
            with pytest.raises(UserError, match="has no evaluated checkpoint"):
                manager.find("best")
        else:
            assert manager.find("best") == best


@pytest.mark.parametrize(
    ("metrics", "higher_is_better", "score"),
    [
        ({"validation/error_rate": 0.25}, False, -0.25),
        ({"validation/loss": 3.0}, True, 3.0),
        # Older checkpoints do not say; then a loss is better when it is lower.
        ({ACCURACY: 0.5}, None, 0.5),
        ({LOSS: 3.0}, None, -3.0),
        ({}, None, None),
        ({}, True, None),
        ({ACCURACY: math.nan}, True, None),
        ({LOSS: math.inf}, False, None),
        ({LOSS: -math.inf}, False, None),
    ],
)
def test_the_ranking_score(metrics, higher_is_better, score):
    assert ranking_score(metrics, higher_is_better) == score


def test_a_metric_where_lower_is_better(tmp_path, capsys):
    with CheckpointManager(tmp_path, keep=1, keep_best=1) as manager:
        for step, rate in enumerate((0.5, 0.2, math.nan, 0.4), 1):
            manager.save(tiny(step), {}, {"validation/error_rate": rate}, higher_is_better=False)
    with CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.steps() == [2, 4] and manager.best() == (2, -0.2)
        assert manager.content(2)["higher_is_better"] is False
    assert command.main(["list", str(tmp_path)]) == 0
    assert "error_rate 0.2000  best" in capsys.readouterr().out


def test_checkpoints_of_version_0_1_are_ranked_by_the_name_of_their_metric(tmp_path):
    """Their sealed content has no `higher_is_better`."""
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        arrays = jax.device_get(tiny(step))
        content = {"metadata": {}, "metrics": {LOSS: loss}, "digests": integrity.digests(arrays)}
        orbax_io.write(tmp_path / "checkpoints" / str(step), arrays, integrity.seal(content))
    with CheckpointManager(tmp_path) as manager:
        assert manager.best() == (2, -1.0)
        assert int(manager.restore(abstract(tiny(0)), manager.find("best"))["step"]) == 2


def test_a_save_that_fails_is_reported_in_one_line(trained, tmp_path, capfd, caplog):
    """A limit on the size of files makes the system refuse to write."""
    orbax_logging.hide_background_errors()  # as `vit_jax.commands.finish` does
    arrays = trained[1].to_arrays()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointManager(tmp_path) as manager:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            manager.save(arrays, {})
            with pytest.raises(SaveFailed) as failed:
                manager.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(failed.value) == f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}"
        # Orbax's threads may create their temporary directory again after it was removed; the next save replaces it.
        left = [path.name for path in manager.directory.iterdir() if "orbax-checkpoint-tmp" not in path.name]
        assert manager.steps() == [] and left == []
        manager.save(arrays, {})
        manager.wait()
        chex.assert_trees_all_equal(arrays, manager.restore(abstract(arrays)))
    gc.collect()  # tasks whose exceptions were never retrieved report them when they are collected
    assert "".join(capfd.readouterr()) + caplog.text == ""


def test_a_missing_step_is_refused(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UserError, match="available steps: none"):
            manager.restore(abstract(tiny(0)))
        manager.save(tiny(3), {})
        manager.wait()
        with pytest.raises(UserError, match="has no checkpoint of step 7\n  available steps: 3"):
            manager.restore(abstract(tiny(0)), 7)


def tiny(step, size=2):
    """The arrays of a very small checkpoint."""
    counters = {name: jnp.asarray(value, jnp.int32) for name, value in (("step", step), ("shift", 0), ("streak", 0))}
    return {**counters, "parameters": {"a": jnp.full(size, step, jnp.float32)}, "optimizer": (), "metrics": {}}


scores = some.one_of(some.none(), some.just(float("nan")), some.integers(0, 3).map(lambda number: number / 3))


@pytest.mark.slow
@settings(max_examples=500 if THOROUGH else 60, deadline=None)
@given(measured=some.lists(scores, min_size=1, max_size=8), keep=some.integers(1, 3), keep_best=some.integers(0, 2))
def test_for_any_scores_the_newest_and_the_best_are_kept(measured, keep, keep_best):
    with tempfile.TemporaryDirectory() as workdir:
        for step, score in enumerate(measured, 1):
            with CheckpointManager(Path(workdir), keep, keep_best) as manager:
                manager.save(tiny(step), {}, None if score is None else {ACCURACY: score})
                manager.wait()
                existing = manager.steps()
            so_far = measured[:step]
            assert set(existing) >= set(range(1, step + 1)[-keep:])
            ranked = [(value, at) for at, value in enumerate(so_far, 1) if value is not None and not math.isnan(value)]
            # A checkpoint that was removed earlier had a lower rank then, and still has.
            assert set(existing) >= {at for _, at in sorted(ranked)[max(0, len(ranked) - keep_best) :]}
            assert len(existing) <= keep + keep_best


@pytest.mark.slow
def test_three_hundred_saves_and_restores_leak_neither_memory_nor_files(tmp_path):
    process, sizes, files = psutil.Process(), [], []
    like = abstract(tiny(0, size=250_000))
    with CheckpointManager(tmp_path) as manager:
        for step in range(300):
            manager.save(tiny(step, size=250_000), {})
            manager.wait()
            np.testing.assert_array_equal(manager.restore(like)["parameters"]["a"], float(step))
            sizes.append(process.memory_info().rss)
            files.append(process.num_fds())
    assert np.median(sizes[-50:]) < 1.05 * np.median(sizes[50:100])
    assert max(files[-50:]) <= max(files[50:100]) + 2
