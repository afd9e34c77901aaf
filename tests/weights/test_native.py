"""Weights from our own run directories, and averages of checkpoints."""

import shutil

import jax
import numpy as np
import pytest
from helpers import tiny_config
from toy import make_state

from vit_jax import checkpoints as checkpoints_command
from vit_jax import convert, optim, weights
from vit_jax.checkpoint import input_spec, manager
from vit_jax.errors import UserError
from vit_jax.objectives import masked
from vit_jax.training import build_model, setup
from vit_jax.weights import native
from vit_jax.weights.save import flattened

TWO_LAYERS = {"model": {"variant": "Ti/2", "depth": 2, "mlp_width": 24}}


def start(seed, **sections):
    """The config, model and initial state of a run."""
    config = tiny_config(TWO_LAYERS, **sections)
    made = build_model.build(config.model, classes=4, dtype=None).clone(attention_kernel="plain")
    optimizer = optim.make(config.optimizer, 10)
    average = config.optimizer.average_decay > 0
    return config, made, make_state(setup.init_parameters(made, (8, 8, 1), seed), optimizer, average)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run directory with checkpoints of the steps 0, 10 and 20, of which 10 is the best; the model; the states."""
    directory, states = tmp_path_factory.mktemp("run"), {}
    with manager.CheckpointManager(directory, keep=3) as checkpoints:
        for step, accuracy in ((0, 0.1), (10, 0.9), (20, float("nan"))):
            config, made, one = start(seed=step)
            states[step] = one.replace(step=np.int32(step) + one.step)
            metadata = {"config": config.to_dict(), "seconds": 1.0}
            checkpoints.save(states[step].to_arrays(), metadata, {"validation/accuracy": accuracy})
    return directory, made, states


def test_run_directories_are_recognised(workdir):
    assert masked.Masked.backbone_path[0] == native.BACKBONE
    assert native.recognise(workdir[0]) and not native.recognise(workdir[0].parent)


def test_loading_the_newest_the_best_and_any_step(workdir, helpers):
    directory, made, states = workdir
    ways = {20: [(directory, {}), (directory / "checkpoints", {})], 10: [(directory, {"step": "best"})]}
    ways[0] = [(directory, {"step": 0}), (directory / "checkpoints" / "0", {})]
    for step, calls in ways.items():
        for path, flags in calls:
            found, parameters, report = weights.load(path, **flags)
            helpers.same(parameters, jax.tree.map(np.asarray, states[step].parameters))
            assert found == made
            assert report.notes == (f"the parameters of step {step}",)
            assert (report.image_size, report.channels) == ((8, 8), 1)
    ignored = {row.names[0]: row.detail for row in report.rows if row.action == "ignored"}
    assert ignored["step"] == "training state"
    assert sum(name.startswith("optimizer/") for name in ignored) >= 2 * len(flattened(parameters))


def test_missing_steps(workdir, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 5\n  available steps: 0, 10, 20"):
        weights.load(workdir[0], step=5)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint\n  available steps: none"):
        weights.load(tmp_path)


@pytest.mark.slow
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
def test_averaged_parameters_of_several_models_and_image_sizes(tmp_path, helpers, fields):
    config, made, one = start(0, model=fields, optimizer={"average_decay": 0.9})
    one = one.replace(averaged=jax.tree.map(lambda leaf: leaf + 1, one.parameters))
    with manager.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(one.to_arrays(), {"config": config.to_dict()})
    found, parameters, report = weights.load(tmp_path, scan=made.scan)
    helpers.same(parameters, jax.tree.map(np.asarray, one.averaged))
    assert found == made
    assert "the averaged parameters of step 0" in report.notes
    found, parameters, report = weights.load(tmp_path, image_size=(16, 8), classes=2)
    images = np.ones((1, 16, 8, 1), np.float32)
    assert np.array_equal(helpers.outputs(found, parameters, images), np.zeros((1, 2)))
    assert any(row.detail == "grid 4x4 -> 8x4" for row in report.rows) == (fields.get("position") != "rotary")


@pytest.mark.slow
def test_computed_positions_keep_the_grid_of_training(tmp_path):
    config, made, one = start(seed=0, model={"position": "sincos_2d"})
    with manager.CheckpointManager(tmp_path, keep=1) as checkpoints:
        checkpoints.save(one.to_arrays(), {"config": config.to_dict()})
    assert weights.load(tmp_path, image_size=16)[0] == made  # without data.json the image size of training is unknown
    spec = input_spec.InputSpec("toy", (8, 8, 1), (0.5,), (0.5,), {"label": ("a", "b", "c", "d")})
    input_spec.write(tmp_path, spec)
    bound = made.clone(position_grid=4)
    for options in ({}, {"image_size": 8}, {"image_size": 16}):
        assert weights.load(tmp_path, **options)[0] == bound
    report = weights.load_into(tmp_path, made, 16, 1)[1]
    assert any("config.model.position_grid=4 keeps them" in note for note in report.notes)
    for target, size in ((bound, 16), (made, 8)):
        assert not any("position_grid" in note for note in weights.load_into(tmp_path, target, size, 1)[1].notes)


SCANNED = pytest.param({"scan": True, "optimizer": {"average_decay": 0.9}}, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[{}, SCANNED], ids=str)
def several(request, tmp_path_factory):
    """A run directory with four checkpoints, the model, and the parameters that evaluation uses of each."""
    directory, options = tmp_path_factory.mktemp("several"), dict(request.param)
    sections = {"optimizer": options.pop("optimizer", {}), "model": {"pooling": "mean", **options}}
    found = {}
    with manager.CheckpointManager(directory, keep=9) as checkpoints:
        for step in (10, 20, 30, 40):
            config, made, one = start(step, **sections)
            if one.averaged is not None:
                one = one.replace(averaged=jax.tree.map(lambda leaf: leaf + 1, one.averaged))
            checkpoints.save(one.replace(step=np.int32(step) + one.step).to_arrays(), {"config": config.to_dict()})
            found[step] = jax.tree.map(np.asarray, one.for_evaluation())
    return directory, made, found


FLAGS = {"--last=3": (20, 30, 40), "--steps=10,40": (10, 40), "--steps=30": (30,), "": (10, 20, 30, 40)}


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_the_average_of_checkpoints_is_their_mean(several, helpers, capsys, tmp_path, flags):
    directory, made, states = several
    file = tmp_path / "mean.safetensors"
    assert checkpoints_command.main(["average", str(directory), f"--out={file}", *flags.split()]) == 0
    assert f"{len(FLAGS[flags])} checkpoints" in capsys.readouterr().out
    model, parameters, report = weights.load(file, scan=made.scan)
    assert model == made and report.normalization == "set"
    assert report.notes == (f"the mean of the parameters of steps {', '.join(map(str, FLAGS[flags]))}",)
    averaged = [states[step] for step in FLAGS[flags]]
    wanted = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0).astype(np.float32), *averaged)
    helpers.same(parameters, wanted)


def test_an_average_can_be_converted_and_loaded_into_a_model(several, helpers, tmp_path):
    directory, made, _ = several
    file, converted = tmp_path / "mean.safetensors", tmp_path / "out" / "model.safetensors"
    native.average(directory, [10, 20], file)
    assert convert.main([str(file), str(converted), "--image_size=8"]) == 0
    _, through, _ = weights.load(converted)
    _, direct, _ = weights.load(file)
    helpers.same(through, direct)
    loaded, report = weights.load_into(file, made, 8, 1)
    helpers.same(loaded, direct)
    assert report.counts().get("initialized", 0) == 0


def test_a_corrupt_average_is_refused(several, tmp_path):
    file = tmp_path / "mean.safetensors"
    native.average(several[0], [10, 20], file)
    whole = file.read_bytes()
    for position, message in ((len(whole) - 5, "is corrupt: parameters/"), (whole.index(b"steps") + 10, "its header")):
        changed = bytearray(whole)
        changed[position] ^= 1
        file.write_bytes(changed)
        with pytest.raises(UserError, match=message):
            weights.load(file)


def test_a_corrupt_checkpoint_is_not_averaged(several, capsys, tmp_path):
    directory = shutil.copytree(several[0], tmp_path / "copy")
    # All files, since the storage chooses anew each time which file has which array.
    for data in (directory / "checkpoints" / "20" / "state" / "ocdbt.process_0" / "d").iterdir():
        data.write_bytes(b"x" * data.stat().st_size)
    out = directory / "new.safetensors"
    assert checkpoints_command.main(["average", str(directory), "--steps=10,20", f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert "checkpoints/20 is corrupt" in error and len(error.splitlines()) <= 3
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out=mean.npz"], "ends in .safetensors"),
        ([], "ends in .safetensors"),
        (
            ["--out=m.safetensors", "--last=4"],
            "use --last=3 to average what there is; to keep 4, train with --config.checkpoint.keep=4",
        ),
        (
            ["--out=m.safetensors", "--last=0"],
            "has 3 checkpoints, of steps 0, 10, 20\n  use --last=3 to average what there is\n",
        ),
        (["--out=m.safetensors", "--steps=10,15"], "has no checkpoint of step 15"),
        (["--out=m.safetensors", "--steps=ten"], "--steps=ten"),
        (["--out=m.safetensors", "--steps=10", "--last=1"], "use one of them"),
    ],
)
def test_invalid_arguments_of_average(workdir, arguments, message, capsys):
    assert checkpoints_command.main(["average", str(workdir[0]), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 3
