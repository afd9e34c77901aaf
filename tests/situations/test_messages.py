"""Every error message in the source: three lines at most, what is wrong, a way out, plain English; broad excepts."""

import ast
import functools
import re

import pytest
from helpers_messages import MESSAGES, parsed
from test_architecture import WORDS

# Messages that are those of another error, with what they are about before them: the other one has the way out.
PASSED_ON = {
    ("checkpoint/proof.py", "_attempt"): "the way out is that of `_way_out`",
    ("checkpoint/manager.py", "content"): "of checkpoint.integrity",
    ("checkpoint/manager.py", "read_part"): "of checkpoint.integrity",
    ("commands.py", "flags_named"): "of what the command does",
    ("config/check.py", "_check_model"): "of models.checks",
    ("config/module.py", "_errors"): "of the config file, with its line",
    ("finetune.py", "_data"): "of configs/finetune.py",
    ("convert.py", "_flags_named"): "of vit_jax.weights",
    ("data/splits.py", "parse"): "of its own function `_error`",
    ("data/splits.py", "_parse_part"): "of its own function `_error`",
    ("sharding/multihost.py", "on_rank_0"): "of the action, on another rank",
    ("summary.py", "summarise"): "of models.checks",
    ("training/init_from.py", "_model_options"): "of models.variants",
    ("training/multi_seed.py", "_train_all"): "of the run of a seed",
    ("training/recovery.py", "_report"): "of its callers, which pass the way out",
    ("weights/hub.py", "_download"): "of weights.files",
    ("weights/load.py", "as_user_error"): "of weights and models.checks",
    ("weights/save.py", "save"): "of models.checks",
    ("weights/towers.py", "describe"): "of the families of weights",
}
# Where every exception is caught, and why: a test checks that its text is kept, or the exception raised again.
BROAD = {
    ("atomic.py", "replace"): "removes the scratch file and raises again",
    ("checkpoint/inventory.py", "verified"): "Orbax and TensorStore raise many types; the files show which is damage",
    ("checkpoint/manager.py", "_save_alone"): "an error in a thread would be lost; it is reported as a failed save",
    ("checkpoint/manager.py", "_save_in_cluster"): "the other processes must learn of it; reported as a failed save",
    ("config/module.py", "_errors"): "a config file is a user's program, which may raise anything",
    ("checkpoint/proof.py", "_attempt"): "whatever the storage raises for this path, it cannot hold checkpoints",
    ("checkpoint/proof.py", "read_back"): "Orbax and TensorStore raise many types; the files show which is damage",
    ("data/arrays.py", "_load"): "zipfile and NumPy raise many types for damaged files",
    ("data/arrays.py", "_member"): "zipfile, zlib and NumPy raise many types for damaged files",
    ("data/image_metadata.py", "_orientation"): "Pillow raises many types for damaged EXIF data, which is ignored",
    ("data/images.py", "_decode_file"): "Pillow's decoders raise many types for damaged files",
    ("data/images.py", "convert"): "Pillow's decoders raise many types for damaged files",
    ("data/images.py", "load"): "Pillow's decoders raise many types for damaged files",
    ("data/stream.py", "_work"): "an error in a thread would be lost; it ends the run",
    ("data/tfds.py", "builder_of"): "TFDS raises many types for files that it cannot read",
    ("data/tfds.py", "read"): "array_record and protobuf raise many types for damaged data",
    ("report.py", "_try_to_write"): "a report that fails must not fail the run that has finished",
    ("report_evaluation.py", "attempt"): "a report without one of its parts says so",
    ("report_evaluation.py", "evaluate"): "a report without an evaluation says so",
    ("runtime/attention_choice.py", "choose"): "compilers and drivers raise many types; the next backend may work",
    ("terminal.py", "_run"): "errors of the machine are explained, all others raised again",
    ("training/environment.py", "_fact"): "a fact about the machine must never end a run",
    ("training/trackers.py", "_work"): "a tracker may raise anything; it is reported, and the run continues",
    ("training/saving.py", "rescue"): "the error that ends the run is the one to report",
    ("weights/hub.py", "_from_hub"): "the HTTP client of huggingface_hub depends on its version",
    ("weights/hub.py", "sibling"): "the HTTP client of huggingface_hub depends on its version",
    ("weights/npz.py", "_npy_header"): "Python's parser raises many types for a damaged header",
    ("weights/tokenizer.py", "token_ids"): "tokenizers raises Exception itself for a damaged file",
}
# How the line with the way out begins: a list of what is there or allowed, or what to do.
LISTS = (
    r"(allowed|declared|expected|available|known|nearest|supported|names|default|it has|(it )?contains|parameters)"
    r"\b[^:]{0,40}:"
)
VERBS = (
    *("add", "average", "change", "check", "choose", "convert", "copy", "correct", "create"),
    *("decrease", "delete", "download", "draw", "evaluate", "fix", "for", "free", "freeze"),
    *("give", "install", "leave", "lower", "merge", "move", "name", "omit", "on", "open", "pass"),
    *("predict", "prepare", "put", "raise", "recompute", "remove", "rename", "repair", "restore"),
    *("run", "save", "see", "set", "start", "train", "try", "type", "unset", "update"),
    *("use", "verify", "wait", "write"),
)
# Words for messages alone, besides those of test_architecture.
SPELLING = {
    r"\bmisspelt\b|\bcolour|\bnormalis|\brecognis|\bquantis|\bcentre\b": "American spelling",
    r"\bwhilst\b|\bought\b|\bshall\b|\bthereof\b|\bhitherto\b|\bwhence\b|\bunto\b": "plain words",
}


