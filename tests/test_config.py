"""Bad input ends with exit status 2, three lines at most that name the thing, and nothing written or compiled."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import main
from vit_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
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
}


def checked(*overrides, config="configs/digits.py"):
    made = options.load(config)
    for assignment in overrides:
        options.override(made, assignment)
    options.check(made)
    return made


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_config_passes_its_check(name):
    # What starts from a file takes its model from there.
    given = ["model.variant=B/16", "data.normalization=half"] if name == "finetune" else []
    for argument in ARGUMENTS[name]:
        checked(*given, config=f"configs/{name}.py" + (f":{argument}" if argument else ""))


def test_every_option_is_read_somewhere():
    code = "\n".join(path.read_text() for path in (ROOT / "vit_jax").rglob("*.py") if path.name != "config.py")
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
def test_overrides_have_the_options_type(assignment, section, key, value):
    config = options.load("configs/digits.py")
    options.override(config, assignment)
    assert config[section][key] == value
    assert type(config[section][key]) is type(value)


def test_a_config_survives_its_json():
    config = checked("model.dropout=0.1")
    again = options.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert options.differences(config.to_dict(), again.to_dict()) == []
    again.train.seed = 9
    assert options.differences(config.to_dict(), again.to_dict()) == ["train.seed: 0 -> 9"]


# What is typed, and what the message must name.
BAD = {
    "trian.steps=5": ["config.trian.steps", "config.train.steps"],
    "train.stepz=5": ["config.train.stepz", "config.train.steps"],
    "model.learning_rate=1": ["config.model.learning_rate", "config.optimizer.learning_rate"],
    "steps=5": ["config.steps", "nearest"],
    "train.steps=abc": ["config.train.steps", "'abc'", "whole number"],
    "train.steps=1.5": ["config.train.steps", "1.5", "whole number"],
    "train.steps=": ["config.train.steps", "''", "whole number"],
    "train.batch_size=0": ["config.train.batch_size", "0", "at least 1"],
    "train.batch_size=-8": ["config.train.batch_size", "-8", "at least 1"],
    "train.batch_size=None": ["config.train.batch_size", "None", "whole number"],
    "train.accumulation=7": ["config.train.batch_size", "64", "7"],
    "train.epochs=None": ["steps", "epochs"],
    "train.steps=10": ["either steps or epochs"],
    "train.seeds=0": ["config.train.seeds", "'0'", "0,3,7"],
    "train.seeds=three": ["config.train.seeds", "'three'", "0,3,7"],
    "train.seeds=1,2,1": ["config.train.seeds", "'1,2,1'", "different seeds"],
    "train.seeds=1,-2": ["config.train.seeds", "'1,-2'", "0 to 2147483647"],
    "train.seeds=0,2147483648": ["config.train.seeds", "2147483648", "0 to 2147483647"],
    "train.seeds=2 train.seed=2147483647": ["config.train.seeds", "'2'"],
    "train.seeds=2 mesh.distributed=True": ["config.train.seeds", "config.mesh.distributed", "config.train.seed"],
    "train.seeds=2 train.batch_size=auto": ["config.train.seeds", "config.train.batch_size='auto'"],
    "train.seeds=2 train.seeds_at_once=2 log.profile=1:2": ["config.log.profile='1:2'", "seeds_at_once=1"],
    "train.seeds_at_once=0": ["config.train.seeds_at_once", "at least 1"],
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
    "model.pooling=max": ["config.model.pooling", "'max'", "'token' or 'mean' or 'map'"],
    "model.position=rotory": ["position is 'rotory'", "rotary"],
    "model.position=rotary model.width=12 model.heads=4": ["rotary"],
    "model.position_at=nowhere": ["position_at", "nowhere"],
    "model.mlp=relu": ["mlp is 'relu'", "swiglu"],
    "model.layer_scale=0": ["layer_scale", "above 0"],
    "model.variant=R+Ti/16": ["'R+Ti/16'", "8x8", "config.data.image_size"],
    "model.class_token=False model.pooling=token": ["class_token", "pooling"],
    "model.variant=Ti/3": ["'Ti/3'", "8x8", "1, 2, 4, 8"],
    "mesh.devices=100": ["config.mesh.devices", "100"],
    "train.objective=masked": ["config.train.objective", "'masked'", "'masked_autoencoder'"],
    "train.loss=hinge": ["config.train.loss", "'hinge'", "'sigmoid'"],
    "train.masked_share=0.5": ["config.train.masked_share is 0.5", "'classify' does not read", "=None"],
    "decoder.width=64": ["config.decoder.width is 64", "'classify' does not read", "=128"],
    "train.objective=masked_patches": ["config.train.label_smoothing is 0.1", "does not read", "=0.0"],
    "train.objective=masked_patches train.label_smoothing=0 decoder.depth=1": ["config.decoder.depth is 1"],
    "train.objective=masked_patches train.label_smoothing=0 model.pooling=map": ["pooling 'map'", "does not train"],
    "train.objective=masked_autoencoder train.label_smoothing=0 model.position=rotary": ["'rotary'", "'input'"],
    "train.objective=masked_autoencoder train.label_smoothing=0 decoder.width=50": ["decoder's width is 50"],
    "train.objective=masked_autoencoder train.label_smoothing=0 model.variant=Ti/8": ["1 patch", "must be two"],
    "train.batch_size=63": ["config.train.batch_size", "63", "64"],
    "data.name=cifar11": ["cifar11", "cifar10"],
    "data.train=training": ["training", "train"],
    "data.test=test[100%:]": ["test[100%:]"],
    "data.test=None": ["config.data.test", "config.data.validation"],
    "data.normalization=imagenet": ["imagenet", "1 channels", "set, half"],
    "data.normalization=grey": ["config.data.normalization", "'set' or 'half'"],
    "optimizer.layer_decay=1.5": ["config.optimizer.layer_decay", "1.5", "at least 0"],
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
def test_a_bad_option_is_named_with_the_way_out(typed, tmp_path, capsys, monkeypatch):
    overrides = [f"--config.{assignment}" for assignment in typed.split()]
    error = run_main(tmp_path, capsys, monkeypatch, "--config=configs/digits.py", *overrides)
    for word in BAD[typed]:
        assert word in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--config"]),
        (["--config=configs/none.py"], ["configs/none.py", "configs/digits.py"]),
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
def test_a_bad_command_line_is_explained(arguments, words, tmp_path, capsys, monkeypatch):
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
def test_a_bad_config_file_is_explained(kind, tmp_path, capsys, monkeypatch):
    text, words = BAD_FILES[kind]
    file = tmp_path / "bad config.py"
    file.write_text(textwrap.dedent(text))
    error = run_main(tmp_path, capsys, monkeypatch, f"--config={file}")
    for word in words:
        assert word in error


def test_a_workdir_that_cannot_be_written_to_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    error = run_main(tmp_path, capsys, monkeypatch, "--config=configs/digits.py", "--workdir=file/below")
    assert "file/below" in error


def test_a_workdir_of_another_config_is_left_alone_and_the_difference_shown(tmp_path, capsys, monkeypatch):
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


def test_a_set_that_is_not_prepared_is_said_at_once_without_network(tmp_path, capsys, monkeypatch):

    def refuse(*_, **__):
        raise OSError("unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    arguments = ["--config=configs/cifar10.py", f"--config.data.dir={tmp_path / 'nowhere'}"]
    error = run_main(tmp_path, capsys, monkeypatch, *arguments)
    assert "cifar10" in error
    assert "vit_jax.data.prepare" in error


def test_the_real_command_ends_with_status_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "vit_jax.main", "--config=configs/digits.py", "--config.trian.steps=5"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "config.train.steps" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        main.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for name in options.names():
        assert name in text


def test_a_config_made_by_hand_cannot_smuggle_in_an_unknown_key():
    values = options.default().to_dict()
    values["train"]["sneaky"] = 1
    with pytest.raises(UserError, match="sneaky"):
        options.check(ConfigDict(values))
