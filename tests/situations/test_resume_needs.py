"""What a run needs when it resumes: its directory and its data, not the weights that it started from."""

import json
import os
import shutil

import chex
import numpy as np
import pytest
from helpers import flags, read_metrics, saved_state, tiny_config

from vit_jax import checkpoints, evaluate, main
from vit_jax.checkpoint import integrity, run_files
from vit_jax.errors import UserError
from vit_jax.training import build_model, initial_weights, setup
from vit_jax.weights import files, native
from vit_jax.weights.save import flattened

pytestmark = pytest.mark.slow  # the fixture trains
STEPS = 4
CONFIG_FILE = """
from vit_jax import config


def get_config():
    made = config.default()
    made.data.update(name="digits", normalization="init_from")
    made.model.variant = "init_from"
    made.train.batch_size = 32
    return made
"""
SMALL = flags(
    data={"train": "train[:64]", "validation": None, "test": "test[:32]"},
    train={"epochs": None, "evaluate_every": 0},
    log={"tensorboard": False},
    mesh={"devices": 1},
)


def write_weights(path, seed):
    """A file as `vit_jax.checkpoints average` writes it."""
    config = tiny_config(data={"normalization": "half"})
    model = build_model.build(config.model, classes=10, dtype=None).clone(attention_kernel="plain")
    parameters = flattened(setup.init_parameters(model, (8, 8, 1), seed))
    arrays = {f"parameters/{name}": np.asarray(leaf) for name, leaf in parameters.items()}
    content = {"config": config.to_dict(), "steps": [1], "digests": integrity.digests(arrays)}
    files.write_safetensors(path, arrays, {native.SEALED: json.dumps(integrity.seal(content))})


