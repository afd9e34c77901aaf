import shutil

import jax
import numpy as np
import pytest

from vit_jax import checkpoints as checkpoints_command
from vit_jax import convert, optim, weights
from vit_jax.checkpoint import manager
from vit_jax.errors import UserError
from vit_jax.objectives import masked
from vit_jax.training import build_model, input_spec, state
from vit_jax.weights import native
from vit_jax.weights.save import flattened


def start(make_config, seed, **sections):
    """A run's config, model and first state."""
    config = make_config(**sections)
    made = build_model.build(config.model, classes=4, dtype=None).clone(attention_kernel="plain")
    rule = optim.make(config.optimizer, 10)
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
    with manager.Checkpoints(folder, keep=3) as checkpoints:
        for step, accuracy in ((0, 0.1), (10, 0.9), (20, float("nan"))):
            config, made, one = start(make_config, seed=step)
            states[step] = one.replace(step=np.int32(step) + one.step)
            metadata = {"config": config.to_dict(), "seconds": 1.0}
            checkpoints.save(states[step], metadata, {manager.METRIC: accuracy})
    return folder, made, states


def test_the_names_that_training_has(workdir):
    assert (native.FOLDER, native.METRIC, native.LOSS) == (manager.FOLDER, manager.METRIC, manager.LOSS)
    assert native.BACKBONE == masked.BACKBONE and native.INPUTS == input_spec.FILE
    assert native.recognise(workdir[0]) and not native.recognise(workdir[0].parent)


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
    with manager.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(one, {"config": config.to_dict()})
    found, parameters, report = weights.load(tmp_path, scan=made.scan)
    helpers.same(parameters, jax.tree.map(np.asarray, one.averaged))
    assert found == made
    assert "the averaged parameters of step 0" in report.notes
    found, parameters, report = weights.load(tmp_path, image_size=(16, 8), classes=2)
    images = np.ones((1, 16, 8, 1), np.float32)
    assert np.array_equal(helpers.outputs(found, parameters, images), np.zeros((1, 2)))
    assert any(row.detail == "grid 4x4 -> 8x4" for row in report.rows) == (fields.get("position") != "rotary")


def test_fixed_positions_keep_the_grid_that_was_trained_on(make_config, tmp_path):
    config, made, one = start(make_config, seed=0, model={"position": "sincos_2d"})
    with manager.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(one, {"config": config.to_dict()})
    assert weights.load(tmp_path, image_size=16)[0] == made  # nothing says what it was trained on
    (tmp_path / native.INPUTS).write_text('{"image_shape": [8, 8, 1]}')
    bound = made.clone(position_grid=4)
    for given in ({}, {"image_size": 8}, {"image_size": 16}):
        assert weights.load(tmp_path, **given)[0] == bound
    report = weights.load_into(tmp_path, made, 16, 1)[1]
    assert any("config.model.position_grid=4 keeps them" in note for note in report.notes)
    for target, size in ((bound, 16), (made, 8)):
        assert not any("position_grid" in note for note in weights.load_into(tmp_path, target, size, 1)[1].notes)


SCANNED = pytest.param({"scan": True, "optimizer": {"average_decay": 0.9}}, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[{}, SCANNED], ids=str)
def several(request, tmp_path_factory, make_config):
    """A workdir of four checkpoints, and the parameters of each that evaluation takes."""
    folder, given = tmp_path_factory.mktemp("several"), dict(request.param)
    sections = {"optimizer": given.pop("optimizer", {}), "model": {"pooling": "mean", **given}}
    found = {}
    with manager.Checkpoints(folder, keep=9) as checkpoints:
        for step in (10, 20, 30, 40):
            config, made, one = start(make_config, step, **sections)
            if one.averaged is not None:
                one = one.replace(averaged=jax.tree.map(lambda leaf: leaf + 1, one.averaged))
            checkpoints.save(one.replace(step=np.int32(step) + one.step), {"config": config.to_dict()})
            found[step] = jax.tree.map(np.asarray, one.for_evaluation())
    return folder, made, found


ASKED = {"--last=3": (20, 30, 40), "--steps=10,40": (10, 40), "--steps=30": (30,), "": (10, 20, 30, 40)}


@pytest.mark.parametrize("asked", ASKED)
def test_the_average_of_checkpoints_is_numpys(several, helpers, capsys, tmp_path, asked):
    folder, made, states = several
    file = tmp_path / "mean.safetensors"
    assert checkpoints_command.main(["average", str(folder), f"--out={file}", *asked.split()]) == 0
    assert f"{len(ASKED[asked])} checkpoints" in capsys.readouterr().out
    model, parameters, report = weights.load(file, scan=made.scan)
    assert model == made and report.normalization == "set"
    assert report.notes == (f"the mean of the parameters of steps {', '.join(map(str, ASKED[asked]))}",)
    taken = [states[step] for step in ASKED[asked]]
    wanted = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0).astype(np.float32), *taken)
    helpers.same(parameters, wanted)


def test_an_average_is_converted_and_starts_a_model(several, helpers, tmp_path):
    folder, made, _ = several
    file, converted = tmp_path / "mean.safetensors", tmp_path / "out" / "model.safetensors"
    native.average(folder, [10, 20], file)
    assert convert.main([str(file), str(converted), "--image_size=8"]) == 0
    _, through, _ = weights.load(converted)
    _, direct, _ = weights.load(file)
    helpers.same(through, direct)
    loaded, report = weights.load_into(file, made, 8, 1)
    helpers.same(loaded, direct)
    assert report.counts().get("initialised", 0) == 0


def test_a_damaged_average_is_refused(several, tmp_path):
    file = tmp_path / "mean.safetensors"
    native.average(several[0], [10, 20], file)
    whole = file.read_bytes()
    for place, message in ((len(whole) - 5, "is damaged: parameters/"), (whole.index(b"steps") + 10, "its header")):
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(UserError, match=message):
            weights.load(file)


def test_a_damaged_checkpoint_is_no_part_of_an_average(several, capsys, tmp_path):
    folder = shutil.copytree(several[0], tmp_path / "copy")
    # All of the files: which of them holds an array is for the storage to choose, and is another one each time.
    for data in (folder / "checkpoints" / "20" / "state" / "ocdbt.process_0" / "d").iterdir():
        data.write_bytes(b"x" * data.stat().st_size)
    out = folder / "new.safetensors"
    assert checkpoints_command.main(["average", str(folder), "--steps=10,20", f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert "step 20 is damaged" in error and len(error.splitlines()) <= 3
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out=mean.npz"], "ends in .safetensors"),
        ([], "ends in .safetensors"),
        (["--out=m.safetensors", "--last=4"], "1 to 3"),
        (["--out=m.safetensors", "--last=0"], "1 to 3"),
        (["--out=m.safetensors", "--steps=10,15"], "no checkpoint of step 15"),
        (["--out=m.safetensors", "--steps=ten"], "--steps=ten"),
        (["--out=m.safetensors", "--steps=10", "--last=1"], "give one of them"),
    ],
)
def test_an_average_of_what_there_is_not(workdir, arguments, message, capsys):
    assert checkpoints_command.main(["average", str(workdir[0]), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 3