def has_way_out(text: str) -> bool:
    """Whether a line after the first lists what is allowed, or says what to do."""
    for line in text.split("\n")[1:]:
        if re.match(LISTS, line.lstrip()) or re.match(r" *to \w+ [^:]*: ", line) or "--config." in line:
            return True
        if re.search(rf"(^ *\(?|[,:;] |\botherwise |\b(if|or) [^,]*, |\bor )({'|'.join(VERBS)})\b", line):
            return True
    return False


def shown(rows: list[tuple[str, str, int, str]]) -> str:
    return "\n".join(["", *(f"vit_jax/{file}:{line} ({function}): {text!r}" for file, function, line, text in rows)])


def test_messages_are_found():
    assert len(MESSAGES) > 250 and len({file for file, *_ in MESSAGES}) > 50


def test_a_message_has_three_lines_at_most():
    wrong = [row for row in MESSAGES if row[3].count("\n") > 2]
    assert not wrong, shown(wrong)


def test_a_message_names_what_is_wrong():
    wrong = [row for row in MESSAGES if "{" not in row[3] and not re.search(r"--\w+|config\.\w+|'\w+'", row[3])]
    assert not [
        row for row in wrong if not re.match(r"the file|timm's|no further|[\w.]+ (is|has) |[\w.]+: ", row[3])
    ], shown(wrong)


def test_a_message_has_a_way_out():
    wrong = [row for row in MESSAGES if not has_way_out(row[3]) and row[:2] not in PASSED_ON]
    assert not wrong, shown(wrong)


def test_a_message_that_is_passed_on_is_that_of_another_error():
    rows = [row for row in MESSAGES if row[:2] in PASSED_ON and not has_way_out(row[3])]
    assert {row[:2] for row in rows} == set(PASSED_ON)
    assert not [row for row in rows if not re.search("error|{message}", row[3])], shown(rows)


@pytest.mark.parametrize("word", WORDS | SPELLING)
def test_a_message_is_in_plain_english(word):
    wrong = [row for row in MESSAGES if re.search(word, re.sub(r"\{[^{}]*\}", "", row[3]))]
    assert not wrong, f"write {(WORDS | SPELLING)[word]}: {shown(wrong)}"


@functools.cache
def broad_handlers() -> list[tuple[tuple[str, str], ast.AST]]:
    """(file, function) and node of every `except Exception`, bare `except` and `suppress(Exception)`."""
    found = []
    for file, tree in parsed():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = "Exception" if node.type is None else ast.unparse(node.type)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                caught = " ".join(map(ast.unparse, node.args))
            else:
                continue
            if re.search(r"\b(Base)?Exception\b", caught):
                around = [f for f in functions if f.lineno <= node.lineno <= f.end_lineno]
                found.append(((file, max(around, key=lambda f: f.lineno).name), node))
    return found


def test_every_exception_is_caught_only_where_a_reason_is_stated():
    assert {where for where, _ in broad_handlers()} <= set(BROAD)


@pytest.mark.parametrize("where", [pytest.param(where, id=":".join(where)) for where in BROAD])
def test_a_broad_except_keeps_the_text_of_the_error_or_raises_it_again(where):
    for node in (node for found, node in broad_handlers() if found == where):
        assert isinstance(node, ast.ExceptHandler), "suppress(Exception) says nothing"
        used = {part.id for part in ast.walk(ast.Module(node.body, [])) if isinstance(part, ast.Name)}
        raised = any(isinstance(part, ast.Raise) and part.exc is None for part in ast.walk(node))
        assert raised or (node.name and node.name in used)
