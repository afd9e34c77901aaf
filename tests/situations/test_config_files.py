"""Config files are Python modules: whatever Python accepts works, and mistakes are named with file and line."""

import os
import pickle
import random
import re
import sys

import pytest
from helpers import THOROUGH

from vit_jax import commands
from vit_jax import config as options
from vit_jax.errors import UserError

MAKE = """
from vit_jax import config as options

def get_config({parameters}):
    c = options.default()
    c.model.update(variant="Ti/2", width={width}, depth=1, heads=2, mlp_width=16)
    c.train.update(batch_size=8, steps=2)
    return {returned}
"""


def source(width="48", returned="c", parameters="", before="", after="") -> str:
    """A config file that sets config.model.width."""
    return before + MAKE.format(width=width, returned=returned, parameters=parameters) + after


DATACLASS = """from __future__ import annotations
import dataclasses
@dataclasses.dataclass
class Size:
    width: int = 48
    inner: Size | None = None
"""
PICKLED = "import copy, pickle\nclass Size:\n    width = 48\n"
REFERENCES = """
def refer(c):
    c.model.width = c.model.get_ref("depth") * 48
    return c
"""
# Files, the config as it is typed on the command line, and the width that it sets.
WORKING = {
    "dataclass": ({"c.py": source("Size().width", before=DATACLASS)}, "c.py"),
    "named_tuple": (
        {"c.py": source("Size().width", before="import typing\nclass Size(typing.NamedTuple):\n    width: int = 48\n")},
        "c.py",
    ),
    "sibling": ({"c.py": source("common.WIDTH", before="import common\n"), "common.py": "WIDTH = 48"}, "c.py"),
    "sibling_in_get_config": (
        {"c.py": source("__import__('common_2').WIDTH"), "common_2.py": "WIDTH = 48"},
        "c.py",
    ),
    "sibling_named_as_a_module_in_use": (
        {"c.py": source("helpers.WIDTH", before="import helpers\n"), "helpers.py": "WIDTH = 48"},
        "c.py",
    ),
    "sibling_of_a_sibling": (
        {"c.py": source("one.WIDTH", before="import one\n"), "one.py": "from two import WIDTH", "two.py": "WIDTH = 48"},
        "c.py",
    ),
    "sibling_package": (
        {"c.py": source("sizes.small.WIDTH", before="import sizes.small\n"), "sizes/small.py": "WIDTH = 48"},
        "c.py",
    ),
    "relative_import": (
        {
            "configs/c.py": source("WIDTH", before="from .common import WIDTH\n"),
            "configs/common.py": "WIDTH = 48",
            "configs/__init__.py": "",
        },
        "configs/c.py",
    ),
    "relative_import_of_the_parent": (
        {
            "project/inner/c.py": source("WIDTH", before="from ..common import WIDTH\n"),
            "project/inner/__init__.py": "",
            "project/common.py": "WIDTH = 48",
            "project/__init__.py": "",
        },
        "project/inner/c.py",
    ),
    "import_of_its_own_package": (
        {
            "my_configs/c.py": source("WIDTH", before="from my_configs.common import WIDTH\n"),
            "my_configs/common.py": "WIDTH = 48",
            "my_configs/__init__.py": "",
        },
        "my_configs/c.py",
    ),
    "base_config": (
        {
            "c.py": "import base\ndef get_config():\n    c = base.get_config()\n    c.model.width = 48\n    return c",
            "base.py": source("32"),
        },
        "c.py",
    ),
    "frozen": ({"c.py": source(returned="__import__('ml_collections').FrozenConfigDict(c)")}, "c.py"),
    "plain_config_dict": ({"c.py": source(returned="__import__('ml_collections').ConfigDict(c.to_dict())")}, "c.py"),
    "references": ({"c.py": source("16", returned="refer(c)", after=REFERENCES)}, "c.py"),
    "lambda": ({"c.py": source().replace("get_config", "make") + "get_config = lambda: make()"}, "c.py"),
    "partial": (
        {"c.py": source("w", parameters="w") + "import functools\nget_config = functools.partial(get_config, 48)"},
        "c.py",
    ),
    "class": (
        {"c.py": source().replace("get_config", "make") + "class get_config:\n    def __new__(cls): return make()"},
        "c.py",
    ),
    "argument": ({"c.py": source("int(w)", parameters="w")}, "c.py:48"),
    "argument_with_a_default": ({"c.py": source("int(w)", parameters="w='48'")}, "c.py"),
    "argument_among_keywords": ({"c.py": source("int(w)", parameters="w='32', *, x=1, **more")}, "c.py:48"),
    "argument_with_colons": ({"c.py": source("int(w.split(':')[1])", parameters="w")}, "c.py:a:48:b"),
    "long_argument": ({"c.py": source("len(w) // 10", parameters="w")}, "c.py:" + 480 * "x"),
    "colons_and_spaces": ({"a: dir:with/c 1.py": source("int(w)", parameters="w")}, "a: dir:with/c 1.py:48"),
    "py_in_a_directory": ({"a.py:b/c.py": source()}, "a.py:b/c.py"),
    "brackets_and_other_scripts": ({"[é] 数/c.py": source()}, "[é] 数/c.py"),
    "no_suffix": ({"config": source()}, "config"),
    "dots_in_its_name": ({"v1.2.py": source()}, "v1.2.py"),
    "byte_order_mark": ({"c.py": "\ufeff" + source()}, "c.py"),
    "latin_1": ({"c.py": ("# coding: latin-1\n" + source(before="# é\n")).encode("latin-1")}, "c.py"),
    "named_random": ({"random.py": source("random.Random(0).randint(48, 48)", before="import random\n")}, "random.py"),
    "named_jax": ({"jax.py": source("jax.numpy.int32(48).item()", before="import jax\n")}, "jax.py"),
    "named_vit_jax": ({"vit_jax.py": source()}, "vit_jax.py"),
    "beside_numpy": (
        {"c.py": source("int(numpy.int32(48))", before="import numpy\n"), "numpy.py": "raise ImportError"},
        "c.py",
    ),
    "beside_a_standard_module": (
        {"c.py": source("48 if colorsys.rgb_to_hls else 0", before="import colorsys\n"), "colorsys.py": "raise 1"},
        "c.py",
    ),
    "pickles_its_classes": (
        {"c.py": source("pickle.loads(pickle.dumps(copy.deepcopy(Size())))." + "width", before=PICKLED)},
        "c.py",
    ),
    "prints": ({"c.py": source(before="print('\\u00e9 is printed')\n")}, "c.py"),
}


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(autouse=True)
def unchanged_imports():
    """Loading a config changes neither where modules are found, nor modules that have been imported."""
    import helpers

    before = list(sys.path), list(sys.meta_path)
    yield
    assert (list(sys.path), list(sys.meta_path)) == before
    assert sys.modules["helpers"] is helpers
    assert "vit_jax" in sys.modules["vit_jax"].__file__


