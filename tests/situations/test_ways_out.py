"""The advice of error messages is followed: what a message says is allowed, named or to be typed works."""

import ast
import importlib.util
import re
import shlex

import jax
import numpy as np
import PIL.Image
import pytest
from helpers import ROOT, TINY, run_command, tiny_config
from helpers_imports import PACKAGE
from helpers_messages import MESSAGES

from vit_jax import commands, evaluate, features, predict, reconstruct, transfer, weights
from vit_jax import config as options
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config.check import check_config
from vit_jax.config.load import option
from vit_jax.data import sources, splits
from vit_jax.errors import UserError
from vit_jax.evaluation import extraction
from vit_jax.inference import Predictor, of_file
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import lr_sweep, setup


def message(function, *arguments, **keywords) -> str:
    with pytest.raises((UserError, TypeError, ValueError)) as caught:
        function(*arguments, **keywords)
    assert str(caught.value).count("\n") <= 2
    return str(caught.value)


def config_of(*assignments: str):
    """A config of a small model with these overrides, unchecked."""
    config = options.default()
    config.model.update(TINY)
    config.train.steps = 10
    for assignment in assignments:
        options.override(config, assignment)
    return config


def checked(*assignments: str):
    config = config_of(*assignments)
    check_config(config)
    return config


# --- what messages name exists --------------------------------------------------------------------------------------


