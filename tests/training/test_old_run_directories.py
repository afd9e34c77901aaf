"""Run directories written by version 0.1 (tests/fixtures/version_0.1): they resume, evaluate and load as before."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import read_json_lines

from vit_jax import config, evaluate, main, weights
from vit_jax.optim import schedules
from vit_jax.weights.save import flattened

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "version_0.1"
STEPS = 20
# Wall-clock measurements differ between runs.
TIMINGS = ("images_per_second", "mfu", "seconds")
# How a run of each fixture is stored: one run directory, or one per seed below a common directory.
RUNS = {"two_heads": [""], "masked": [""], "seeds": ["seed-0", "seed-1"]}
CONFIG_FILE = """
import json

from vit_jax import config


def get_config(path):
    with open(path) as file:
        return config.from_dict(json.load(file))
"""


@pytest.fixture(scope="module", params=RUNS)
def resumed(request, tmp_path_factory):
    """The name of a fixture and a copy of it in which `python -m vit_jax.main` was run to the last step."""
    folder = tmp_path_factory.mktemp(request.param)
    workdir = shutil.copytree(FIXTURES / request.param, folder / "run")
    (folder / "from_json.py").write_text(CONFIG_FILE)
    spec = f"--config={folder / 'from_json.py'}:{FIXTURES / request.param / 'config.json'}"
    with pytest.MonkeyPatch.context() as patch:
        # The runs are shorter than their warm-up, which version 0.1 cut to the length of the run, not to a tenth of it.
        patch.setattr(schedules, "warmup_steps", lambda section, steps: min(section.warmup_steps, steps))
        # The fixtures were recorded on one device.
        assert main.main([spec, f"--workdir={workdir}", "--config.mesh.devices=1"]) == 0
    return request.param, workdir


def read_lines(path):
    """The records of a metrics.jsonl, with the speed."""
    return read_json_lines(path.read_text())


def assert_same_metrics(found, expected, where):
    """Compares two dictionaries of metrics: losses within 1e-5, accuracies within one example in 100."""
    assert set(found) - set(TIMINGS) == set(expected) - set(TIMINGS), where
    for name in set(expected) - set(TIMINGS):
        tolerance = 0.01 if "accuracy" in name or "top5" in name else 1e-5
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance, err_msg=f"{where}: {name}")


def test_a_resumed_run_ends_with_the_recorded_metrics(resumed):
    name, workdir = resumed
    for run in RUNS[name]:
        found, expected = (
            read_lines(workdir / run / "metrics.jsonl"),
            read_lines(FIXTURES / name / run / "expected_metrics.jsonl"),
        )
        assert [line["step"] for line in found] == [line["step"] for line in expected] == [5, 10, 15, 20]
        # The run was resumed at step 10, not started again: timings included, the old lines are still there.
        assert found[:2] == read_lines(FIXTURES / name / run / "metrics.jsonl")
        for one, other in zip(found, expected, strict=True):
            assert_same_metrics(one, other, f"{name}/{run} step {other['step']}")
    for run in {"", *RUNS[name]}:
        found, expected = (
            json.loads(path.read_text())
            for path in (workdir / run / "summary.json", FIXTURES / name / run / "expected_summary.json")
        )
        assert found["steps"] == STEPS
        assert_same_metrics(found, expected, f"{name}/{run} summary")


def test_evaluate_and_load_work_on_the_run_directory(resumed, capsys):
    name, workdir = resumed
    for run in RUNS[name]:
        capsys.readouterr()
        assert evaluate.main([f"--workdir={workdir / run}", "--step=20"]) == 0
        scores = json.loads(capsys.readouterr().out)
        expected = json.loads((FIXTURES / name / run / "expected_summary.json").read_text())
        assert scores.pop("step") == STEPS
        added = {key: scores.pop(key) for key in [*scores] if key not in expected}  # what summary.json does not have
        assert bool(added) == (name != "masked")
        assert all(0 <= value <= 1 for key, value in added.items() if key.endswith(("accuracy", "f1", "error")))
        assert_same_metrics(scores, {key: expected[key] for key in scores}, f"{name}/{run} evaluate")
        for step in (10, 20, "best"):
            model, parameters, _ = weights.load(workdir / run, step=step)
            assert (model.width, model.depth, model.patch_size) == (8, 1, 4)
            assert all(np.isfinite(leaf).all() for leaf in flattened(parameters).values())


def test_a_run_directory_that_was_not_resumed_loads():
    for name, runs in RUNS.items():
        for run in runs:
            model, parameters, report = weights.load(FIXTURES / name / run)
            assert model.width == 8 and "step 10" in report.notes[0]
            assert parameters["embedding"]["projection"]["kernel"].shape == (16, 8)


def test_the_exported_file_has_the_parameters_of_its_checkpoint():
    _, exported, _ = weights.load(FIXTURES / "exported.npz")
    _, checkpoint, _ = weights.load(FIXTURES / "seeds" / "seed-0", step=10)
    exported, checkpoint = flattened(exported), flattened(checkpoint)
    # The file holds the position table that the checkpoint's model computes.
    assert set(exported) - set(checkpoint) == {"positions/table"}
    for name, array in checkpoint.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)


@pytest.mark.parametrize("path", sorted(FIXTURES.rglob("config.json")), ids=lambda path: path.parent.name)
def test_an_old_config_loads(path):
    saved = json.loads(path.read_text())
    loaded = config.from_dict(saved)
    assert loaded.train.steps == STEPS and loaded.model.width == saved["model"]["width"]
    augment = loaded.augment.to_dict()
    smallest = augment.get("min_crop_area", augment.get("crop_area_least"))
    assert math.isclose(smallest, saved["augment"]["crop_area_least"])
