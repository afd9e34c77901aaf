"""config.train.batch_size=auto: the largest batch that fits, and that a run keeps it."""

import json

import jax
import pytest

from vit_jax import config as options
from vit_jax import main, sharding
from vit_jax.errors import UserError
from vit_jax.training import auto_batch_size, setup

TINY = {"variant": "Ti/4", "width": 16, "depth": 1, "heads": 2, "mlp_width": 16}


def auto(**train):
    config = options.load("configs/digits.py")
    config.model.update(TINY)
    config.train.update(batch_size="auto", epochs=None, steps=2, **train)
    config.mesh.devices = 1
    options.check(config)
    return config


def test_the_ladder_has_two_rungs_an_octave():
    assert auto_batch_size.ladder(1, 20) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert auto_batch_size.ladder(6, 6 * 13) == [6, 12, 18, 24, 36, 48, 72]


@pytest.mark.parametrize("limit", range(70))
@pytest.mark.parametrize("guess", [0, 3, 16, 1000])
def test_the_largest_that_fits_is_found_from_any_start(limit, guess):
    sizes, asked = auto_batch_size.ladder(1, 50), []

    def fits(size):
        asked.append(size)
        return size <= limit

    found = auto_batch_size.largest(fits, sizes, lambda size: size <= guess)
    assert found == max((size for size in sizes if size <= limit), default=None)
    assert len(set(asked)) == len(asked)  # each costs a compilation


def test_a_number_is_left_alone(tmp_path):
    config = options.load("configs/digits.py")
    assert auto_batch_size.resolve(config, tmp_path, sharding.make_mesh(1)) is config


def test_a_cpu_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--config=configs/digits.py", "--config.train.batch_size=auto"]) == 2
    error = capsys.readouterr().err
    assert error == "error: config.train.batch_size is 'auto', on a CPU\n  allowed there: a whole number\n"
    assert list(tmp_path.rglob("config.json")) == []


def test_a_run_keeps_the_number_that_it_began_with(tmp_path):
    begun = auto().to_dict()
    begun["train"]["batch_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(begun))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    asked = auto()
    assert auto_batch_size.resolve(asked, tmp_path, sharding.make_mesh(1)).train.batch_size == 48
    assert asked.train.batch_size == "auto"  # what it was given stays what it was


def test_every_batch_is_shared_evenly():
    config = auto(accumulation=3)
    config.augment.repeats = 4
    mesh = sharding.make_mesh(2)
    assert auto_batch_size.unit(config, mesh) == 12


@pytest.mark.slow
def test_what_is_found_fits_and_the_next_does_not(tmp_path, monkeypatch):
    mesh = sharding.make_mesh(1)
    monkeypatch.setattr(auto_batch_size, "limit", lambda _: 3 * 2**20)
    config = auto_batch_size.resolve(auto(), tmp_path, mesh)
    found, room = config.train.batch_size, auto_batch_size.SHARE * 3 * 2**20
    options.check(config)
    run = setup.build(config, mesh)
    feeds = {role: run.feeds(role) for role in run.sources}
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(feeds["test"].resident))
    ladder = auto_batch_size.ladder(1, 10**6)
    planned = lambda size: auto_batch_size.planned_bytes(run, feeds["train"], size) + others  # noqa: E731
    assert planned(found) <= room < planned(ladder[ladder.index(found) + 1])


def test_too_little_for_one_image_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(auto_batch_size, "limit", lambda _: 1000)
    monkeypatch.setattr(auto_batch_size, "planned_bytes", lambda *_: 10**6)
    with pytest.raises(UserError, match="not even 1 images fit"):
        auto_batch_size.resolve(auto(), tmp_path, sharding.make_mesh(1))