def flags_of_commands() -> set[str]:
    """Every flag that a command declares."""
    calls = [node for path in PACKAGE.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    calls = [node for node in calls if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"]
    names = {text.value for call in calls for text in call.args if isinstance(text, ast.Constant)}
    return {name for name in names if name.startswith("--")} | {"--help", "--config"}


def test_commands_that_messages_name_exist():
    named = {name for *_, text in MESSAGES for name in re.findall(r"python -m (vit_jax\.\w+)", text)}
    assert len(named) >= 3 and not [name for name in named if importlib.util.find_spec(name) is None]


def test_options_that_messages_name_exist():
    named = {name for *_, text in MESSAGES for name in re.findall(r"config\.([a-z]+\.\w+)(?![\w{])", text)}
    assert len(named) > 30 and not [name for name in named if option(name) is None]


def test_flags_that_messages_name_exist():
    texts = [re.sub(r"\{[^{}]*\}|\b(tfds|hf|pip|git) [^\n]*|torch[^\n]*", "", text) for *_, text in MESSAGES]
    named = {flag for text in texts for flag in re.findall(r"(?<![\w-])--\w+(?![\w.])", text)}
    assert len(named) > 20 and not named - flags_of_commands()


def test_pages_that_messages_name_exist():
    named = {page for *_, text in MESSAGES for page in re.findall(r"docs/\w+\.md", text)}
    assert named and all((ROOT / page).exists() for page in named)


# --- options --------------------------------------------------------------------------------------------------------


def allowed_values(text: str) -> list[str]:
    """Values that a message says are allowed: what is quoted, bounds, and examples."""
    allowed = text.partition("allowed: ")[2]
    if examples := re.findall(r"for example ([\w=.,:]+?),? ", allowed) + re.findall(r"\((\d[\d,]*)\)", allowed):
        return examples
    found = [quoted or word for quoted, word in re.findall(r"'([^']*)'|\b(None|True|False)\b", allowed)]
    found += re.findall(r"from (-?[\d.e+-]+) to", allowed) + re.findall(r" to (-?[\d.e+-]+)", allowed)[:1]
    found += re.findall(r"of at least (-?[\d.e+-]+)", allowed)
    found += [str(float(bound) + 0.01) for bound in re.findall(r"above (-?[\d.e+-]+)", allowed)]
    if re.match(r"(a number|an integer|a string|names)(,|$)", allowed):
        found.append("1")
    return found


FREE_TEXT = [name for name in options.names() if option(name).kind is str and not option(name).choices]


@pytest.mark.parametrize("name", sorted({*options.names()} - {*FREE_TEXT}))
def test_a_value_that_is_said_to_be_allowed_is(name):
    config = options.default()
    text = message(options.override, config, f"{name}=wrong value,,")
    values = allowed_values(text)
    assert values, text
    for value in values:
        options.override(config, f"{name}={value}")


@pytest.mark.parametrize(
    "misspelled",
    ["train.step", "trian.steps", "steps", "model.heads_", "Model.width", "data.width", "optimizer.learnig_rate"],
)
def test_the_nearest_option_exists_and_is_meant(misspelled):
    text = message(options.override, options.default(), f"{misspelled}=8")
    nearest = re.search(r"nearest: config\.([\w.]+): (.*)", text)
    assert option(nearest[1]).doc == nearest[2]
    assert nearest[1].split(".")[1][:4] in (misspelled.rpartition(".")[2][:4].lower())
    options.override(options.default(), f"{nearest[1]}=8")


@pytest.mark.parametrize("unknown", ["train.xyzzy=1", "optimizer.qq=1", "xyzzy.qqq=1", "=1", "qqq"])
def test_nothing_is_named_as_the_nearest_when_nothing_is_near(unknown):
    text = message(options.override, options.default(), unknown)
    assert "nearest" not in text
    section = re.match(r"config\.(\w+)\.", text)
    listed = re.search(r"allowed: (?:options of )?(.*)", text)[1].split(", ")
    assert listed == list(options.OPTIONS.get(section[1] if section else "", options.OPTIONS))


def other_value(name: str) -> str:
    """A value of an option that is not the default."""
    one = option(name)
    if one.kind is bool:
        return str(not one.default)
    if one.choices:
        return next(choice for choice in one.choices if choice != one.default)
    special = {"data.labels": "parity", "train.loss_weights": "label=0.5", "data.features": "features", "data.dir": "x"}
    if name in special:
        return special[name]
    values = [str(value) for value in (one.max, one.min, 2, 0.5, 1) if value is not None]
    for value in values:
        try:
            options.override(made := options.default(), f"{name}={value}")
        except UserError:
            continue
        if made[name.split(".")[0]][name.split(".")[1]] != one.default:
            return value
    raise AssertionError(name)


# Settings with which all options with a condition have no effect, apart from the defaults.
WITHOUT_EFFECT = (
    *("train.objective=masked_autoencoder", "model.mlp=swiglu", "optimizer.schedule=constant", "optimizer.name=sgd"),
)
CONDITIONAL = [name for name in options.names() if option(name).read_by]


@pytest.mark.parametrize("name", CONDITIONAL)
def test_an_option_without_effect_has_the_two_ways_out_that_are_named(name):
    value, base = other_value(name), config_of()
    for assignment in WITHOUT_EFFECT:
        if option(name).unread_reason(name, base) is None:
            options.override(base, assignment)
    options.override(base, f"{name}={value}")
    reason = option(name).unread_reason(name, base)
    assert reason is not None and reason.count("\n") <= 2
    default, condition = re.search(r"allowed: (.*) \(the default\), or (.*)$", reason).groups()
    options.override(base, f"{name}={ast.literal_eval(default)}")
    options.override(base, f"{name}={value}")
    for one in condition.split(" with "):
        one = one.split(" or ")[0]
        target, equals, wanted = one.partition("=")
        if equals:
            options.override(base, f"{target}={ast.literal_eval(wanted)}")
        elif " above " in one:
            target, _, bound = one.partition(" above ")
            options.override(base, f"{target}={float(bound) + (1 if option(target).kind is int else 0.5)}")
        else:
            options.override(base, f"{one.partition(' ')[0]}=cifar10")
    assert option(name).unread_reason(name, base) is None


# --- combinations of options ----------------------------------------------------------------------------------------

# By what is wrong: overrides that are refused, and those that follow the message, of which a pattern takes the values.
COMBINATIONS = {
    "no length": (["train.steps=None"], "exactly one of the two", ["train.steps=3"]),
    "two lengths": (["train.epochs=2"], "exactly one of the two", ["train.steps=None"]),
    "microbatches": (
        ["train.batch_size=10", "train.accumulation=4"],
        "a multiple of config.(.*)",
        ["train.batch_size=12"],
    ),
    "repeats": (
        ["train.batch_size=10", "augment.repeats=4"],
        r"divisor of config.train.batch_size, 10",
        ["augment.repeats=5"],
    ),
    "no split": (["data.test=None"], r"--config.(data.validation=)'(.*)'", ["{0}{1}"]),
    "seeds and auto": (["train.seeds=2", "train.batch_size=auto"], "a number for config.(.*), such", ["{0}=64"]),
    "seeds in a cluster": (
        ["train.seeds=2", "mesh.distributed=True"],
        r"--config.(train.seed=)",
        ["train.seeds=None", "{0}3"],
    ),
    "too large seeds": (["train.seeds=5", "train.seed=2147483646"], r"seeds up to (\d+)", ["train.seed=2147483643"]),
    "seed and seeds": (["train.seeds=1,2", "train.seed=3"], r"allowed: (0) \(the default", ["train.seed={0}"]),
    "weights of no label": (["train.loss_weights=x=1"], "as '(.*)'", ["train.loss_weights={0}"]),
    "weights of zero": (["train.loss_weights=label=0"], "at least one weight above 0", ["train.loss_weights=label=1"]),
    "two crops": (
        ["augment.crop_padding=2", "augment.resized_crop=True"],
        "one of the two",
        ["augment.crop_padding=0"],
    ),
    "areas": (
        ["augment.resized_crop=True", "augment.min_crop_area=.9", "augment.max_crop_area=.5"],
        r"at most max_crop_area, ([\d.]+)",
        ["augment.min_crop_area={0}"],
    ),
    "map without labels": (
        ["train.objective=masked_patches", "model.pooling=map"],
        "allowed: '(token)'",
        ["model.pooling={0}"],
    ),
    "heads": (["model.heads=3"], r"\[(\d+), (\d+)", ["model.heads={1}"]),
    "variant": (["model.variant=X/4"], r"such as '(.*?)'", ["model.variant={0}"]),
    "hybrid": (["model.variant=R50+Q/7"], r"or one of .*, (\S+)$", ["model.variant={0}", "model.width=None"]),
    "token without one": (["model.class_token=False"], "or pool by '(.*)'", ["model.pooling={0}"]),
    "positions": (
        ["model.position=rotary", "model.position_at=input"],
        r"applied at: (\w+)",
        ["model.position_at={0}"],
    ),
    "rotary heads": (["model.position=rotary", "model.heads=8"], r"\[(\d+)", ["model.heads={0}"]),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_is_allowed_once_the_message_is_followed(name):
    wrong, pattern, follow = COMBINATIONS[name]
    text = message(checked, *wrong)
    found = re.search(pattern, text)
    assert found, text
    checked(*wrong, *(assignment.format(*found.groups()) for assignment in follow))


# --- paths and files of weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A file of Google's names, with its model and parameters."""
    model = VisionTransformer(classes=3, patch_size=4, width=16, depth=1, heads=2, mlp_width=16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    parameters = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("runs") / "model.npz"
    weights.save(path, model, parameters)
    return path, model, parameters


@pytest.mark.parametrize(
    "misspelled", ["runs/modle.npz", "runs/modl.npz", "runs/phtos", "run/photos", "RUNS/photos", "phtos"]
)
def test_the_nearest_path_of_a_misspelled_one_is_named_and_works(misspelled, stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    for target in ("runs/model.npz", "runs/photos/model.npz", "photos/model.npz"):
        (tmp_path / target).write_bytes(stored[0].read_bytes())
    text = message(weights.load, misspelled)
    assert text.startswith((f"{misspelled}: there is no such file or directory\n", f"{misspelled!r} is neither a file"))
    weights.load(re.search(r"nearest: ([^,\n]+)", text)[1])


def test_a_name_of_the_hub_below_a_directory_is_told_apart_by_its_url(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "google").mkdir()
    url = re.search(r"use (https://\S+)", message(weights.load, "google/vit-b"))[1]
    placed = tmp_path / "cache" / "vit_jax" / "weights" / "google--vit-b"  # as if it had been downloaded
    placed.mkdir(parents=True)
    (placed / "model.npz").write_bytes(stored[0].read_bytes())
    assert weights.load(url)[0] == stored[1]


# By what is wrong: overrides that are refused, and those that follow the message.
OVERRIDES = {
    "misspelled": ({"clases": 3}, r"nearest: (\w+)", "classes", {"classes": 3}),
    "step of a file": ({"step": 3}, "(omit step)", "omit step", {}),
    "contradiction": ({"heads": 4}, r"omit (\w+)", "heads", {}),
    "classes": ({"classes": "ten"}, "allowed: (an integer)", "an integer", {"classes": 4}),
    "pixels": ({"image_size": "8"}, "(an integer of at least 1)", "an integer of at least 1", {"image_size": 8}),
    "attention pooling": ({"pooling": "map"}, "allowed: (token)", "token", {"pooling": "token"}),
    "dtype": ({"dtype": "float31"}, "such as (float32)", "float32", {"dtype": "float32"}),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_is_allowed_once_the_message_is_followed(name, stored):
    wrong, pattern, advice, followed = OVERRIDES[name]
    text = message(weights.load, stored[0], **wrong)
    assert (found := re.search(pattern, text)) and found[1] == advice, text
    weights.load(stored[0], **followed)


def test_positions_are_saved_once_the_image_size_is_passed(stored, tmp_path):
    model, parameters = stored[1].clone(position="sincos_2d"), stored[2]
    assert "pass image_size=(height, width)" in message(weights.save, tmp_path / "a.npz", model, parameters)
    weights.save(tmp_path / "a.npz", model, parameters, image_size=(8, 8))
    suffix = re.search(r"allowed: .*(\.\w+)", message(weights.save, tmp_path / "a.pth", model, parameters))[1]
    weights.save(tmp_path / f"a{suffix}", model, parameters, image_size=(8, 8))


def test_one_of_several_files_of_weights_works(stored, tmp_path):
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).write_bytes(stored[0].read_bytes())
    text = message(weights.load, tmp_path)
    assert "give one of them" in text
    weights.load(tmp_path / re.search(r"files: (\S+),", text)[1])


def test_weights_given_as_a_run_are_read_with_the_flag_that_is_named(stored, tmp_path, capsys):
    path, image = stored[0], tmp_path / "image.png"
    PIL.Image.new("RGB", (8, 8)).save(image)
    assert predict.main([f"--workdir={path}", str(image)]) == 2
    flag = re.search(r"(--init=\S+)", capsys.readouterr().err)[1]
    assert predict.main([flag, str(image)]) == 0
    assert re.fullmatch(r"\S+image.png  \d .*\n", capsys.readouterr().out)
    call = re.search(r"from Python: (.*)", message(Predictor, path))[1]
    assert eval(call, {"Predictor": Predictor, "of_file": of_file})(image)[0].image == str(image)


@pytest.mark.parametrize("command", [evaluate, features, reconstruct])
def test_a_folder_of_weights_of_another_project_is_not_called_a_damaged_run(command, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_224", "num_classes": 5}')
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "checkpoints").mkdir()  # of a trainer
    assert command.main([f"--workdir={tmp_path}"]) == 2
    text = capsys.readouterr().err
    assert "holds weights, not a run" in text and "restore-config" not in text


def test_a_pooling_and_a_layer_that_a_model_lacks_are_omitted(stored):
    assert "omit --pre_logits" in message(extraction.load, stored[0], pre_logits="label")
    extraction.load(stored[0])


# --- runs and data --------------------------------------------------------------------------------------------------


def test_a_step_that_is_said_to_be_available_is(digits_run):
    manager = CheckpointManager(digits_run, read_only=True)
    step = re.search(r"available steps: (\d+)", message(manager.find, 999))[1]
    assert manager.find(int(step)) == int(step)
    assert "omit 'best' to use the newest" in message(manager.find, "best")
    assert manager.find(None) == int(step)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of twelve images of two classes."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(12):
        path = root / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("L", (8 + index, 8), index).save(path)
    return root


def test_a_folder_is_read_once_the_messages_are_followed(photos, tmp_path):
    known = {"data_dir": photos, "cache_dir": tmp_path}
    assert re.search(r"config.data.dir is not set\n  set it to", message(sources.load, "folder", "train"))
    assert "set config.data.dir to" in message(sources.load, "folder", "train", data_dir=tmp_path / "nothing")
    size = int(
        re.search(r"for example --config\.data\.image_size=(\d+)", message(sources.load, "folder", "train", **known))[1]
    )
    split = re.search(r"allowed: (\w+) \(", message(sources.load, "folder", "tset", image_size=size, **known))[1]
    labels = re.search(r"allowed: (\w+)", message(sources.load, "folder", "train", labels=["x"], **known))[1]
    assert len(sources.load("folder", split, image_size=size, labels=[labels], **known)) == 12


def test_the_directory_of_a_run_that_was_trained_elsewhere_is_given_by_the_flag_that_is_named(
    make_run, photos, tmp_path, monkeypatch
):
    monkeypatch.chdir(photos.parent)
    data = {"name": "folder", "dir": photos.name, "image_size": 8, "test": "train", "cache_dir": str(tmp_path)}
    run = make_run(data=data)
    monkeypatch.chdir(tmp_path)
    parser = commands.parser("evaluate", "")
    commands.add_flags(parser)
    text = message(commands.open_run, parser.parse_args([f"--workdir={run}"]))
    flag = re.search(r"set (--\w+) to the directory", text)[1]
    assert "config" not in text
    opened = commands.open_run(parser.parse_args([f"--workdir={run}", f"{flag}={photos}"]))
    assert len(opened.run.sources["test"]) == 12


@pytest.mark.slow
def test_the_flags_of_transfer_are_named_in_messages_about_its_data(stored, photos, tmp_path):
    flags = [f"--init={stored[0]}", "--data=folder", "--test=train", "--image_size=8", f"--out={tmp_path}"]

    def measure(*more):
        parsed = transfer.parse([*flags, "--methods=knn", "--neighbours=1", *more])
        return transfer.measure(parsed)

    flag = re.search(r"(--\w+) is not set\n  set it to the directory", message(measure))[1]
    text = message(measure, f"{flag}={photos}", "--label=x")
    assert "config." not in text
    label = re.search(r"--label: folder has no 'x'\n  allowed: (\w+)", text)[1]
    assert measure(f"{flag}={photos}", f"--label={label}")[1]["knn/1/accuracy"] == 1


def test_enough_of_a_small_set_is_held_out_once_the_percentage_that_is_named_is_typed(photos, tmp_path):
    data = {"name": "folder", "dir": str(photos), "image_size": 8, "test": "train", "cache_dir": str(tmp_path)}
    config = tiny_config(data=data, train={"batch_size": 4})
    percent = re.search(r"--held_out=(\d+)", message(lr_sweep.plan, config, (0.1,), 2.0).split("\n")[1])[1]
    planned = lr_sweep.plan(config, (0.1,), float(percent))
    pieces = [splits.parse(split, {"train": 12})[0] for split in (planned.train, planned.validation)]
    assert [piece.stop - piece.start for piece in pieces] == [11, 1]


def test_a_batch_that_the_devices_do_not_divide_is_one_that_is_named():
    config = tiny_config(train={"batch_size": 9})
    config.mesh.devices = 4
    config.train.batch_size = int(re.search(r"such as (\d+)", message(setup.check, config))[1])
    setup.check(config)
    config.mesh.devices = 10**6
    config.mesh.devices = int(re.search(r"allowed: 1 to (\d+)", message(setup.check, config))[1])
    config.train.batch_size = config.mesh.devices
    setup.check(config)


def test_a_patch_that_does_not_divide_the_image_is_replaced_by_one_that_is_named():
    config = tiny_config(model={"variant": "Ti/3"})
    patches = re.search(r"patches of ([\d, ]+)", message(setup.check, config))[1].split(", ")
    for patch in patches:
        config.model.variant = f"Ti/{patch}"
        setup.check(config)


@pytest.mark.slow
def test_the_command_that_stores_missing_features_is_followed(make_run, tmp_path):
    run = make_run()
    config = tiny_config(data={"features": str(tmp_path / "features")})
    config.optimizer.trained, config.checkpoint.init_from = ("head/*",), str(run)
    (tmp_path / "features").mkdir()
    text = message(setup.check, config)
    command = shlex.split(re.search(r"python -m (.*)", text)[1].replace("DIR", str(run), 1))
    run_command(*command)
    assert (tmp_path / "features" / "train.npz").is_file()
