"""Mistakes on the command line: named in at most three lines, with what to type instead, before anything is written."""

import pytest
from helpers import ROOT

from vit_jax import evaluate, main, predict, sweep

DIGITS = f"--config={ROOT}/configs/digits.py"
# A command, its arguments, and what the message must contain.
MISTAKES = {
    "empty_workdir": (main, [DIGITS, "--workdir="], "--workdir= is empty"),
    "empty_workdir_of_a_sweep": (sweep, [DIGITS, "--rates=1,2", "--workdir", ""], "--workdir= is empty"),
    "empty_workdir_of_predict": (predict, ["--workdir", "", "a.png"], "--workdir= is empty"),
    "empty_csv": (predict, ["--workdir=x", "--csv=", "a.png"], "--csv= is empty"),
    "empty_data_dir": (evaluate, ["--workdir=x", "--data_dir="], "--data_dir= is empty"),
    "long_dash": (main, ["\u2014config=c.py"], "type --config=c.py"),
    "two_short_dashes": (main, [DIGITS, "\u2013\u2013config.model.depth=1"], "type --config.model.depth=1"),
    "minus_signs": (evaluate, ["\u2212\u2212workdir=x"], "type --workdir=x"),
    "dash_and_hyphen": (predict, ["-\u2013workdir=x", "a.png"], "type --workdir=x"),
    "one_hyphen": (main, ["-config=c.py"], "nearest: --config=c.py"),
    "no_hyphens": (main, ["config=c.py"], "nearest: --config=c.py"),
    "file_alone": (main, ["configs/digits.py"], "nearest: --config=configs/digits.py"),
    "option_without_config": (main, [DIGITS, "--model.depth=1"], "nearest: --config.model.depth"),
    "option_without_section": (main, [DIGITS, "--batch_size=8"], "nearest: --config.train.batch_size"),
    "option_with_a_hyphen": (main, [DIGITS, "--learning-rate", "1"], "nearest: --config.optimizer.learning_rate"),
    "no_value_at_the_end": (main, [DIGITS, "--config.data.dir"], "config.data.dir has no value"),
    "no_value_before_another": (main, [DIGITS, "--config.data.dir", "--workdir=x"], "config.data.dir has no value"),
    "config_without_value": (main, ["--config"], "argument --config: expected one argument"),
    "nothing_required": (
        evaluate,
        [],
        "one of the arguments --workdir --init is required\n  see python -m vit_jax.eval",
    ),
    "not_a_number": (evaluate, ["--workdir=x", "--step=one"], "argument --step: invalid int value: 'one'\n  see"),
    "unknown_flag": (predict, ["--workdir=x", "a.png", "--no_such_flag"], "--no_such_flag\n  see python -m vit_jax.pr"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_with_what_to_type(kind, tmp_path, monkeypatch, capsys):
    command, arguments, expected = MISTAKES[kind]
    monkeypatch.chdir(tmp_path)
    try:
        status = command.main(arguments)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "") and printed.err.startswith("error: ")
    assert expected in printed.err and printed.err.count("\n") <= 3
    assert not list(tmp_path.iterdir())


def test_a_file_whose_name_begins_with_a_dash_is_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "\u2014a.png").touch()
    assert predict.main(["--workdir=x", "\u2014a.png"]) == 2
    assert "holds no run" in capsys.readouterr().err


PARTS = {"checkpoints": "is a part of the run", "config.json": "is a part of the run", "..": "use one of those in it"}


@pytest.mark.parametrize("part", PARTS)
def test_a_path_beside_the_run_directory_leads_to_it(part, digits_run, capsys):
    assert evaluate.main([f"--workdir={digits_run}/{part}"]) == 2
    message = capsys.readouterr().err
    assert PARTS[part] in message and digits_run.name in message
