"""What is done around a save: what must be on the disk before it, retries, the last save."""

import jax.numpy as jnp
import optax
import pytest
from toy import make_state

from vit_jax.checkpoint.manager import CheckpointManager, SaveFailed
from vit_jax.errors import UserError
from vit_jax.objectives.base import PrimaryMetric
from vit_jax.training import saving
from vit_jax.training.saving import Saver


class Manager(CheckpointManager):
    """A checkpoint manager on a disk that fails so many saves."""

    def __init__(self, calls, failures):
        self.calls, self.failures, self.saved, self.error = calls, failures, {}, None

    def save(self, arrays, metadata, metrics, higher_is_better):
        self.calls.append("save")
        self.failures -= 1
        if self.failures >= 0:
            self.error = SaveFailed("disk full")
        else:
            self.saved[int(arrays["step"])] = metrics

    def wait(self):
        error, self.error = self.error, None
        if error:
            raise error

    def is_saving(self):
        return False

    def has(self, step):
        return step in self.saved

    def steps(self):
        return sorted(self.saved)

    def best(self):
        return (1, 0.5)


@pytest.fixture
def state():
    return make_state({"w": jnp.ones(2)}, optax.sgd(0.1)).replace(step=jnp.asarray(7, jnp.int32))


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)

    def make(failures=0, higher_is_better=True):
        calls, lines = [], []
        manager = Manager(calls, failures)
        metric = PrimaryMetric("accuracy", higher_is_better)
        return Saver(manager, metric, 1, lines.append, lambda: calls.append("flush")), manager, calls, lines

    return make


@pytest.mark.parametrize("how", ["save", "finish", "rescue"])
def test_the_lines_of_metrics_are_on_the_disk_before_every_save(make, state, how):
    saver, manager, calls, _ = make(failures=1 if how == "finish" else 0)
    metadata = dict if how == "rescue" else {}
    getattr(saver, how)(state, metadata, *({},) * (how == "save"))
    assert calls == ["flush", "save"] * (len(calls) // 2) and manager.saved


def test_a_failed_save_is_tried_again_once_some_time_has_passed(make, state, monkeypatch):
    saver, manager, _, lines = make(failures=1)
    saver.save(state, {}, {"validation/accuracy": 0.5})
    assert not saver.needs_retry() and "will retry: disk full" in lines[0]
    later = saving.time.monotonic() + saving.RETRY_SECONDS + 1
    monkeypatch.setattr(saving.time, "monotonic", lambda: later)
    assert saver.needs_retry()
    saver.save(state, {}, {})
    assert not saver.needs_retry() and 7 in manager.saved


def test_a_last_save_that_keeps_failing_is_an_error(make, state):
    saver, manager, calls, _ = make(failures=100)
    with pytest.raises(UserError, match="the last checkpoint, of step 7, could not be saved: disk full"):
        saver.finish(state, {})
    assert calls.count("save") == saving.FINAL_ATTEMPTS and not manager.saved


@pytest.mark.parametrize("higher, better, worse", [(True, 0.6, 0.4), (False, -0.6, -0.4)])
def test_a_new_best_is_told_by_the_direction_of_the_metric(make, higher, better, worse):
    saver, *_ = make(higher_is_better=higher)
    assert saver.is_best({"validation/accuracy": better}) and not saver.is_best({"validation/accuracy": worse})
    assert not saver.is_best({}) and not saver.is_best({"validation/accuracy": float("nan")})
