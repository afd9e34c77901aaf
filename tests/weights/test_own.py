import jax
import numpy as np
import pytest

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.training import checkpoint, masked, model, optimizer, state
from vit_jax.weights import own
from vit_jax.weights.save import flattened


def start(make_config, seed, **sections):
    """A run's config, model and first state."""
    config = make_config(**sections)
    made = model.build(config.model, classes=4, dtype=None)
    rule = optimizer.make(config.optimizer, 10)
    average = config.optimizer.average_decay > 0
    return config, made, state.create(state.initialize(made, (8, 8, 1), seed), rule, average, ("loss",))


@pytest.fixture(scope="module")
def make_config():
    from vit_jax import config as options

    def make(**sections):
        config = options.default()
        config.model.update(variant="Ti/2", width=16, depth=2, heads=2, mlp_width=24)
        for section, values in sections.items():
            config[section].update(values)
        return config

    return make


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, make_config):
    """A workdir with the steps 0, 10 and 20, of which 10 is the best."""
    folder, states = tmp_path_factory.mktemp("run"), {}
    with checkpoint.Checkpoints(folder, keep=3) as checkpoints:
        for step, accuracy in ((0, 0.1), (10, 0.9), (20, float("nan"))):
            config, made, one = start(make_config, seed=step)
            states[step] = one.replace(step=np.int32(step) + one.step)
            metadata = {"config": config.to_dict(), "seconds": 1.0}
            checkpoints.save(states[step], metadata, {checkpoint.METRIC: accuracy})
    return folder, made, states


def test_the_names_that_training_has(workdir):
    assert (own.FOLDER, own.METRIC, own.LOSS) == (checkpoint.FOLDER, checkpoint.METRIC, checkpoint.LOSS)
    assert own.BACKBONE == masked.BACKBONE
    assert own.recognise(workdir[0]) and not own.recognise(workdir[0].parent)


def test_the_newest_the_best_and_any_step(workdir, helpers):
    folder, made, states = workdir
    ways = {20: [(folder, {}), (folder / "checkpoints", {})], 10: [(folder, {"step": "best"})]}
    ways[0] = [(folder, {"step": 0}), (folder / "checkpoints" / "0", {})]
    for step, calls in ways.items():
        for path, asked in calls:
            found, parameters, report = weights.load(path, **asked)
            helpers.same(parameters, jax.tree.map(np.asarray, states[step].parameters))
            assert found == made
            assert report.notes == (f"the parameters of step {step}",)
            assert (report.image_size, report.channels) == ((8, 8), 1)
    ignored = {row.names[0]: row.detail for row in report.rows if row.action == "ignored"}
    assert ignored["step"] == "training's own"
    assert sum(name.startswith("optimizer/") for name in ignored) >= 2 * len(flattened(parameters))


def test_steps_that_there_are_not(workdir, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 5; there are: 0, 10, 20"):
        weights.load(workdir[0], step=5)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint; there are: none"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"position": "learned_2d", "position_at": "layers"},
        pytest.param({"scan": True, "mlp": "swiglu", "layer_scale": 0.1}, marks=pytest.mark.slow),
        pytest.param({"position": "relative", "pooling": "mean", "norm_after_pooling": True}, marks=pytest.mark.slow),
        pytest.param({"position": "rotary", "pooling": "map"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_averaged_parameters_of_any_model_for_any_images(tmp_path, make_config, helpers, fields):
    config, made, one = start(make_config, 0, model=fields, optimizer={"average_decay": 0.9})
    one = one.replace(averaged=jax.tree.map(lambda leaf: leaf + 1, one.parameters))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(one, {"config": config.to_dict()})
    found, parameters, report = weights.load(tmp_path, scan=made.scan)
    helpers.same(parameters, jax.tree.map(np.asarray, one.averaged))
    assert found == made
    assert "the averaged parameters of step 0" in report.notes
    found, parameters, report = weights.load(tmp_path, image_size=(16, 8), classes=2)
    images = np.ones((1, 16, 8, 1), np.float32)
    assert np.array_equal(helpers.outputs(found, parameters, images), np.zeros((1, 2)))
    assert any(row.detail == "grid 4x4 -> 8x4" for row in report.rows) == (fields.get("position") != "rotary")
