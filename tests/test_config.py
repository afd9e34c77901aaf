"""Options, configs and the command line: a mistake ends with status 2 and at most three lines, before compilation."""

import json
import re
import shlex
import subprocess
import textwrap

import pytest
from helpers import ROOT, run_command
from ml_collections import ConfigDict

from vit_jax import commands, main
from vit_jax import config as options
from vit_jax.config import document
from vit_jax.config.check import check_config
from vit_jax.config.load import option
from vit_jax.config.option import RESUME
from vit_jax.errors import UserError
from vit_jax.models.activations import FORMS
from vit_jax.models.encoder import SCHEDULES
from vit_jax.models.mlp import MLPS
from vit_jax.models.pooling import POOLINGS
from vit_jax.models.positions import POSITIONS
from vit_jax.training import run_directory

CONFIGS = {path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__"}
SIZES = [None, "full", "lite", "Ti", "S", "short", "long", "cpu", "S,long", "cpu,Ti"]
ARGUMENTS = {
    "digits": [None],
    "cifar10": SIZES,
    "cifar100": SIZES,
    "finetune": [
        *("cifar10", "cifar100", "oxford_iiit_pet", "oxford_flowers102", "imagenet2012", "folder"),
        *("cifar10,short", "cifar100,cpu", "folder,probe", "imagenet2012,adamw"),
    ],
    "pretrain": [
        *(None, "imagenet", "imagenet21k", "folder", "cifar100", "cifar100-cpu"),
        *("mae", "mae-cpu", "masked-patches", "masked-patches-cpu"),
    ],
    "photos": [None],
}


def checked(*overrides, config="configs/digits.py"):
    made = options.load(config)
    options.override_all(made, overrides)
    check_config(made)
    return made


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_config_is_valid(name):
    # Fine-tuning takes the model from the file that it starts from.
    required = ["model.variant=B/16", "data.normalization=half", "checkpoint.init_from=ViT-B_16.npz"]
    for argument in ARGUMENTS[name]:
        spec = f"configs/{name}.py" + (f":{argument}" if argument else "")
        config = checked(*(required if name == "finetune" else []), config=spec)
        assert options.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_every_option_is_read_somewhere():
    code = "\n".join(path.read_text() for path in (ROOT / "vit_jax").rglob("*.py") if path.parent.name != "config")
    whole = {"model", "augment"}  # handed on as keyword arguments, which refuse what they do not know
    unread = [
        name
        for name in options.names()
        if name.split(".")[0] not in whole and not re.search(rf"\.{name.split('.')[1]}\b", code)
    ]
    assert unread == []


@pytest.mark.parametrize(
    "assignment, section, key, value",
    [
        ("train.steps=1e3", "train", "steps", 1000),
        ("train.epochs=None", "train", "epochs", None),
        ("data.test=None", "data", "test", None),
        ("train.epochs=7", "train", "epochs", 7.0),
        ("augment.flip=true", "augment", "flip", True),
        ("data.validation=train[98%:]", "data", "validation", "train[98%:]"),
        ("optimizer.learning_rate=3e-4", "optimizer", "learning_rate", 3e-4),
        ("model.class_token=True", "model", "class_token", True),
    ],
)
def test_overrides_are_parsed_to_the_type_of_the_option(assignment, section, key, value):
    config = options.load("configs/digits.py")
    options.override(config, assignment)
    assert config[section][key] == value
    assert type(config[section][key]) is type(value)


def test_a_config_is_unchanged_by_a_round_trip_through_json():
    config = checked("model.dropout=0.1")
    again = options.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert options.differences(config.to_dict(), again.to_dict()) == []
    again.train.seed = 9
    assert options.differences(config.to_dict(), again.to_dict()) == ["train.seed: 0 -> 9"]


# Overrides, and what the error message must contain.
BAD = {
    "trian.steps=5": ["config.trian.steps", "config.train.steps"],
    "train.stepz=5": ["config.train.stepz", "config.train.steps"],
    "model.learning_rate=1": ["config.model.learning_rate", "config.optimizer.learning_rate"],
    "steps=5": ["config.steps", "nearest"],
    "train.steps=abc": ["config.train.steps", "'abc'", "integer"],
    "train.steps=1.5": ["config.train.steps", "1.5", "integer"],
    "train.steps=": ["config.train.steps", "''", "integer"],
    "train.batch_size=0": ["config.train.batch_size", "0", "at least 1"],
    "train.batch_size=-8": ["config.train.batch_size", "-8", "at least 1"],
    "train.batch_size=None": ["config.train.batch_size", "None", "integer"],
    "train.accumulation=7": ["config.train.batch_size", "64", "7"],
    "train.epochs=None": ["steps", "epochs"],
    "train.steps=10 train.epochs=1": ["steps is 10 and config.train.epochs is 1.0", "exactly one of the two"],
    "optimizer.lr=1": ["config.optimizer.lr does not exist (given: '1')", "nearest: config.optimizer.learning_rate"],
    "log.wandb=True": ["config.log.wandb does not exist", "metrics.jsonl", "config.log.tracker=wandb"],
    "train.seeds=0": ["config.train.seeds", "'0'", "0,3,7"],
    "train.seeds=three": ["config.train.seeds", "'three'", "0,3,7"],
    "train.seeds=1,2,1": ["config.train.seeds", "'1,2,1'", "different seeds"],
    "train.seeds=1,-2": ["config.train.seeds", "'1,-2'", "0 to 2147483647"],
    "train.seeds=0,2147483648": ["config.train.seeds", "2147483648", "0 to 2147483647"],
    "train.seeds=2 train.seed=2147483647": ["config.train.seeds is 2", "config.train.seed is 2147483647"],
    "train.seeds=2 mesh.distributed=True": ["config.train.seeds", "config.mesh.distributed", "config.train.seed"],
    "train.seeds=2 train.batch_size=auto": ["config.train.seeds", "config.train.batch_size='auto'"],
    "train.seeds=1,2 train.seed=3": ["config.train.seed is 3", "train.seeds=1,2", "0 (the default)"],
    "train.seeds_at_once=2": ["config.train.seeds_at_once has been removed", "omit it"],
    "train.loss_weights=lable=1": ["config.train.loss_weights is 'lable=1'", "'label=1'"],
    "train.loss_weights=label=0": ["config.train.loss_weights is 'label=0'", "above 0"],
    "log.profile=5:5": ["config.log.profile is '5:5'", "100:110"],
    "augment.crop_area_least=2": ["config.augment.min_crop_area is 2", "from 0.01 to 1"],
    "optimizer.momentum=0.8": [
        "config.optimizer.momentum is 0.8, which has no effect with optimizer.name='adamw'",
        "allowed: 0.9 (the default), or optimizer.name='sgd'",
    ],
    "optimizer.name=sgd optimizer.beta1=0.8": ["config.optimizer.beta1 is 0.8", "optimizer.name='adamw' or 'adam'"],
    "optimizer.schedule=constant optimizer.final_learning_rate=1e-4": ["final_learning_rate is 0.0001", "'constant'"],
    "augment.policy_magnitude=5": ["policy_magnitude is 5.0", "policy='none'", "policy='rand_augment'"],
    "augment.min_crop_area=0.5": ["min_crop_area is 0.5", "resized_crop=False", "resized_crop=True"],
    "augment.crop_border=reflect": ["crop_border is 'reflect'", "crop_padding=0", "'black' (the default)"],
    "augment.erasing_mode=noise": ["erasing_mode is 'noise'", "augment.erasing=0.0", "augment.erasing above 0"],
    "augment.mixup=0 augment.mix_per=batch": ["mixup=0.0 and augment.cutmix=0.0", "mixup above 0 or augment.cutmix"],
    "augment.mix_switch=0.1": ["mix_switch is 0.1", "augment.cutmix=0.0", "augment.cutmix above 0"],
    "augment.fill=black": ["augment.fill is 'black'", "augment.policy='none' and augment.resized_crop=False"],
    "data.dir=/data": ["config.data.dir is '/data'", "data.name='digits'", "data.name other than 'digits'"],
    "model.stochastic_depth_schedule=constant": ["stochastic_depth=0.0", "stochastic_depth above 0"],
    "train.objective=masked_patches train.label_smoothing=0 data.labels=label,parity": [
        "data.labels is 'label,parity'"
    ],
    "optimizer.learning_rate=nan": ["config.optimizer.learning_rate", "nan", "number"],
    "optimizer.learning_rate=inf": ["config.optimizer.learning_rate", "inf"],
    "optimizer.learning_rate=-1": ["config.optimizer.learning_rate", "-1", "at least 0"],
    "optimizer.name=adamv": ["config.optimizer.name", "adamv", "adamw"],
    "optimizer.beta2=1": ["config.optimizer.beta2", "below 1"],
    "augment.flip=maybe": ["config.augment.flip", "maybe", "True or False"],
    "model.variant=Q/4": ["'Q/4'", "Ti, S, B, L, H", "/16"],
    "model.variant=Ti/0": ["'Ti/0'"],
    "model.heads=5": ["heads is 5", "width 64"],
    "model.dropout=1.0": ["config.model.dropout", "below 1"],
    "model.pooling=max": ["config.model.pooling", "'max'", "'token', 'mean', 'token_mean', 'token_register' or 'map'"],
    "model.position=rotory": ["position is 'rotory'", "rotary"],
    "model.position=rotary model.width=12 model.heads=4": ["rotary"],
    "model.position_at=nowhere": ["position_at", "nowhere", "'shared'"],
    "model.mlp=relu": ["mlp is 'relu'", "swiglu"],
    "model.layer_scale=0": ["layer_scale is 0.0", "a number above 0, or None"],
    "model.variant=R+Ti/16": ["'R+Ti/16'", "8x8", "config.data.image_size"],
    "model.class_token=False model.pooling=token": ["class_token", "pooling"],
    "model.variant=Ti/3": ["'Ti/3'", "8x8", "1, 2, 4, 8"],
    "mesh.devices=100": ["config.mesh.devices", "100"],
    "train.objective=masked": ["config.train.objective", "'masked'", "'masked_autoencoder'"],
    "train.loss=hinge": ["config.train.loss", "'hinge'", "'sigmoid'"],
    "train.masked_share=0.5": [
        "config.train.masked_share is 0.5",
        "no effect with train.objective='classify'",
        "None (the",
    ],
    "decoder.width=64": ["decoder.width is 64", "no effect with train.objective='classify'", "128 (the"],
    "train.objective=masked_patches train.label_smoothing=0.2": ["train.label_smoothing is 0.2", "no effect", "0.0"],
    "data.skip_broken=True": ["skip_broken is True", "data.name='folder'"],
    "train.objective=masked_patches train.label_smoothing=0 decoder.depth=1": ["config.decoder.depth is 1"],
    "train.objective=masked_patches train.label_smoothing=0 model.pooling=map": ["pooling is 'map'", "does not train"],
    "train.objective=masked_autoencoder train.label_smoothing=0 model.position=rotary": ["'rotary'", "'input'"],
    "train.objective=masked_autoencoder train.label_smoothing=0 decoder.width=50": ["decoder_width is 50"],
    "train.objective=masked_autoencoder train.label_smoothing=0 model.variant=Ti/8": ["Ti/8", "at least 2 patches"],
    "train.batch_size=63": ["config.train.batch_size", "63", "64"],
    "data.name=cifar11": ["cifar11", "cifar10"],
    "data.train=training": ["training", "train"],
    "data.test=test[100%:]": ["test[100%:]"],
    "data.test=None": ["config.data.test", "config.data.validation"],
    "data.normalization=imagenet": ["imagenet", "1 channels", "set, half"],
    "data.normalization=grey": ["config.data.normalization", "'set', 'half'"],
    "optimizer.layer_decay=1.5": ["config.optimizer.layer_decay", "1.5", "from 0 to 1"],
    "checkpoint.init_head=old": ["config.checkpoint.init_head", "'keep' or 'new'"],
    "model.variant=init_from": ["config.checkpoint.init_from"],
}


def run_main(tmp_path, capsys, monkeypatch, *arguments):
    """The command's status and lines, in this process; fails where it would compile or write a run."""
    monkeypatch.setattr("jax.stages.Lowered.compile", lambda *_: pytest.fail("something was compiled"))
    monkeypatch.chdir(tmp_path)
    status = main.main(list(arguments))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert status == 2, captured
    assert 1 <= len(lines) <= 3, lines
    assert lines[0].startswith("error: ")
    assert not any(tmp_path.rglob("config.json")), "it began to write"
    return captured.err


@pytest.mark.parametrize("typed", BAD)
def test_a_wrong_option_is_refused_with_the_allowed_values(typed, tmp_path, capsys, monkeypatch):
    overrides = [f"--config.{assignment}" for assignment in typed.split()]
    error = run_main(tmp_path, capsys, monkeypatch, "--config=configs/digits.py", *overrides)
    for word in BAD[typed]:
        assert word in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--config"]),
        (["--config=configs/none.py"], ["configs/none.py", "cifar10, cifar100, digits"]),
        (["--config=configs/digits.py:big"], ["argument", "big"]),
        (["--config=configs/cifar10.py:huge"], ["huge", "full, lite, Ti, S", "short, long, cpu"]),
        (["--config=configs/cifar100.py:S,Ti"], ["configs/cifar100.py:S,Ti", "full, lite, Ti, S"]),
        (["--config=configs/finetune.py"], ["configs/finetune.py", "cifar10, cifar100"]),
        (["--config=configs/finetune.py:cifar10"], ["config.checkpoint.init_from", "docs/weights.md"]),
        (["--config=configs/digits.py", "--wrkdir=x"], ["--wrkdir"]),
        (["--config=configs/digits.py", "stray"], ["stray"]),
        (["--config"], ["--config"]),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, words, tmp_path, capsys, monkeypatch):
    error = run_main(tmp_path, capsys, monkeypatch, *arguments)
    for word in words:
        assert word in error