def command(workdir, weights, *more, steps=STEPS):
    """The exit status of the same command with these weights."""
    spec = [f"--config={os.path.dirname(os.path.abspath(workdir))}/config.py", f"--workdir={workdir}"]
    options = [*flags(checkpoint={"init_from": weights}), *flags(train={"steps": steps})]
    return main.main([*spec, *SMALL, *options, *more])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with weights, with a run from them that was stopped at its start, and with the finished run."""
    directory = tmp_path_factory.mktemp("runs")
    (directory / "config.py").write_text(CONFIG_FILE)
    write_weights(directory / "weights.safetensors", 0)
    write_weights(directory / "others.safetensors", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert command("stopped", "weights.safetensors", *flags(train={"max_minutes": 0.0})) == 0
        assert not (directory / "stopped" / run_files.SUMMARY).exists()
        shutil.copytree("stopped", "finished")
        assert command("finished", "weights.safetensors") == 0
    return directory


@pytest.fixture
def directory(runs, tmp_path, monkeypatch):
    """A copy of the runs, in which the current directory is."""
    shutil.copytree(runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def same(directory):
    return "weights.safetensors"


def gone(directory):
    (directory / "weights.safetensors").unlink()
    return "weights.safetensors"


def absolute(directory):
    return directory / "weights.safetensors"


def dotted(directory):
    return "./stopped/../weights.safetensors"


def linked(directory):
    (directory / "link.safetensors").symlink_to("weights.safetensors")
    return "link.safetensors"


def moved(directory):
    (directory / "else").mkdir()
    shutil.move("weights.safetensors", directory / "else" / "renamed.safetensors")
    return directory / "else" / "renamed.safetensors"


def from_elsewhere(directory):
    """The same command from another current directory, where the relative path leads nowhere."""
    (directory / "else").mkdir()
    os.chdir(directory / "else")
    return "weights.safetensors"


def copied_and_removed(directory):
    shutil.copy("weights.safetensors", "copy.safetensors")
    (directory / "weights.safetensors").unlink()
    return "copy.safetensors"


WAYS = (same, gone, absolute, dotted, linked, moved, from_elsewhere, copied_and_removed)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_finished_run_shows_its_result(directory, capsys, monkeypatch, way):
    """Whatever has become of the weights; nor are the data, a device or a writable directory needed."""

    def fail(*_):
        raise UserError("the data are gone")

    monkeypatch.setattr(setup, "check", fail)
    before = {path: path.read_bytes() for path in (directory / "finished").rglob("*") if path.is_file()}
    assert command(directory / "finished", way(directory)) == 0
    assert "finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (directory / "finished").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("way", (gone, linked, moved, from_elsewhere), ids=lambda way: way.__name__)
def test_a_stopped_run_resumes(directory, runs, way):
    path = way(directory)
    assert command(directory / "stopped", path) == 0
    assert read_metrics(directory / "stopped") == read_metrics(runs / "finished")
    found, wanted = (saved_state(root, STEPS)["parameters"] for root in (directory / "stopped", runs / "finished"))
    chex.assert_trees_all_equal(found, wanted)
    assert json.loads((directory / "stopped" / run_files.CONFIG).read_text())["data"]["normalization"] == "half"


def no_config(workdir):
    (workdir / run_files.CONFIG).unlink()


def edited_config(workdir):
    text = (workdir / run_files.CONFIG).read_text()
    (workdir / run_files.CONFIG).write_text(text.replace('"seed": 0', '"seed": 1'))
    assert '"seed": 1' in (workdir / run_files.CONFIG).read_text()


def unknown_option(workdir):
    text = (workdir / run_files.CONFIG).read_text()
    (workdir / run_files.CONFIG).write_text(text.replace('"depth":', '"deptth": 3, "depth":'))


def byte_order_mark(workdir):
    (workdir / run_files.CONFIG).write_bytes(b"\xef\xbb\xbf" + (workdir / run_files.CONFIG).read_bytes())


def no_records_of_the_machine(workdir):
    for name in (run_files.ENVIRONMENT, run_files.DATA):
        (workdir / name).unlink()


HANDS = (no_config, edited_config, unknown_option, byte_order_mark, no_records_of_the_machine)


@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.__name__)
def test_a_run_is_that_of_its_checkpoints_whatever_became_of_its_files(directory, runs, capsys, hand):
    """With another seed it is refused, even if config.json agrees; with its own config it resumes."""
    hand(directory / "stopped")
    assert command("stopped", "weights.safetensors", *flags(train={"seed": 1})) == 2
    assert "differs: train.seed: 0 -> 1" in capsys.readouterr().err
    assert command("stopped", "weights.safetensors") == 0
    assert read_metrics(directory / "stopped") == read_metrics(runs / "finished")
    assert json.loads((directory / "stopped" / run_files.CONFIG).read_text())["train"]["seed"] == 0


def test_a_missing_config_is_restored_as_the_message_says(directory, capsys):
    no_config(directory / "finished")
    assert evaluate.main([f"--workdir={directory / 'finished'}"]) == 2
    shown = capsys.readouterr().err
    assert "config.json is missing" in shown and f"vit_jax.checkpoints restore-config {directory / 'finished'}" in shown
    assert checkpoints.main(["restore-config", str(directory / "finished")]) == 0
    assert evaluate.main([f"--workdir={directory / 'finished'}"]) == 0


def test_other_weights_are_another_config(directory, capsys):
    for path in ("others.safetensors", directory / "others.safetensors"):
        assert command("stopped", path) == 2
        shown = capsys.readouterr().err
        assert "differs: checkpoint.init_from: weights.safetensors -> " in shown and "Traceback" not in shown
    (directory / "weights.safetensors").unlink()
    assert command("stopped", "others.safetensors") == 2


def test_every_spelling_stays_known(directory):
    """The new path of moved weights is accepted again once it is gone as well."""
    path = str(moved(directory))
    assert initial_weights.is_same(directory / "stopped", "weights.safetensors", path)
    initial_weights.record(directory / "stopped", path)
    os.unlink(path)
    for spelling in (path, "weights.safetensors", str(directory / "weights.safetensors")):
        assert initial_weights.is_same(directory / "stopped", "weights.safetensors", spelling)
    assert not initial_weights.is_same(directory / "stopped", "weights.safetensors", "others.safetensors")


def test_without_a_record_the_files_are_compared(directory):
    """As in run directories of version 0.1."""
    (directory / "stopped" / run_files.INIT_FROM).unlink()
    shutil.copy("weights.safetensors", "copy.safetensors")
    assert initial_weights.is_same(directory / "stopped", "weights.safetensors", "copy.safetensors")
    assert not initial_weights.is_same(directory / "stopped", "weights.safetensors", "others.safetensors")
    (directory / "weights.safetensors").unlink()
    assert not initial_weights.is_same(directory / "stopped", "weights.safetensors", "copy.safetensors")


def test_a_run_that_has_not_begun_needs_the_weights(directory, capsys):
    (directory / "weights.safetensors").unlink()
    assert command("new", "weights.safetensors") == 2
    assert "weights.safetensors" in capsys.readouterr().err and not (directory / "new").exists()


def test_a_seed_that_has_not_begun_is_named(directory, capsys):
    seeds = [*flags(train={"seeds": 2}), *flags(train={"max_minutes": 0.0})]
    assert command("several", "weights.safetensors", *seeds) == 0  # stopped in the first seed
    (directory / "weights.safetensors").unlink()
    assert command("several", "weights.safetensors", seeds[0]) == 2
    shown = capsys.readouterr().err
    assert "seed 1: " in shown and "weights.safetensors" in shown and "Traceback" not in shown
    assert (directory / "several" / "seed-0" / run_files.SUMMARY).exists()  # that seed needed them no longer
