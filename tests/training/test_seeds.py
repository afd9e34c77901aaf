"""Several seeds: which, what they come to, and that each makes the run that it would make alone."""

import json

import chex
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from vit_jax import atomic, checkpoints, evaluate, sharding
from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.errors import UserError
from vit_jax.training import run_directory, seeds, together, train
from vit_jax.training.program import make_update_of_seeds
from vit_jax.training.step import BURST
from vit_jax.training.trainer import Trainer

STEPS = 12
SEEDS = (3, 0, 7)
RANDOM = {
    "model": {"dropout": 0.1, "stochastic_depth": 0.1, "stochastic_depth_schedule": "constant"},
    "augment": {"crop_padding": 1, "mixup": 0.3},
}


@pytest.fixture(scope="module")
def small(make_config):
    """Makes configs of a small run in which all that is random or carries over is on."""

    def make(**sections):
        config = make_config(**RANDOM)
        config.model.update(variant="Ti/4")
        config.optimizer.update(average_decay=0.9, warmup_steps=3, gradient_clip=1.0)
        config.data.update(train="train[:400]", validation="train[400:500]", test="test[:64]")
        config.train.update(batch_size=32, steps=STEPS, accumulation=2, evaluate_every=6, steps_per_dispatch=4)
        config.checkpoint.update(every=3, keep=STEPS)
        config.log.update(every=3, tensorboard=False)
        config.mesh.devices = 1
        for section, values in sections.items():
            config[section].update(values)
        options.check(config)
        return config

    return make


