"""Checkpoints that were damaged on the disk: none is loaded without a word."""

import collections
import gc
import json
import os
import random
import shutil

import chex
import jax
import pytest

from vit_jax import checkpoints as command
from vit_jax.checkpoint import integrity
from vit_jax.checkpoint.manager import DAMAGED, Checkpoints
from vit_jax.errors import UserError

STEPS = (1, 2, 3)
# With VIT_JAX_TEST_THOROUGH=1 all of them; in CI a part, for its time.
THOROUGH = bool(os.environ.get("VIT_JAX_TEST_THOROUGH"))


@pytest.fixture(scope="module")
def saved(toy, make_config, tmp_path_factory):
    """A folder with three checkpoints, the states in them, and what a restore wants."""
    folder = tmp_path_factory.mktemp("saved")
    run = toy(make_config(optimizer={"average_decay": 0.9}))
    state, states = run.start(), {}
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in STEPS:
            state, _ = run.run(state, 1)
            states[step] = jax.device_get(state)
            checkpoints.save(state, {"config": {"train": {"seed": step}}, "seconds": 1.0 * step})
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    return folder, states, like


def flip(path, chance):
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def zero(path, chance):
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)


def truncate(path, chance):
    os.truncate(path, chance.randrange(path.stat().st_size))


def delete(path, chance):
    path.unlink()


def swap(path, chance):
    """With the same file of the checkpoint before, or, where names differ, with another of its own."""
    root = next(parent for parent in path.parents if parent.name == "3")
    other = root.parent / "2" / path.relative_to(root)
    if not other.is_file():
        other = chance.choice([file for file in root.rglob("*") if file.is_file() and file.stat().st_size])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGE = {"flip": flip, "zero": zero, "truncate": truncate, "delete": delete, "swap": swap}


def damage_and_restore(saved, folder, kind, seed):
    """What becomes of one random damage to the newest checkpoint: 'older', 'refused' or, where it was harmless, 'same'.

    Anything but the very state that was saved at some step fails.
    """
    source, states, like = saved
    shutil.copytree(source, folder)
    chance = random.Random(seed)
    files = sorted(path for path in (folder / "checkpoints" / "3").rglob("*") if path.is_file() and path.stat().st_size)
    DAMAGE[kind](chance.choice(files), chance)
    told = []
    try:
        with Checkpoints(folder, keep=3, say=told.append) as checkpoints:
            state = jax.device_get(checkpoints.restore_newest(like))
    except UserError as error:
        assert "is whole" in str(error)
        return "refused"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    step = int(state.step)
    chex.assert_trees_all_equal(state, states[step])
    assert bool(told) == (step < 3)
    return "older" if told else "same"


@pytest.mark.parametrize("kind", DAMAGE)
def test_no_damage_is_loaded_silently(saved, tmp_path, kind):
    """Up to two of three meet bytes that no restore needs, by the storage's choice: forty in a row do not."""
    outcomes = (damage_and_restore(saved, tmp_path / "copy", kind, seed) for seed in range(40))
    assert any(outcome != "same" for outcome in outcomes)


@pytest.mark.slow
def test_of_many_damages_none_is_loaded_silently(saved, tmp_path):
    outcomes = collections.Counter()
    count = 2000 if THOROUGH else 100
    for seed in range(count):
        kind = list(DAMAGE)[seed % len(DAMAGE)]
        outcomes[kind, damage_and_restore(saved, tmp_path / "copy", kind, 1000 + seed)] += 1
    print(dict(outcomes))
    assert sum(outcomes.values()) == count


def test_a_damaged_checkpoint_is_named_set_aside_and_told_of(saved, tmp_path):
    source, _, like = saved
    shutil.copytree(source, tmp_path / "run")
    zero(tmp_path / "run" / "checkpoints" / "3" / "state" / "manifest.ocdbt", random.Random(0))
    told = []
    with Checkpoints(tmp_path / "run", say=told.append) as checkpoints:
        state = checkpoints.restore_newest(like)
        assert checkpoints.steps() == [1, 2]
    assert int(state.step) == 2
    assert (tmp_path / "run" / DAMAGED / "3").is_dir()
    assert len(told) == 1 and "checkpoints/3 is damaged: " in told[0] and "set aside in " in told[0]


def test_of_a_damaged_checkpoint_no_more_is_printed_than_that_line(saved, tmp_path, capfd, caplog):
    source, _, like = saved
    shutil.copytree(source, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "3" / "state").rglob("d/*"):
        file.write_bytes(b"x" * file.stat().st_size)
    with Checkpoints(tmp_path / "run", say=lambda line: None) as checkpoints:
        assert int(checkpoints.restore_newest(like).step) == 2
    gc.collect()  # tasks whose errors nobody took speak when they go
    assert "".join(capfd.readouterr()) + caplog.text == ""


def test_where_all_are_damaged_nothing_is_started_anew(saved, tmp_path):
    source, _, like = saved
    shutil.copytree(source, tmp_path / "run")
    for step in STEPS:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step) / "state")
    with (
        Checkpoints(tmp_path / "run", say=lambda _: None) as checkpoints,
        pytest.raises(UserError, match=r"no checkpoint in .* is whole; the damaged ones are in"),
    ):
        checkpoints.restore_newest(like)
    assert sorted(path.name for path in (tmp_path / "run" / DAMAGED).iterdir()) == ["1", "2", "3"]
    with (  # nor at the second attempt, as a scheduler makes it
        Checkpoints(tmp_path / "run", say=lambda _: None) as checkpoints,
        pytest.raises(UserError, match="is whole; the damaged ones are in"),
    ):
        checkpoints.restore_newest(like)


def test_metadata_are_sealed():
    content = integrity.seal({"metadata": {"seconds": 0.1 + 0.2}, "metrics": {}})
    assert integrity.is_sealed(json.loads(json.dumps(content)))
    content["metadata"]["seconds"] = 0.3
    assert not integrity.is_sealed(content)


def test_a_state_of_another_shape_is_refused_and_not_taken_for_damage(saved, tmp_path):
    source, _, like = saved
    wider = like.replace(
        parameters={**like.parameters, "class_token": jax.ShapeDtypeStruct((1, 1, 17), "float32", sharding=None)}
    )
    with (
        Checkpoints(source, keep=3) as checkpoints,
        pytest.raises(UserError, match=r"parameters/class_token: float32\[1,1,16\] -> float32\[1,1,17\]"),
    ):
        checkpoints.restore_newest(wider)
    assert not (source / DAMAGED).exists()


def test_the_command_lists_verifies_compares_and_restores(saved, tmp_path, capsys):
    source, _, _ = saved
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    assert command.main(["list", str(folder)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "1", "2", "3"]
    assert command.main(["verify", str(folder)]) == 0
    assert "3 of 3 are whole" in capsys.readouterr().out
    assert command.main(["diff", str(folder), str(folder)]) == 0
    assert command.main(["diff", str(folder), str(folder), "--steps=2,3"]) == 1
    shown = capsys.readouterr().out
    assert (
        "config.train.seed: 2 -> 3" in shown and "parameters/head/logits/kernel: float32[16,4], other numbers" in shown
    )
    zero(folder / "checkpoints" / "2" / "state" / "manifest.ocdbt", random.Random(1))
    assert command.main(["verify", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "step 2: " in shown and "is damaged" in shown and "2 of 3 are whole" in shown
    assert (folder / "checkpoints" / "2").is_dir()  # looking changes nothing
    assert command.main(["list", str(tmp_path)]) == 2