BAD_FILES = {
    "syntax": ("def get_config(:", ["SyntaxError"]),
    "raises": ("def get_config():\n    return 1 / 0", ["ZeroDivisionError"]),
    "nothing": ("x = 1", ["get_config"]),
    "wrong type": ("def get_config():\n    return {}", ["dict", "ConfigDict"]),
    "typo": (
        "from vit_jax import config\ndef get_config():\n    c = config.default()\n    c.train.stpes = 1\n    return c",
        ["stpes"],
    ),
    "by hand": (
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'train': {'steps': 1}})",
        ["missing", "vit_jax.config.default"],
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_broken_config_file_is_reported(kind, tmp_path, capsys, monkeypatch):
    text, words = BAD_FILES[kind]
    file = tmp_path / "bad config.py"
    file.write_text(textwrap.dedent(text))
    error = run_main(tmp_path, capsys, monkeypatch, f"--config={file}")
    for word in words:
        assert word in error


def test_a_run_directory_that_is_not_writable_is_reported(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    error = run_main(tmp_path, capsys, monkeypatch, "--config=configs/digits.py", "--workdir=file/below")
    assert "file/below" in error


def test_the_run_directory_of_another_config_is_refused_and_not_changed(tmp_path, capsys, monkeypatch):
    other = options.load("configs/digits.py").to_dict()
    other["train"]["batch_size"] = 32
    content = json.dumps(other)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    assert main.main(["--config=configs/digits.py", "--workdir=run"]) == 2
    error = capsys.readouterr().err
    assert "train.batch_size: 32 -> 64" in error
    assert len(error.splitlines()) <= 3
    assert (tmp_path / "run" / "config.json").read_text() == content
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "metrics.jsonl"]


