"""The files of a run directory: atomic writes, readers of config.json, summary.json and data.json."""

import os
import stat

import pytest

from vit_jax import atomic
from vit_jax.checkpoint import input_spec, run_files
from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.errors import UserError, few, one_line


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    with pytest.raises(KeyError), atomic.replace(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_syncs_the_file_and_then_its_directory(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def record(descriptor):
        synced.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with atomic.replace(tmp_path / "a.csv", "w", newline="") as file:
        file.write("x\r\n")
    assert (tmp_path / "a.csv").read_bytes() == b"x\r\n"
    assert synced == ["file", "directory"]


def test_config_and_summary(tmp_path):
    assert run_files.read_config(tmp_path) is None and run_files.read_summary(tmp_path) is None
    atomic.write_json(tmp_path / run_files.CONFIG, {"train": {"steps": 3}})
    atomic.write_json(tmp_path / run_files.SUMMARY, {"steps": 3})
    assert run_files.read_config(tmp_path) == {"train": {"steps": 3}}
    assert run_files.read_summary(tmp_path) == {"steps": 3}
    for text in ("[1]", "{", '{"train": 3}'):
        (tmp_path / run_files.CONFIG).write_text(text)
        with pytest.raises(UserError, match="restore-config"):
            run_files.read_config(tmp_path)
    (tmp_path / run_files.SUMMARY).write_text("{")
    assert run_files.read_summary(tmp_path) is None


def test_an_input_spec_is_read_as_written(tmp_path):
    assert input_spec.read(tmp_path) is None
    spec = InputSpec("digits", (8, 8, 1), (0.25,), (0.5,), {"label": ("0", "1"), "parity": ("even", "odd")})
    input_spec.write(tmp_path, spec)
    found = input_spec.read(tmp_path)
    assert found == spec and list(found.classes) == ["label", "parity"]
    text = (tmp_path / run_files.DATA).read_text()
    for broken in (text[:-20], text.replace('"mean"', '"means"'), text.replace("0.25", '"x"'), "[]"):
        (tmp_path / run_files.DATA).write_text(broken)
        with pytest.raises(UserError, match=r"data.json cannot be read: .*\n  remove it"):
            input_spec.read(tmp_path)


def test_lists_and_errors_in_messages():
    assert few("abc") == "a, b, c" and few("abcde") == "a, b, c and 2 more" and few([]) == ""
    assert one_line(OSError("one\n  two")) == "one two" and one_line(KeyError()) == "KeyError"
    assert len(one_line("x" * 500)) == 200
