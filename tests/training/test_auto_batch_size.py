"""config.train.batch_size=auto: the largest batch that fits, and that a resumed run keeps it."""

import json

import jax
import pytest

from vit_jax import config as options
from vit_jax import main, sharding
from vit_jax.config.check import check_config
from vit_jax.errors import UserError
from vit_jax.runtime import memory
from vit_jax.training import auto_batch_size, setup

TINY = {"variant": "Ti/4", "width": 16, "depth": 1, "heads": 2, "mlp_width": 16}


def auto(**train):
    config = options.load("configs/digits.py")
    config.model.update(TINY)
    config.train.update(batch_size="auto", epochs=None, steps=2, **train)
    config.mesh.devices = 1
    check_config(config)
    return config


def test_there_are_two_candidates_per_power_of_two():
    assert auto_batch_size.candidate_sizes(1, 20) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert auto_batch_size.candidate_sizes(6, 6 * 13) == [6, 12, 18, 24, 36, 48, 72]


@pytest.mark.parametrize("limit", range(70))
@pytest.mark.parametrize("guess", [0, 3, 16, 1000])
def test_the_largest_that_fits_is_found_from_any_estimate(limit, guess):
    sizes, tried = auto_batch_size.candidate_sizes(1, 50), []

    def fits(size):
        tried.append(size)
        return size <= limit

    found = auto_batch_size.largest(fits, sizes, lambda size: size <= guess)
    assert found == max((size for size in sizes if size <= limit), default=None)
    assert len(set(tried)) == len(tried)  # each one is compiled


def test_a_number_is_not_changed(tmp_path):
    config = options.load("configs/digits.py")
    assert auto_batch_size.resolve(config, tmp_path, sharding.make_mesh(1)) is config


def test_a_cpu_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--config=configs/digits.py", "--config.train.batch_size=auto"]) == 2
    error = capsys.readouterr().err
    assert error == "error: config.train.batch_size is 'auto', on a CPU\n  allowed: an integer of at least 1\n"
    assert list(tmp_path.rglob("config.json")) == []


def test_a_resumed_run_keeps_its_batch_size(tmp_path):
    saved = auto().to_dict()
    saved["train"]["batch_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    config = auto()
    assert auto_batch_size.resolve(config, tmp_path, sharding.make_mesh(1)).train.batch_size == 48
    assert config.train.batch_size == "auto"  # the argument is not modified


def test_devices_microbatches_and_repeats_divide_every_batch():
    config = auto(accumulation=3)
    config.augment.repeats = 4
    mesh = sharding.make_mesh(2)
    assert auto_batch_size.batch_multiple(config, mesh) == 12


@pytest.mark.slow
def test_the_size_that_is_found_fits_and_the_next_does_not(tmp_path, monkeypatch):
    mesh = sharding.make_mesh(1)
    monkeypatch.setattr(memory, "device_memory_limit", lambda _: 3 * 2**20)
    config = auto_batch_size.resolve(auto(), tmp_path, mesh)
    found, available = config.train.batch_size, memory.SHARE * 3 * 2**20
    check_config(config)
    run = setup.assemble(config, mesh, setup.load_sources(config))
    feeds = run.pipelines.make_all()
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(feeds["test"].resident))
    sizes = auto_batch_size.candidate_sizes(1, 10**6)

    def planned(size):
        return auto_batch_size.planned_bytes(run, feeds["train"], size) + others

    assert planned(found) <= available < planned(sizes[sizes.index(found) + 1])


def test_too_little_memory_for_one_image_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "device_memory_limit", lambda _: 1000)
    monkeypatch.setattr(auto_batch_size, "planned_bytes", lambda *_: 10**6)
    with pytest.raises(UserError, match="1 images do not fit"):
        auto_batch_size.resolve(auto(), tmp_path, sharding.make_mesh(1))
