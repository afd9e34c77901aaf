"""config.log.profile: which steps are recorded, and that recording does not change a run."""

import gzip
import json

import jax
import numpy as np
import pytest

from vit_jax.runtime import profiling


def test_chunks_end_where_the_span_starts_and_ends():
    assert profiling.boundaries(None) == ()
    assert profiling.boundaries((4, 9)) == (4, 9)


@pytest.mark.parametrize(
    ("start", "ends", "recorded"),
    [
        (0, (4, 7, 9, 20), [("wait", 4), ("start", 4), ("wait", 9), ("stop", 9)]),
        (6, (9, 20), [("wait", None), ("start", 6), ("wait", 9), ("stop", 9)]),  # resumed within the span
        (0, (4, 12), [("wait", 4), ("start", 4), ("wait", 12), ("stop", 12)]),  # a chunk that is too long
        (9, (12, 20), []),
    ],
)
def test_only_the_steps_of_the_span_are_recorded(monkeypatch, tmp_path, start, ends, recorded):
    seen, step = [], start
    monkeypatch.setattr(jax, "block_until_ready", lambda outputs: seen.append(("wait", outputs)))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: seen.append(("start", step, directory)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(("stop", step)))
    profiler = profiling.Profiler((4, 9), tmp_path)
    for end in ends:
        profiler.before(step)
        step = end
        profiler.after(step, outputs=end)
    assert [event[:2] for event in seen] == recorded
    assert all(event[2] == tmp_path / "profile" for event in seen if event[0] == "start")


def test_without_a_span_nothing_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: pytest.fail("a trace was started"))
    profiler = profiling.Profiler(None, tmp_path)
    for step in range(3):
        profiler.before(step)
        profiler.after(step + 1, None)


@pytest.mark.slow
def test_recording_an_update_does_not_change_its_results(toy, make_config, tmp_path):
    plain = toy(make_config())
    expected, _ = plain.run(plain.start(), 3)
    state, step, profiler = plain.start(), 0, profiling.Profiler((1, 3), tmp_path)
    for count in (1, 2):
        profiler.before(step)
        outputs = plain.update(state, plain.feed(step, count), np.int32(count), plain.seed)
        state, step = outputs[0], step + count
        profiler.after(step, outputs)
    jax.tree.map(np.testing.assert_array_equal, state.parameters, expected.parameters)
    (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event["args"]["hlo_module"] for event in events if "hlo_op" in event.get("args", {})} == {"jit_update"}