@pytest.mark.parametrize("kind", WORKING)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_what_python_accepts_is_loaded(kind, elsewhere, tmp_path, monkeypatch):
    files, spec = WORKING[kind]
    write(tmp_path / "x", files)
    monkeypatch.chdir(tmp_path if elsewhere else tmp_path / "x")
    loaded = options.load(f"{tmp_path}/x/{spec}" if elsewhere else spec)
    assert loaded.model.width == 48
    assert options.override(loaded, "model.width=96") == "model.width" and loaded.model.width == 96
    assert options.override(loaded, "train.steps=7") == "train.steps" and loaded.train.steps == 7


# What a config file sets, and the value that the option then has.
VALUES = {
    "numpy_float": ("c.optimizer.learning_rate = np.float32(0.25)", "optimizer.learning_rate", 0.25),
    "numpy_integer": ("c.train.steps = np.int32(7)", "train.steps", 7),
    "numpy_boolean": ("c.log.tensorboard = np.bool_(False)", "log.tensorboard", False),
    "numpy_array": ("c.train.seeds = np.arange(3)", "train.seeds", (0, 1, 2)),
    "array_without_axes": ("c.train.update(batch_size=np.array(16))", "train.batch_size", 16),
    "list_of_numpy_integers": ("c.train.seeds = [np.int64(4), np.uint8(2)]", "train.seeds", (4, 2)),
    "range": ("c.train.seeds = range(3)", "train.seeds", (0, 1, 2)),
    "jax_float": ("c.optimizer.learning_rate = jnp.float32(0.25)", "optimizer.learning_rate", 0.25),
    "jax_integer": ("c.train.batch_size = jnp.int32(16)", "train.batch_size", 16),
    "jax_dtype": ("c.model.dtype = jnp.bfloat16", "model.dtype", "bfloat16"),
    "numpy_dtype": ("c.model.dtype = np.dtype('float32')", "model.dtype", "float32"),
    "numpy_type": ("c.model.dtype = np.float32", "model.dtype", "float32"),
    "path": ("c.data.dir = pathlib.Path('images') / 'train'", "data.dir", "images/train"),
    "enum": ("c.data.name = enum.Enum('Set', {'A': 'digits'}).A", "data.name", "digits"),
    "enum_of_text": ("c.data.name = enum.Enum('Set', {'A': 'digits'}, type=str).A", "data.name", "digits"),
    "enum_of_integers": ("c.train.steps = enum.IntEnum('Steps', {'A': 7}).A", "train.steps", 7),
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("returned", ["c", "ml_collections.ConfigDict(c.to_dict())"], ids=["ours", "plain"])
def test_values_of_other_types_that_mean_the_same_are_taken(kind, returned, tmp_path):
    statement, name, expected = VALUES[kind]
    imports = "import enum, pathlib\nimport jax.numpy as jnp, ml_collections, numpy as np\n"
    write(tmp_path, {"c.py": source(before=imports).replace("return c", f"{statement}\n    return {returned}")})
    section, key = name.split(".")
    found = options.load(f"{tmp_path}/c.py")[section][key]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("value", ["1e4", "'7'", "True", "lambda: 7", "object", "[7]"])
def test_a_value_of_the_wrong_type_is_refused_with_what_is_allowed(value, tmp_path):
    write(tmp_path, {"c.py": source().replace("return c", f"c.train.steps = {value}\n    return c")})
    with pytest.raises(UserError, match=r"steps is .*\n?.*allowed: an integer of at least 1, or None"):
        options.load(f"{tmp_path}/c.py")


# Files, the config as typed, and what the message must name besides it.
REFUSED = {
    "error_in_a_module_of_python": ({"c.py": "\nimport os\nos.environ['NO_SUCH']"}, "c.py", r"c\.py:3: KeyError"),
    "syntax_error": ({"c.py": "\n\nx = (1,\n"}, "c.py", r"c\.py:3: SyntaxError"),
    "error_at_import": ({"c.py": "\nimport json\njson.loads('{')\n"}, "c.py", r"c\.py:3: JSONDecodeError"),
    "error_in_get_config": ({"c.py": source("1 / 0")}, "c.py", r"c\.py:6: ZeroDivisionError"),
    "error_in_a_sibling": ({"c.py": "import bad", "bad.py": "\n1 / 0"}, "c.py", r"bad\.py:2: ZeroDivisionError"),
    "no_such_module": ({"c.py": "\nimport no_such_module"}, "c.py", r"c\.py:2: ModuleNotFoundError"),
    "no_such_option": ({"c.py": source(after="").replace("depth=1", "deth=1")}, "c.py", r"depth"),
    "exit": ({"c.py": "import sys\nsys.exit(0)"}, "c.py", r"c\.py:2: SystemExit"),
    "exit_in_get_config": ({"c.py": "def get_config():\n    raise SystemExit"}, "c.py", r"c\.py:2: SystemExit"),
    "endless_recursion": ({"c.py": "def get_config():\n    return get_config()"}, "c.py", r"c\.py:2: RecursionError"),
    "another_base_exception": ({"c.py": "class E(BaseException): ...\nraise E(1)"}, "c.py", r"c\.py:2: E: 1"),
    "not_utf_8": ({"c.py": b"x = '\xe9'\n"}, "c.py", r"c\.py:\d+: .*utf-8"),
    "null_bytes": ({"c.py": b"\0\0\0"}, "c.py", r"c\.py.*null"),
    "no_get_config": ({"c.py": "config = 1"}, "c.py", r"no function get_config"),
    "get_config_is_no_function": ({"c.py": "get_config = 1"}, "c.py", r"no function get_config"),
    "returns_a_dict": ({"c.py": source(returned="c.to_dict()")}, "c.py", r"returned dict.*default\(\)"),
    "returns_nothing": ({"c.py": source(returned="None")}, "c.py", r"returned NoneType"),
    "coroutine": ({"c.py": source().replace("def g", "async def g")}, "c.py", r"returned coroutine"),
    "required_placeholder": (
        {"c.py": "from ml_collections import config_dict as d\n" + source(returned="d.ConfigDict(values(c))")
         + "def values(c):\n    v = c.to_dict()\n    v['train']['steps'] = d.required_placeholder(int)\n    return v"},
        "c.py", r"config\.train\.steps is a required placeholder",
    ),
    "argument_is_not_taken": ({"c.py": source()}, "c.py:cpu", r"takes no argument.*cpu"),
    "argument_is_missing": ({"c.py": source(parameters="size")}, "c.py", r"'size'.*c\.py:ARG"),
    "argument_is_a_keyword": ({"c.py": source(parameters="*, size='S'")}, "c.py:S", r"get_config\(\*, size='S'\)"),
    "unknown_section": ({"c.py": source(returned="c.unlock().update(z=1) or c")}, "c.py", r"config\.z is not"),
    "directory": ({"d/a.py": source()}, "d", r"d is a directory.*d/a\.py"),
    "empty_directory": ({"d/a/b.py": ""}, "d", r"d is a directory"),
    "notebook": ({"c.ipynb": "{}"}, "c.ipynb", r"not a Python file"),
    "config_json": ({"c.json": "{}"}, "c.json", r"not a Python file"),
    "no_such_file": ({}, "nowhere.py:cpu", r"no such file: nowhere\.py\s+available: cifar10, "),
    "no_such_user": ({}, "~nosuchuser/c.py", r"no user nosuchuser"),
    "empty": ({}, "", r"--config is empty"),
    "null_character": ({}, "c\0.py", r"--config='c\\x00\.py' cannot be a path"),
    "too_long": ({}, 300 * "c" + ".py", r"--config=c+ cannot be used: File name too long"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mistake_is_named_with_file_and_line(kind, tmp_path, monkeypatch):
    files, spec, expected = REFUSED[kind]
    write(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        options.load(spec)
    message = str(raised.value)
    assert len(message.splitlines()) <= 3, message
    assert re.search(expected, " ".join(message.split())), message


def test_a_file_that_may_not_be_read_and_a_loop_of_links_are_named(tmp_path):
    (tmp_path / "loop.py").symlink_to("loop.py")
    with pytest.raises(UserError, match=r"loop\.py"):
        options.load(str(tmp_path / "loop.py"))
    (tmp_path / "c.py").write_text(source())
    (tmp_path / "link.py").symlink_to("c.py")
    assert options.load(str(tmp_path / "link.py")).model.width == 48
    (tmp_path / "c.py").chmod(0)
    if not os.access(tmp_path / "c.py", os.R_OK):  # root may read it
        with pytest.raises(UserError, match=r"PermissionError"):
            options.load(str(tmp_path / "c.py"))


def test_ctrl_c_stops_the_command_and_is_no_mistake_of_the_file(tmp_path):
    (tmp_path / "c.py").write_text("raise KeyboardInterrupt")
    assert commands.finish(lambda: options.load(str(tmp_path / "c.py")) and None) == 130


def test_a_file_and_what_it_imports_are_read_anew_each_time(tmp_path):
    """Within one second and of the same length, so that neither times nor sizes show the change."""
    using = source("common.W + sub.W", before="import common\nfrom parts import sub\n")
    for width in (32, 48, 64):
        for folder, more in (("one", 0), ("two", 16)):
            files = {"c.py": using, "common.py": f"W = {width}", "parts/sub.py": f"W = {more}"}
            write(tmp_path / folder, files)
        assert options.load(f"{tmp_path}/one/c.py").model.width == width
        assert options.load(f"{tmp_path}/two/c.py").model.width == width + 16
    changed = options.load(f"{tmp_path}/one/c.py")
    changed.model.width = 128
    assert options.load(f"{tmp_path}/one/c.py").model.width == 64
    assert not list(tmp_path.rglob("__pycache__"))


def test_classes_of_a_config_file_can_be_pickled_after_it_is_loaded(tmp_path):
    (tmp_path / "c.py").write_text(source(after="import builtins\nclass Size:\n    w = 3\nbuiltins.made = Size()\n"))
    options.load(str(tmp_path / "c.py"))
    import builtins

    assert pickle.loads(pickle.dumps(builtins.made)).w == 3
    del builtins.made


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("configs/digits.py", "digits"),
        ("a/b.py:S/16", "b-S_16"),
        ("a:b/c.py:d", "c-d"),
        ("c.py:a:b", "c-a:b"),
        ("no/suffix:x", "suffix-x"),
    ],
)
def test_the_run_directory_is_named_after_file_and_argument(spec, expected):
    assert commands.default_workdir(spec).name == expected


def test_random_files_and_specs_never_give_a_traceback(tmp_path, monkeypatch):
    """Every outcome is a config with the right width, or a UserError of at most three lines."""
    monkeypatch.chdir(tmp_path)
    random_ = random.Random(0)
    pieces = ["c", ":", "/", ".py", " ", "é", "~", "..", "\0", "[", "*", "'", "\\", "\udce9", "数", "-", "a" * 300, ""]
    contents = [files["c.py"] for files, *_ in [*WORKING.values(), *REFUSED.values()] if "c.py" in files]
    loaded = 0
    for _ in range(2000 if THOROUGH else 200):
        name = "".join(random_.choices(pieces[:-1], k=random_.randint(1, 4)))
        content = random_.choice(contents)
        content = content.encode() if isinstance(content, str) else content
        if random_.random() < 0.3:  # a truncated file
            content = content[: random_.randrange(len(content) + 1)]
        try:
            (tmp_path / name).write_bytes(content)
        except (OSError, ValueError):
            name = random_.choice(["nowhere.py", name])
        try:
            config = options.load(name + random_.choice(["", ":", ":48", ":a:b"]))
            loaded += config.model.width in (24, 32, 48)
        except UserError as error:
            assert len(str(error).splitlines()) <= 3, str(error)
    assert loaded