def test_a_dataset_that_is_not_prepared_is_reported_without_network(tmp_path, capsys, monkeypatch):

    def refuse(*_, **__):
        raise OSError("unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    arguments = ["--config=configs/cifar10.py", f"--config.data.dir={tmp_path / 'nowhere'}"]
    error = run_main(tmp_path, capsys, monkeypatch, *arguments)
    assert "cifar10" in error
    assert "vit_jax.data.prepare" in error


def test_the_real_command_ends_with_status_2_and_no_traceback(tmp_path):
    arguments = ["--config=configs/digits.py", "--config.trian.steps=5"]
    output = run_command("vit_jax.main", *arguments, cwd=tmp_path, status=2)
    assert "Traceback" not in output and "config.train.steps" in output
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_in_a_handmade_config_are_refused():
    values = options.default().to_dict()
    values["train"]["sneaky"] = 1
    with pytest.raises(UserError, match="sneaky"):
        check_config(ConfigDict(values))


# The policies as they were when they were lists of prefixes in the code of the run directory. "fixed" is the default.
FREE = {
    "data": "dir cache_dir decoded workers ahead worker_timeout resident",
    "train": "steps_per_dispatch max_minutes evaluation_batch_size",
    "checkpoint": "every keep keep_best",
    "mesh": "devices distributed",
    "log": "every report tensorboard tracker profile",
}
CHANGEABLE = {
    "model": "dropout attention_dropout stochastic_depth stochastic_depth_schedule remat attention_kernel dtype",
    "data": "validation test",
    "augment": " ".join(options.OPTIONS["augment"]),
    "optimizer": "learning_rate schedule warmup_steps final_learning_rate weight_decay beta1 beta2 epsilon momentum "
    "layer_decay gradient_clip",
    "train": "steps epochs accumulation loss_weights class_weights label_smoothing evaluate_every",
}


def test_resume_policies():
    policies = [("free", FREE), ("changeable", CHANGEABLE)]
    wanted = {f"{s}.{k}": policy for policy, table in policies for s, keys in table.items() for k in keys.split()}
    assert wanted.keys() <= set(options.names())
    for name in options.names():
        assert option(name).resume == wanted.get(name, "fixed"), name


@pytest.mark.parametrize("name", options.names())
def test_every_option_is_documented_and_its_default_is_allowed(name):
    one = option(name)
    assert one.doc[0].isupper() and one.doc.endswith(".") and "\n" not in one.doc
    one.check(name, one.default)
    for choice in (*one.choices, *one.words):
        one.check(name, choice)
    assert one.resume in RESUME
    for condition in one.conditions:
        for single in getattr(condition, "conditions", [condition]):
            for value in single.values:
                option(single.option).check(single.option, value)
            assert f"`{condition.describe()}`" in document.markdown()


def test_defaults_are_valid():
    config = options.default()
    config.train.steps = 1
    check_config(config)


def test_choices_are_those_of_the_models():
    section = options.OPTIONS["model"]
    assert set(section["position"].choices) == set(POSITIONS)
    assert {*section["pooling"].choices, "none"} == set(POOLINGS)
    assert section["mlp"].choices == tuple(MLPS)
    assert section["gelu"].choices == FORMS
    assert section["stochastic_depth_schedule"].choices == SCHEDULES
    assert set(section["position_at"].choices) == {at for kind in POSITIONS.values() for at in kind.at}


LISTS = [
    ("data.labels", "label", ("label",)),
    ("data.labels", " label , coarse_label ", ("label", "coarse_label")),
    ("optimizer.trained", "head/*", ("head/*",)),
    ("optimizer.frozen", "embedding/*,encoder/*/mlp/*", ("embedding/*", "encoder/*/mlp/*")),
    ("optimizer.frozen", "None", None),
    ("train.loss_weights", "label=1,coarse_label=0.5", (("label", 1.0), ("coarse_label", 0.5))),
    ("log.profile", "100:110", (100, 110)),
    ("train.seeds", "5", 5),
    ("train.seeds", "0,3,7", (0, 3, 7)),
    ("train.seeds", "7,", (7,)),
    ("train.seeds", " 4 , 1 ", (4, 1)),
]


@pytest.mark.parametrize("name, text, value", LISTS)
def test_lists_are_tuples_however_they_are_given(name, text, value):
    section, key = name.split(".")
    by_command, by_file = options.default(), options.default()
    options.override(by_command, f"{name}={text}")
    by_file[section][key] = None if value is None else text
    as_json = json.loads(json.dumps(by_command.to_dict()))
    written_before = {section: {key: None if value is None else text}}
    made = [by_command, by_file, options.from_dict(as_json), options.from_dict(written_before)]
    assert [config[section][key] for config in made] == [value] * 4
    assert options.differences(written_before, {section: {key: value}}) == []
    shown = option(name).text(value)
    assert value is None or option(name).parse(name, shown) == value


@pytest.mark.parametrize(
    "name, texts",
    [
        ("data.labels", ["", "a,,b", ","]),
        ("optimizer.trained", ["", "head/*,,"]),
        ("train.loss_weights", ["", "label", "label=x", "label=-1", "label=inf", "=1", "label=1=2"]),
        ("log.profile", ["", "5", "5:", ":5", "5:5", "6:5", "-1:5", "a:b", "1:2:3", "1.5:2"]),
        ("train.seeds", ["", "0", "-1", "1.5", "three", "1,2,1", "1,-2", "0,2147483648", "1,,2"]),
    ],
)
def test_lists_that_cannot_be_parsed_are_refused(name, texts):
    section, key = name.split(".")
    for text in texts:
        config = options.default()
        with pytest.raises(UserError, match=rf"config.{name} is .*\n  allowed: "):
            options.override(config, f"{name}={text}")
        config.train.steps = 1
        config[section][key] = text
        with pytest.raises(UserError, match=rf"config.{name} is .*\n  allowed: "):
            check_config(config)


@pytest.mark.parametrize("value", [3, 2.5, ("a", 1), [["label"]], {"a": -1}, True])
def test_lists_of_another_type_are_refused(value):
    for name in ("data.labels", "train.loss_weights", "log.profile"):
        with pytest.raises(UserError, match=name):
            option(name).check(name, option(name).convert(value))


RENAMED = {
    "crop_area_least": "min_crop_area",
    "crop_area_most": "max_crop_area",
    "erasing_area_least": "min_erasing_area",
    "erasing_area_most": "max_erasing_area",
}


@pytest.mark.parametrize("alias", RENAMED)
def test_former_names_are_accepted(alias):
    key = RENAMED[alias]
    by_command, by_file = options.default(), options.default()
    options.override(by_command, f"augment.{alias}=0.25")
    by_file.augment.update({alias: 0.25})
    by_dict = options.from_dict({"augment": {alias: 0.25}})
    assert [config.augment[key] for config in (by_command, by_file, by_dict)] == [0.25] * 3
    assert by_file.augment[alias] == 0.25 and alias not in by_file.to_dict()["augment"]
    setattr(by_file.augment, alias, 0.5)
    assert by_file.augment[key] == 0.5
    assert options.differences({"augment": {alias: 0.5}}, {"augment": {key: 0.5}}) == []


def test_former_names_are_unique():
    aliases = [alias for keys in options.OPTIONS.values() for one in keys.values() for alias in one.aliases]
    keys = {key for keys in options.OPTIONS.values() for key in keys}
    assert sorted(aliases) == sorted(RENAMED) and not keys & set(aliases)


def test_removed_options_are_dropped_from_saved_configs():
    old = options.default().to_dict()
    old["train"]["seeds_at_once"] = 4
    config = options.from_dict(old)
    assert "seeds_at_once" not in config.train
    assert options.differences(old, config.to_dict()) == []
    with pytest.raises(AttributeError, match="seeds_at_once has been removed"):
        config.train.seeds_at_once = 2


def test_saved_configs_may_have_values_that_nothing_reads():
    config = options.from_dict({"optimizer": {"momentum": 0.5}, "train": {"steps": 1}})
    assert config.optimizer.momentum == 0.5
    with pytest.raises(UserError, match="has no effect"):
        check_config(config)


def test_differences_by_policy():
    old = {"train": {"steps": 1, "seed": 0}, "log": {"every": 1}, "other": {"x": 1}}
    new = {"train": {"steps": 2, "seed": 1}, "log": {"every": 2}, "other": {"x": 2}}
    assert options.differences(old, new, resume=("free",)) == ["log.every: 1 -> 2"]
    assert options.differences(old, new, resume=("changeable",)) == ["train.steps: 1 -> 2"]
    assert options.differences(old, new, resume=("fixed",)) == ["other.x: 1 -> 2", "train.seed: 0 -> 1"]
    seeds = options.differences({"train": {"seeds": "3,"}}, {"train": {"seeds": 2}})
    assert seeds == ["train.seeds: 3, -> 2"]


def test_the_page_of_options_is_up_to_date():
    assert document.PATH.read_text() == document.markdown(), "run python -m vit_jax.config.document"


def test_the_page_has_every_option_and_its_meaning():
    page = document.markdown()
    for name in options.names():
        section, key = name.split(".")
        part = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
        assert f"| `{key}` |" in part and option(name).doc in part
    for section in options.OPTIONS:
        assert document.SECTIONS[section][1:] in page


def test_help_is_short(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 45 and max(map(len, text.splitlines())) <= 106
    assert "--workdir" in text and "docs/options.md" in text and "--config=cifar10 --help" in text


def test_help_lists_the_configs_and_their_arguments(capsys):
    assert main.main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("\nconfigs, ")[2]
    parts = re.split(r"\n  (?=\w)", listed)[1:]
    assert [part.partition("\n")[0] for part in parts] == sorted(CONFIGS)
    for part in parts:
        name = part.partition("\n")[0]
        words = {word for argument in ARGUMENTS[name] if argument for word in argument.split(",")}
        assert "as for cifar10" in part or all(word in part for word in words), part


def test_help_on_a_config_shows_its_options(capsys):
    overrides = ["--config.optimizer.name=sgd", "--config.train.seeds=0,3", "--help"]
    assert main.main(["--config=configs/cifar10.py", *overrides]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("* name = sgd ") for line in lines)
    assert any(line.startswith("* seeds = 0,3 ") for line in lines)
    assert any(line.startswith("* erasing = 0.25 ") for line in lines)
    assert any(line.startswith("  momentum = 0.9 ") for line in lines)
    assert not any(line[2:].startswith(("beta1 =", "policy_magnitude =", "min_crop_area =")) for line in lines)
    assert not any(line.startswith("decoder:") for line in lines)
    for section in set(options.OPTIONS) - {"decoder"}:
        assert f"\n{section}: {document.SECTIONS[section]}" in text
    shown = " ".join(text.split())
    for name in ("train.steps_per_dispatch", "model.dtype", "log.profile"):
        assert option(name).doc in shown


def test_help_marks_options_that_are_set_without_effect(capsys):
    """The config would be refused; its help still shows the option that has to go."""
    assert main.main(["--config=configs/digits.py", "--config.optimizer.momentum=0.5", "--help"]) == 0
    assert any(line.startswith("* momentum = 0.5 ") for line in capsys.readouterr().out.splitlines())


def test_help_does_not_import_jax(tmp_path):
    script = """
import sys
from vit_jax import main
assert main.main(sys.argv[1:]) == 0
assert "jax" not in sys.modules
"""
    for arguments in (["--help"], ["--config=configs/cifar10.py", "--help"]):
        assert len(run_command(script, *arguments, cwd=tmp_path, stderr=subprocess.PIPE)) > 500


FIXTURES = sorted((ROOT / "tests" / "fixtures").rglob("config.json"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.parent.name)
def test_configs_of_earlier_versions_are_read(path):
    old = json.loads(path.read_text())
    config = options.from_dict(old)
    assert options.differences(options.complete(old), config.to_dict()) == []
    assert isinstance(config.data.labels, tuple)


def documented_commands():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]:
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        for line in text.splitlines():
            if re.match(r"\s+(python -m vit_jax\.main|(\./run\.sh|vit-jax) train) .*--config=[a-z]", line):
                yield line.split("#")[0].strip()


@pytest.mark.parametrize("command", sorted(set(documented_commands())))
def test_documented_commands_have_valid_configs(command):
    arguments = shlex.split(command.replace("$", ""))
    config = options.load(next(a.removeprefix("--config=") for a in arguments if a.startswith("--config=")))
    options.override_all(config, [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")])
    if config.checkpoint.init_from and config.model.variant == options.INIT_FROM:  # there is no such file here
        config.model.variant, config.data.normalization = "B/16", "half"
    check_config(config)


def test_resuming_with_another_config(tmp_path):
    """Saved under former names and with lists as text; what may change is returned, the rest is refused."""
    old = options.load("configs/digits.py").to_dict()
    del old["log"], old["augment"]["min_crop_area"]
    old["data"]["labels"] = "label"
    old["augment"]["crop_area_least"] = 0.08
    old["train"]["seeds_at_once"] = None
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    config = options.load("configs/digits.py")
    assert run_directory.claim(tmp_path, config) == []
    config.log.every, config.checkpoint.keep = 7, 5
    config.train.epochs, config.augment.flip = 300, True
    changes = ["augment.flip: False -> True", "train.epochs: 200.0 -> 300.0"]
    assert run_directory.claim(tmp_path, config) == changes
    config.data.labels = "label,parity"
    with pytest.raises(UserError, match=r"differs: data.labels: label -> label,parity\n"):
        run_directory.claim(tmp_path, config)


def test_references_between_fields_of_a_config_file_stay(tmp_path):
    file = tmp_path / "linked.py"
    file.write_text(
        "from vit_jax import config\n"
        "def get_config():\n"
        "    c = config.default()\n"
        "    c.train.steps = 100\n"
        "    c.optimizer.warmup_steps = c.train.get_ref('steps') // 10\n"
        "    return c\n"
    )
    assert commands.make_config(str(file), ["train.steps=1000"]).optimizer.warmup_steps == 100


def test_what_the_command_line_makes_pointless_is_reset_and_not_refused():
    config = commands.make_config("configs/cifar10.py", ["augment.mixup=0", "augment.cutmix=0"])
    assert config.augment.mix_probability == options.OPTIONS["augment"]["mix_probability"].default
    with pytest.raises(UserError, match="mix_probability"):
        overrides = ["augment.mixup=0", "augment.cutmix=0", "augment.mix_probability=0.3"]
        commands.make_config("configs/cifar10.py", overrides)