def lines(folder):
    """metrics.jsonl without what the clock says."""
    found = [json.loads(line) for line in (folder / run_files.METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in found]


def state(folder, step=STEPS):
    return ocp.load_checkpointables(folder / "checkpoints" / str(step))["state"]


def ends_as(folder, other):
    chex.assert_trees_all_equal(state(folder), state(other))
    assert lines(folder) == lines(other)


def written(folder):
    """When each file of a run was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    """The runs of `train.seed` 3 and 0."""
    folder = tmp_path_factory.mktemp("alone")
    for seed in (3, 0):
        train.train(small(train={"seed": seed}), folder / f"seed-{seed}")
    return folder


class Disturbed:
    """Seed 3, then 0 besides, stopped in its middle; then the same command again."""

    def __init__(self, small, folder):
        self.folder = folder
        self.first = together.train(small(train={"seeds": "3,"}), folder)
        self.times = [written(folder / "seed-3")]
        with pytest.MonkeyPatch.context() as patch:
            second = lambda trainer: trainer.config.train.seed == 0 and trainer.step >= 7  # noqa: E731
            patch.setattr(Trainer, "_asked_to_stop", second)
            self.stopped = together.train(small(train={"seeds": "3,0"}), folder)
        self.summary_there = (folder / run_files.SUMMARY).exists()
        self.summary = together.train(small(train={"seeds": "3,0"}), folder)
        self.times.append(written(folder / "seed-3"))


@pytest.fixture(scope="module")
def disturbed(small, tmp_path_factory):
    return Disturbed(small, tmp_path_factory.mktemp("one_after_another"))


@pytest.fixture(scope="module")
def one_after_another(disturbed):
    return disturbed.folder, disturbed.summary


@pytest.mark.parametrize(
    "text, seed, expected",
    [("5", 0, [0, 1, 2, 3, 4]), ("2", 7, [7, 8]), ("0,3,7", 9, [0, 3, 7]), (" 4 , 1 ", 0, [4, 1]), ("7,", 0, [7])],
)
def test_which_seeds_are_meant(small, text, seed, expected):
    config = small(train={"seeds": text, "seed": seed})
    assert seeds.listed(config) == expected
    assert seeds.listed(seeds.config_of_all(config)) == expected
    assert seeds.listed(small()) is None


def test_mean_and_spread_are_numpys():
    chance = np.random.default_rng(0)
    each = chance.random((5, 2))
    made = [
        {"test/accuracy": a, "test/loss": b, "test/examples": 360, "steps": 9, "seconds": 10.0 + k, "parameters": 4}
        for k, (a, b) in enumerate(each.tolist())
    ]
    summary = seeds.summarise(range(5), made, [1, 2, 2, 1, 1])
    for column, name in enumerate(("test/accuracy", "test/loss")):
        assert summary[name] == pytest.approx(np.mean(each[:, column]), rel=1e-14)
        assert summary[f"{name}/std"] == pytest.approx(np.std(each[:, column], ddof=1), rel=1e-14)
        assert summary[f"{name}/each"] == each[:, column].tolist()
    assert (summary["test/examples"], summary["steps"], summary["parameters"]) == (360, 9, 4)
    assert summary["seconds"] == 10 + 11 / 2 + 12 / 2 + 13 + 14
    assert summary["seeds"] == [0, 1, 2, 3, 4]
    one = seeds.summarise([8], made[:1], [1])
    assert one["test/accuracy"] == each[0, 0] and one["test/accuracy/std"] is None
    assert "of one seed, 8" in seeds.describe(one)


def test_what_is_printed_of_them():
    summary = {"seeds": [0, 1, 2], "test/accuracy": 0.98, "test/accuracy/std": 0.01}
    summary["test/accuracy/each"] = [0.97, 0.99, 0.98]
    assert seeds.describe(summary) == "test accuracy 98.00 +- 1.00 % over 3 seeds (97.00 ... 99.00)"
    assert seeds.describe_each(summary)[1] == "seed 1: test accuracy 99.00 %"
    summary = {"seeds": [0, 1], "validation/loss": 0.5, "validation/loss/std": 0.25, "validation/loss/each": [0.4, 0.6]}
    assert seeds.describe(summary) == "validation loss 0.5000 +- 0.2500 over 2 seeds (0.4000 ... 0.6000)"


@pytest.mark.slow
def test_one_after_another_each_is_the_run_that_it_is_alone(alone, one_after_another):
    folder, summary = one_after_another
    for name in ("seed-3", "seed-0"):
        ends_as(folder / name, alone / name)
        assert run_directory.read_config(folder / name) == run_directory.read_config(alone / name)
    each = [run_directory.read_summary(alone / name)["test/accuracy"] for name in ("seed-3", "seed-0")]
    assert summary["test/accuracy/each"] == each and summary["seeds"] == [3, 0]
    assert summary["test/accuracy"] == np.mean(each)
    assert run_directory.read_summary(folder) == summary
    assert state(folder / "seed-3")["parameters"]["head"]["logits"]["kernel"].any()
    kernels = [state(folder / name)["parameters"]["embedding"]["projection"]["kernel"] for name in ("seed-3", "seed-0")]
    assert not np.allclose(*kernels)


@pytest.mark.slow
def test_the_folder_of_all_seeds_is_no_run_itself(one_after_another, capsys):
    assert evaluate.main([f"--workdir={one_after_another[0]}"]) == 2
    assert "give one: seed-0, seed-3" in capsys.readouterr().err


@pytest.mark.slow
def test_every_command_works_on_a_seeds_own_folder(one_after_another, capsys):
    folder, summary = one_after_another
    assert evaluate.main([f"--workdir={folder / 'seed-0'}"]) == 0
    assert json.loads(capsys.readouterr().out)["test/accuracy"] == summary["test/accuracy/each"][1]
    assert checkpoints.main(["verify", str(folder / "seed-3")]) == 0


@pytest.mark.slow
def test_finished_seeds_are_left_alone_when_others_are_added_stopped_and_resumed(disturbed):
    assert disturbed.times[0] == disturbed.times[1]
    assert disturbed.stopped is None and not disturbed.summary_there
    first = disturbed.first
    assert first["seeds"] == [3] and first["test/accuracy/each"] == disturbed.summary["test/accuracy/each"][:1]


@pytest.mark.slow
def test_what_is_finished_is_shown_and_summed_up_anew_where_others_are_asked_for(small, one_after_another, capsys):
    folder, summary = one_after_another
    before = written(folder / "seed-3")
    assert together.train(small(train={"seeds": "3,0"}), folder) == summary
    assert "is finished: test accuracy" in capsys.readouterr().out
    swapped = together.train(small(train={"seeds": "0,3"}), folder)
    assert (swapped["seeds"], swapped["test/loss/each"]) == ([0, 3], summary["test/loss/each"][::-1])
    assert together.train(small(train={"seeds": "3,0"}), folder) == summary
    assert written(folder / "seed-3") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections, words",
    [
        ({"train": {"seeds": "3,0,1", "batch_size": 16}}, "train.batch_size: 32 -> 16"),
        ({"train": {"seed": 3}}, "train.seeds: 3,0, -> None"),
    ],
)
def test_a_folder_of_seeds_is_not_taken_for_another_run(small, one_after_another, sections, words):
    folder, _ = one_after_another
    before, config = written(folder), small(**sections)
    with pytest.raises(UserError, match=words):
        (train if config.train.seeds is None else together).train(config, folder)
    assert written(folder) == before


def test_a_single_run_is_not_taken_for_several_seeds(small, alone):
    with pytest.raises(UserError, match=r"train\.seeds: None -> "):
        together.train(small(train={"seeds": "2", "seed": 3}), alone / "seed-3")


def test_which_seeds_share_a_program(small, tmp_path):
    """Fresh ones evenly; those that have begun with so many go on with so many."""

    def groups(config, left):
        return list(together._groups(tmp_path, config, left))

    config = small(train={"seeds": "5", "seeds_at_once": 4})
    assert groups(config, [0, 1, 2, 3, 4]) == [([0, 1, 2], 3), ([3, 4], 2)]
    for seed in (0, 1, 2):
        own = tmp_path / f"seed-{seed}"
        own.mkdir()
        atomic.write_json(own / run_files.CONFIG, seeds.config_of(config, seed, 3).to_dict())
    assert groups(config, [1, 2, 3, 4]) == [([1, 2], 3), ([3, 4], 2)]
    config.train.seeds_at_once = 1
    assert groups(config, [1, 2]) == [([1], 1), ([2], 1)]
    config.train.seeds_at_once = None
    assert groups(config, [2, 3, 4]) == [([2], 3), ([3], 1), ([4], 1)]


class Vectorised:
    """The toys of several seeds, and one program for all of them."""

    def __init__(self, toy, make_config, devices):
        # SGD: Adam divides by the gradient's size, and makes much of the last bits of what is nearly zero.
        sgd = {"optimizer": {"name": "sgd", "learning_rate": 0.05}, "log": {"every": 1}}
        configs = (make_config(train={"seed": seed, "accumulation": 2}, **RANDOM, **sgd) for seed in SEEDS)
        self.toys = [toy(config, devices) for config in configs]
        self.starts = [jax.device_get(each.start()) for each in self.toys]
        self.everywhere = sharding.replicated(self.toys[0].mesh)
        self.together = make_update_of_seeds(self.toys[0].update, self.toys[0].mesh)

    def run(self, states, counts):
        """So many steps of each, in one dispatch."""
        feeds = tuple(each.feed(0, count) for each, count in zip(self.toys, counts, strict=True))
        states = jax.device_put(tuple(states), self.everywhere)
        return jax.device_get(self.together(states, feeds, tuple(map(np.int32, counts)), tuple(map(np.int32, SEEDS))))

    def alone(self, place, count):
        """The steps of one seed, in the program of the first, which that seed is handed to."""
        feed, state = self.toys[place].feed(0, count), jax.device_put(self.starts[place], self.everywhere)
        return jax.device_get(self.toys[0].update(state, feed, np.int32(count), np.int32(SEEDS[place])))

    def check(self, counts):
        """Some steps together, then alone, from the same start."""
        many = self.run(self.starts, counts)
        for place, (count, (state, sums)) in enumerate(zip(counts, many, strict=True)):
            expected, expected_sums = self.alone(place, count)
            chex.assert_trees_all_close(state, expected, atol=1e-5, rtol=1e-5)
            chex.assert_trees_all_close(sums, expected_sums, atol=1e-5, rtol=1e-5)
            assert int(state.step) == count
        return many


@pytest.fixture(scope="module")
def vectorised(toy, make_config):
    return Vectorised(toy, make_config, 1)


@pytest.mark.slow
def test_in_one_program_each_makes_the_steps_that_it_makes_alone(vectorised):
    ends = vectorised.check([6, 4, 0])
    chex.assert_trees_all_equal(ends[2][0], vectorised.starts[2])  # no steps, no change


@pytest.mark.slow
def test_in_one_program_on_eight_devices_too(toy, make_config):
    Vectorised(toy, make_config, 8).check([6, 6, 6])


@pytest.mark.slow
def test_bad_numbers_of_one_seed_leave_the_others_their_bits(vectorised):
    starts = vectorised.starts
    good = vectorised.run(starts, [8, 8, 8])
    broken = jax.tree.map(lambda leaf: leaf * np.nan, starts[1].parameters)
    bad = vectorised.run([starts[0], starts[1].replace(parameters=broken), starts[2]], [8, 8, 8])
    for place in (0, 2):
        chex.assert_trees_all_equal(bad[place], good[place])
    assert (int(bad[1][0].step), int(bad[1][0].streak)) == (BURST, BURST)


@pytest.fixture(scope="module")
def at_once(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("at_once")
    return folder, together.train(small(train={"seeds": "3,0", "seeds_at_once": 2}), folder)


@pytest.mark.slow
def test_at_once_each_is_the_run_that_it_is_alone(alone, at_once):
    folder, summary = at_once
    for name in ("seed-3", "seed-0"):
        for mine, other in zip(lines(folder / name), lines(alone / name), strict=True):
            assert mine == pytest.approx(other, abs=1e-5)
    assert run_directory.read_config(folder / "seed-3")["train"]["seeds_at_once"] == 2
    seconds = [run_directory.read_summary(folder / name)["seconds"] for name in ("seed-3", "seed-0")]
    assert summary["seconds"] == pytest.approx(sum(seconds) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [{3: 5, 0: 5}, {3: 5, 0: 9}, {3: STEPS + 1, 0: 8}])
def test_at_once_it_goes_on_exactly_also_from_different_steps(small, at_once, tmp_path, monkeypatch, stops):
    """Asked to stop at steps of its own each, the last time when one of them is finished."""
    config = small(train={"seeds": "3,0", "seeds_at_once": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_asked_to_stop", lambda self: self.step >= stops[self.config.train.seed])
        assert together.train(config, tmp_path) is None
    together.train(small(train={"seeds": "3,0"}), tmp_path)  # as many at once as it began with
    for name in ("seed-3", "seed-0"):
        ends_as(tmp_path / name, at_once[0] / name)


@pytest.mark.slow
def test_at_once_on_a_set_that_is_sent(small, at_once, tmp_path):
    config = small(train={"seeds": "3,0", "seeds_at_once": 2}, data={"resident": "never"})
    together.train(config, tmp_path)
    for name in ("seed-3", "seed-0"):
        ends_as(tmp_path / name, at_once[0] / name)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_seed_that_fails_does_not_keep_the_others_from_their_ends(small, alone, tmp_path, monkeypatch, at_once):
    real = Trainer._read

    def read(self, step, sums):
        if self.config.train.seed == 3 and step > 6:
            raise UserError("the disk is away")
        return real(self, step, sums)

    config = small(train={"seeds": "3,0", "seeds_at_once": at_once})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_read", read)
        with pytest.raises(UserError, match=r"^seed 3: the disk is away"):
            together.train(config, tmp_path)
    assert run_directory.read_summary(tmp_path) is None and run_directory.read_summary(tmp_path / "seed-0") is not None
    assert together.train(config, tmp_path)["seeds"] == [3, 0]
    np.testing.assert_allclose(
        state(tmp_path / "seed-3")["parameters"]["head"]["logits"]["bias"],
        state(alone / "seed-3")["parameters"]["head"]["logits"]["bias"],
        atol=1e-4,
    )
