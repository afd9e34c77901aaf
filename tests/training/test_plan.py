"""Chunks of training steps: where they end, and what is due after them."""

import itertools

import pytest
from helpers import tiny_config

from vit_jax.training import plan


def config_of(log=10, evaluate=0, save=0, per_dispatch=50, profile=None):
    return tiny_config(
        log={"every": log, "profile": profile},
        checkpoint={"every": save},
        train={"evaluate_every": evaluate, "steps_per_dispatch": per_dispatch},
    )


@pytest.mark.parametrize("start", [0, 1, 7, 60, 99])
@pytest.mark.parametrize("max_steps", [1, 3, 50])
def test_chunks_cover_every_step_once_and_end_at_every_boundary(start, max_steps):
    config = config_of(log=7, evaluate=20, save=15, per_dispatch=12, profile=(33, 41))
    found = list(plan.chunks(start, 100, plan.ChunkLength(max_steps, adaptive=False), config))
    assert [step for chunk in found for step in range(chunk.start, chunk.end)] == list(range(start, 100))
    assert all(chunk.count <= max_steps for chunk in found)
    boundaries = {step for step in range(start + 1, 100) if not all((step % 7, step % 20, step % 15, step % 12))}
    assert {chunk.end for chunk in found} >= boundaries | {step for step in (33, 41) if step > start} | {100}


def test_what_is_due_after_a_chunk():
    config = config_of(log=7, evaluate=20, save=15)
    assert {end: plan.chunk(0, end, 100, config)[2:] for end in (6, 7, 15, 20, 60, 100)} == {
        6: (False, False, False),
        7: (True, False, False),
        15: (False, False, True),
        20: (False, True, False),
        60: (False, True, True),
        100: (True, True, True),
    }
    assert not plan.chunk(0, 7, 100, config).waits and plan.chunk(0, 15, 100, config).waits


def test_without_intervals_everything_is_due_at_the_end_alone():
    config = config_of(log=1000)
    assert [plan.chunk(0, end, 100, config)[2:] for end in (50, 100)] == [(False, False, False), (True, True, True)]


def test_the_length_of_chunks_is_adapted_to_their_duration():
    length, found = plan.ChunkLength(50, adaptive=True), []
    for chunk in itertools.islice(plan.chunks(0, 10**6, length, config_of(log=10**6, per_dispatch=10**5)), 8):
        found.append(chunk.count)
        length.adapt(chunk.count, 0.02 * chunk.count)  # 20 steps take 0.4 s
    assert found == [1, 2, 4, 8, 16, 20, 20, 20]
    length.adapt(20, 40.0)
    assert length.steps == 1
    fixed = plan.ChunkLength(50, adaptive=False)
    fixed.adapt(1, 100.0)
    assert fixed.steps == 50


def test_the_test_split_is_evaluated_at_the_end_or_in_place_of_a_validation_split():
    assert plan.evaluated({"train": 0, "validation": 0, "test": 0}, at_end=False) == ["validation"]
    assert plan.evaluated({"train": 0, "validation": 0, "test": 0}, at_end=True) == ["validation", "test"]
    assert plan.evaluated({"train": 0, "test": 0}, at_end=False) == ["test"]
    assert plan.evaluated({"train": 0, "validation": 0}, at_end=True) == ["validation"]
