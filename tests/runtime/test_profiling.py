"""config.log.profile: which steps are recorded, and that a run is the same with it."""

import gzip
import json

import jax
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.runtime import profiling


def test_a_span_is_two_steps():
    assert profiling.span(None) is None
    assert profiling.span("0:1") == (0, 1)
    assert profiling.span("100:110") == (100, 110)


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:5", "6:5", "-1:5", "a:b", "1:2:3", "1.5:2"])
def test_another_text_is_refused(text):
    with pytest.raises(UserError) as caught:
        profiling.span(text)
    assert f"config.log.profile is {text!r}" in str(caught.value)
    assert "100:110" in str(caught.value)


def test_dispatches_end_where_the_profile_begins_and_ends():
    assert profiling.cuts(None, 3) == []
    assert [profiling.cuts("4:9", step) for step in (0, 3, 4, 8, 9, 20)] == [[4, 9], [4, 9], [9], [9], [], []]


@pytest.mark.parametrize(
    ("begin", "ends", "recorded"),
    [
        (0, (4, 7, 9, 20), [("start", 4), ("stop", 9)]),
        (6, (9, 20), [("start", 6), ("stop", 9)]),  # a run that went on in between
        (0, (4, 12), [("start", 4), ("stop", 12)]),  # a dispatch that is longer
        (9, (12, 20), []),
    ],
)
def test_the_steps_of_the_span_are_recorded_and_no_others(monkeypatch, tmp_path, begin, ends, recorded):
    seen, now = [], begin
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(("start", now, folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(("stop", now)))

    def update(state, feed, count):
        nonlocal now
        now += int(count)
        return state + int(count), {}

    run, state, step = None, begin, begin
    run = profiling.profiled(update, "4:9", tmp_path, lambda: step)
    for end in ends:
        state, _ = run(state, None, np.int32(end - step))
        step = end
    assert state == ends[-1]
    assert [event[:2] for event in seen] == recorded
    assert all(event[2] == tmp_path / "profile" for event in seen if event[0] == "start")


def test_nothing_is_between_without_a_span(tmp_path):
    assert profiling.profiled(max, None, tmp_path, lambda: 0) is max


@pytest.mark.slow
def test_a_real_update_is_recorded_and_stays_what_it_is(toy, make_config, tmp_path):
    plain = toy(make_config())
    state, _ = plain.run(plain.start(), 3)
    other, step = plain.start(), 0
    run = profiling.profiled(plain.update, "1:3", tmp_path, lambda: step)
    for count in (1, 2):
        other, _ = run(other, plain.feed(step, count), np.int32(count))
        step += count
    jax.tree.map(np.testing.assert_array_equal, other.parameters, state.parameters)
    (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event["args"]["hlo_module"] for event in events if "hlo_op" in event.get("args", {})} == {"jit_update"}
