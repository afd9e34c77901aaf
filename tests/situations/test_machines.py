"""Commands on machines that are set up in other ways: they work, or name what is wrong in a few lines.

A situation is applied to a process from outside: environment variables, redirections and limits of a shell, and a
sitecustomize module for what only root could change (no entry in the list of users, the clock, package metadata).
"""

import ast
import io
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, THOROUGH, flags, read_metrics, run_command

from vit_jax import paths, terminal
from vit_jax.errors import UserError
from vit_jax.sharding import devices

# --- situations -----------------------------------------------------------------------------------------------------

CUSTOMIZED = """
import os
for name in os.environ.get("SITUATION", "").split():
    if name == "no_user":
        import pwd
        def unknown(*_): raise KeyError("no such user")
        pwd.getpwuid = pwd.getpwnam = unknown
    if name in ("no_metadata", "no_metadata_of_jaxtyping"):
        from importlib import metadata
        # These two cannot be imported without.
        known = {"jaxtyping": "0.3", "wadler_lindig": "0.1"} if name == "no_metadata" else {}
        def version(name):
            if name in known: return known[name]
            raise metadata.PackageNotFoundError(name)
        metadata.version = metadata.distribution = version
    if name == "no_version":
        from importlib import metadata
        metadata.version = {}.get
    if name == "clock":
        import time
        real = time.time
        time.time = lambda: real() % 86400
    if name == "no_proc":
        import builtins, io, pathlib
        real_open = io.open
        def without(file, *more, **options):
            if str(file).startswith("/proc/"): raise FileNotFoundError(2, "No such file or directory", file)
            return real_open(file, *more, **options)
        io.open = builtins.open = without
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# What differs from an ordinary machine. env: variables (None: unset), SITUATION names parts of CUSTOMIZED; before:
# shell commands; after: redirections; python: flags of the interpreter. Commands must work in each as in none.
WORKING = {
    "no_home": {"env": {"HOME": None, "XDG_CACHE_HOME": None, "SITUATION": "no_user"}},
    "home_cannot_be_written": {"env": {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": None}},
    "home_is_empty": {"env": {"HOME": "", "XDG_CACHE_HOME": "/proc/nowhere"}},
    "cache_cannot_be_written": {"env": {"XDG_CACHE_HOME": "/proc/nowhere", "JAX_COMPILATION_CACHE_DIR": None}},
    "cache_is_a_file": {"env": {"XDG_CACHE_HOME": "/dev/null", "JAX_COMPILATION_CACHE_DIR": None}},
    "compilation_cache_is_full": {"env": {"JAX_COMPILATION_CACHE_DIR": "/dev/full"}},
    "no_tmpdir": {"env": {"TMPDIR": "/nowhere"}},
    "one_cpu": {"before": "taskset -p -c 0 $$ >/dev/null"},
    "few_descriptors": {"before": "ulimit -n 64"},
    "no_core_and_small_stack": {"before": "ulimit -c 0 -s 4096"},
    "umask": {"before": "umask 777"},
    "stdin_closed": {"after": "<&-"},
    "stderr_closed": {"after": "2>&-"},
    "stderr_full": {"after": "2>/dev/full"},
    "all_closed": {"after": "<&- 2>&-"},
    "ascii": {"env": ASCII},
    "ascii_strict": {"env": {"PYTHONIOENCODING": "ascii:strict"}},
    "euc_jp": {"env": {"LANG": "ja_JP.eucJP", "LC_ALL": None, "PYTHONIOENCODING": "euc_jp"}},
    "no_language": {"env": {"LANG": None, "LC_ALL": "nowhere.UTF-8"}},
    "zero_columns": {"env": {"COLUMNS": "0", "LINES": "0"}},
    "one_column": {"env": {"COLUMNS": "1", "TERM": "dumb"}},
    "columns_are_no_number": {"env": {"COLUMNS": "x", "TERM": ""}},
    "optimized": {"env": {"PYTHONOPTIMIZE": "1"}},
    "without_docstrings": {"python": "-OO"},
    "isolated": {"python": "-I"},
    "no_site_and_safe_path": {"python": "-s -P"},
    "development_mode": {"env": {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "ignore"}},
    "no_bytecode": {"env": {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}},
    "time_zone": {"env": {"TZ": "Nowhere/Nothing"}},
    "no_metadata": {"env": {"SITUATION": "no_metadata"}},
    "metadata_without_version": {"env": {"SITUATION": "no_version"}},
    "clock_of_1970": {"env": {"SITUATION": "clock"}},
    "x64": {"env": {"JAX_ENABLE_X64": "1"}},
    "strict_promotion": {"env": {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}},
    "other_random_numbers": {"env": {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_RANDOM_SEED_OFFSET": "5"}},
    "other_threefry": {"env": {"JAX_THREEFRY_PARTITIONABLE": "0", "JAX_LEGACY_PRNG_KEY": "error"}},
    "no_jit": {"env": {"JAX_DISABLE_JIT": "1"}},
    "no_transfers": {"env": {"JAX_TRANSFER_GUARD": "disallow"}},
    "guards": {"env": {"JAX_ARRAY_GARBAGE_COLLECTION_GUARD": "fatal", "JAX_THREAD_GUARD": "1"}},
    "debugging": {"env": {"JAX_DEBUG_NANS": "1", "JAX_DEBUG_INFS": "1", "JAX_CHECK_TRACER_LEAKS": "1"}},
    "checks": {"env": {"JAX_ENABLE_CHECKS": "1", "JAX_DEBUG_KEY_REUSE": "1", "JAX_TRACEBACK_FILTERING": "off"}},
    "logging": {"env": {"JAX_LOG_COMPILES": "1", "JAX_EXPLAIN_CACHE_MISSES": "1", "TF_CPP_MIN_LOG_LEVEL": "0"}},
    "matmul_precision": {"env": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}},
    "an_absent_device_and_the_cpu": {"env": {"JAX_PLATFORMS": "cuda,cpu"}},
    "several_devices": {"env": {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}},
}  # fmt: skip
# Situations in which a command that needs JAX must end with status 2, and what it must name.
IMPOSSIBLE = {
    "cuda": ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda"),
    "cuda_optimized": ({"JAX_PLATFORMS": "cuda", "PYTHONOPTIMIZE": "2"}, "JAX_PLATFORMS=cuda"),
    "tpu": ({"JAX_PLATFORMS": "tpu"}, "JAX_PLATFORMS=tpu"),
    "rocm": ({"JAX_PLATFORMS": "rocm"}, "JAX_PLATFORMS=rocm"),
    "nonsense": ({"JAX_PLATFORMS": "nonsense"}, "JAX_PLATFORMS=nonsense"),
    "platforms_in_capitals": ({"JAX_PLATFORMS": "CPU"}, "JAX_PLATFORMS=CPU"),
    "platforms_and_a_space": ({"JAX_PLATFORMS": "cpu, cpu"}, "JAX_PLATFORMS=cpu, cpu"),
    "old_name": ({"JAX_PLATFORM_NAME": "cuda", "JAX_PLATFORMS": None}, "JAX_PLATFORM_NAME=cuda"),
    "no_cpu_devices": ({"JAX_NUM_CPU_DEVICES": "0"}, "JAX_NUM_CPU_DEVICES=0"),
    "wrong_number": ({"JAX_NUM_CPU_DEVICES": "many"}, "jax_num_cpu_devices"),
    "wrong_truth_value": ({"JAX_ENABLE_X64": "maybe"}, "JAX_ENABLE_X64"),
    "wrong_choice": ({"JAX_DEFAULT_PRNG_IMPL": "dice"}, "jax_default_prng_impl"),
    "wrong_flag": ({"XLA_FLAGS": "--no_such_flag"}, "XLA_FLAGS is '--no_such_flag'"),
    "no_flag": ({"XLA_FLAGS": "nonsense"}, "XLA_FLAGS is 'nonsense'"),
    "wrong_value": ({"XLA_FLAGS": "--xla_cpu_prefer_vector_width=wide"}, "XLA_FLAGS is"),
    "no_proc": ({"SITUATION": "no_proc"}, "mount /proc"),
    "no_metadata_of_jaxtyping": ({"SITUATION": "no_metadata_of_jaxtyping"}, "install the packages again"),
    "no_such_user_of_the_cache": ({"XDG_CACHE_HOME": "~nosuchuser/x"}, "XDG_CACHE_HOME=~nosuchuser/x"),
}
OTHER_VALUES = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_prng_impl": "rbg",
    "jax_legacy_prng_key": "error",
    "jax_array_garbage_collection_guard": "log",
    **dict.fromkeys((name for name in devices.SETTINGS if "transfer_guard" in name), "log"),
    **dict.fromkeys((name for name in devices.SETTINGS if "error_checking" in name), "raise"),
}
STDOUT = {
    "closed": (">&-", 2, "Bad file descriptor"),
    "full": (">/dev/full", 2, "No space left on device"),
    "broken": ("", 1, ""),
    "read_only": ("1</dev/null", 2, "Bad file descriptor"),
}
DIGITS = f"--config={ROOT}/configs/digits.py"
TINY = flags(
    model={"variant": "Ti/4", "width": 16, "depth": 1, "heads": 2, "mlp_width": 16},
    train={"steps": 2, "epochs": None, "batch_size": 32},
    log={"every": 1, "tensorboard": False},
    mesh={"devices": 1},
)


def merged(*situations: dict) -> dict:
    """Several situations at once; of two that set the same, the later one counts."""
    env, parts = {}, []
    for one in situations:
        parts += one.get("env", {}).get("SITUATION", "").split()
        env |= one.get("env", {})
    text = {key: " ; ".join(filter(None, (one.get(key) for one in situations))) for key in ("before",)}
    text |= {key: " ".join(filter(None, (one.get(key) for one in situations))) for key in ("after", "python")}
    return {"env": env | {"SITUATION": " ".join(parts)}, **text}


class Machine:
    """Runs commands in situations."""

    def __init__(self, folder: Path):
        """Writes sitecustomize.py."""
        self.folder = folder
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(CUSTOMIZED)

    def run(self, module: str, *arguments, broken: bool = False, cwd=ROOT, **situation) -> subprocess.CompletedProcess:
        """Runs `python -m vit_jax.MODULE`; with `broken`, standard output is a pipe that nobody reads."""
        situation = merged(situation)
        environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PYTHONPATH")}
        environment |= {"PYTHONPATH": f"{self.folder / 'site'}:{ROOT}", "XDG_CACHE_HOME": str(self.folder / "cache")}
        environment |= situation["env"]
        environment = {key: value for key, value in environment.items() if value is not None}
        how = ["-m", f"vit_jax.{module}"]
        if "-I" in situation["python"].split():  # which ignores PYTHONPATH: as if the package were installed
            paths_first = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv.pop(0)"
            how = ["-c", f"{paths_first}; runpy.run_module({how[1]!r}, run_name='__main__', alter_sys=True)", "x"]
        words = [sys.executable, *situation["python"].split(), *how, *map(str, arguments)]
        script = f"{situation['before'] or ':'}; exec {shlex.join(words)} {situation['after']}"
        pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": cwd, "env": environment}
        read, write = os.pipe()
        if broken:
            os.close(read)
        try:
            return subprocess.run(
                ["bash", "-c", script], stdout=write if broken else subprocess.PIPE, timeout=300, **pipes
            )
        finally:
            for descriptor in {read, write} - ({read} if broken else set()):
                os.close(descriptor)


def check_message(process: subprocess.CompletedProcess, status: int, expected: str) -> None:
    """The command ended with this status, and with at most three lines that name what is expected."""
    text = process.stderr.decode(errors="replace")
    assert process.returncode == status, text
    assert expected in text and "Traceback" not in text, text
    error = text[text.index("error: ") :] if "error: " in text else text
    assert 1 <= len(error.splitlines()) <= 3, text


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return Machine(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def run_directory(machine):
    """The run directory of two steps on an ordinary machine, and an image."""
    workdir = machine.folder / "ordinary run"
    done = machine.run("main", DIGITS, f"--workdir={workdir}", *TINY)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    Image.new("L", (8, 8), 100).save(machine.folder / "ü.png")
    return workdir


# --- commands -------------------------------------------------------------------------------------------------------


def train(machine, run_directory, number, resumed=True, **situation):
    """Trains, in two parts if `resumed`, and compares with the ordinary run."""
    workdir = machine.folder / f"run-{number}"
    rest = [DIGITS, f"--workdir={workdir}", *TINY]
    if resumed:
        first = machine.run("main", *rest, "--config.train.steps=1", **situation)
        assert first.returncode == 0, first.stderr.decode(errors="replace")
    done = machine.run("main", *rest, **situation)
    if done.returncode == 0:
        assert read_metrics(workdir)[-1] == read_metrics(run_directory)[-1]
        assert json.loads((workdir / "environment.json").read_text())["python"]
    shutil.rmtree(workdir)
    return done


def evaluate(machine, run_directory, number, **situation):
    """Evaluates the ordinary run and compares with its own result."""
    done = machine.run("evaluate", f"--workdir={run_directory}", **situation)
    if done.returncode == 0:
        found, expected = json.loads(done.stdout), json.loads((run_directory / "summary.json").read_text())
        assert found["test/examples"] == 360
        assert found["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)
    return done


def predict(machine, run_directory, number, **situation):
    """Predicts one image; its name, which is not ASCII, is printed as bytes or escapes, and is in the CSV file."""
    image, table = machine.folder / "ü.png", machine.folder / f"{number}.csv"
    done = machine.run("predict", f"--workdir={run_directory}", image, f"--csv={table}", **situation)
    if done.returncode == 0:
        assert b".png" in done.stdout and b"%" in done.stdout
    assert table.read_bytes().count(b"\n") == 6
    table.unlink()
    return done


def list_checkpoints(machine, run_directory, number, **situation):
    """Lists the checkpoints."""
    done = machine.run("checkpoints", "list", run_directory, **situation)
    assert done.returncode or re.search(rb"\n +2 .* MiB", done.stdout)
    return done


def show_help(machine, run_directory, number, **situation):
    """Shows the help."""
    done = machine.run("main", "--help", **situation)
    assert done.returncode or b"--workdir" in done.stdout
    return done


COMMANDS = {"train": train, "evaluate": evaluate, "predict": predict, "list": list_checkpoints, "help": show_help}


@pytest.mark.slow
def test_every_situation_works_alone(machine, run_directory):
    """In one process each: with the quickest command."""
    for name, situation in WORKING.items():
        done = show_help(machine, run_directory, 0, **situation)
        assert done.returncode == 0, (name, done.stderr)


def groups(size: int) -> list[list[str]]:
    """Situations that do not set the same variable, several to a process, to save time."""
    found: list[list[str]] = []
    for name, situation in WORKING.items():
        for group in found:
            used = {key for other in group for key in WORKING[other].get("env", {})} - {"SITUATION"}
            keys = {key for key in ("after", "python") if key in situation}
            in_use = {key for other in group for key in ("after", "python") if key in WORKING[other]}
            if len(group) < size and not used & situation.get("env", {}).keys() and not keys & in_use:
                group.append(name)
                break
        else:
            found.append([name])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("names", groups(1 if THOROUGH else 16), ids="+".join)
def test_a_run_that_is_resumed_gives_the_same_numbers(names, machine, run_directory):
    done = train(machine, run_directory, "+".join(names)[:60], **merged(*(WORKING[name] for name in names)))
    assert done.returncode == 0, done.stderr.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("names", groups(1 if THOROUGH else 20), ids="+".join)
def test_other_commands_give_the_same_results(names, machine, run_directory):
    chosen = ["evaluate", "predict", "list"] if THOROUGH else [("evaluate", "predict")[len(names) % 2]]
    for command in chosen:
        done = COMMANDS[command](machine, run_directory, 0, **merged(*(WORKING[name] for name in names)))
        assert done.returncode == 0, (command, done.stderr.decode(errors="replace"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_what_cannot_work_is_named(kind, machine, run_directory):
    env, expected = IMPOSSIBLE[kind]
    if "CACHE" in expected or kind in ("no_proc", "no_metadata_of_jaxtyping") or "platforms" in kind:
        arguments = ["main", DIGITS, f"--workdir={machine.folder}/new", *TINY]
        env = {**env, "JAX_COMPILATION_CACHE_DIR": None}
    else:
        arguments = ["checkpoints", "verify", run_directory]
    check_message(machine.run(*arguments, env=env), 2, expected)
    assert (run_directory / "checkpoints").is_dir() and not (run_directory / "checkpoints-damaged").exists()


LIBRARY = """
import sys
from vit_jax.predict import Predictor
try:
    Predictor(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "variable, value, expected",
    [
        ("JAX_PLATFORMS", "cuda", "UserError JAX cannot start its devices"),
        ("JAX_ENABLE_X64", "1", "UserError jax_enable_x64 is True"),
        ("JAX_DEFAULT_PRNG_IMPL", "rbg", "UserError jax_default_prng_impl is 'rbg'"),
    ],
)
def test_the_library_refuses_settings_and_devices_by_name(variable, value, expected, run_directory):
    printed = run_command(LIBRARY, run_directory, **{variable: value})
    assert printed.startswith(expected) and len(printed.splitlines()) <= 3


@pytest.mark.parametrize("name", devices.SETTINGS)
def test_a_setting_of_jax_is_refused_by_the_library_and_overridden_by_commands(name, monkeypatch, capsys):
    import jax

    others = {bool: not devices.SETTINGS[name], int: 3, str: OTHER_VALUES.get(name)}
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, others[type(devices.SETTINGS[name])])
        with pytest.raises(UserError, match=f"^{name} is .*"):
            devices.start()
        devices.override_settings()
        assert capsys.readouterr().err.count(name.upper()) >= 1
        assert devices.start() == jax.devices()
    finally:
        jax.config.update(name, getattr(before, "value", before))
    devices.override_settings()
    assert capsys.readouterr().err == ""


# --- standard output ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", STDOUT)
def test_a_command_whose_result_cannot_be_printed_says_so(kind, machine, run_directory):
    after, status, reason = STDOUT[kind]
    for command in ("help", "predict"):  # predict writes its CSV file all the same
        done = COMMANDS[command](machine, run_directory, 0, after=after, broken=kind == "broken")
        if reason:
            check_message(done, status, f"error: standard output: {reason}")
        else:
            assert (done.returncode, done.stderr) == (status, b"")


@pytest.mark.slow
@pytest.mark.parametrize("kind", STDOUT if THOROUGH else ["closed", "broken"])
def test_training_goes_on_when_its_output_cannot_be_printed(kind, machine, run_directory):
    after = f"{STDOUT[kind][0]} 2>&-" if kind == "closed" else STDOUT[kind][0]
    done = train(machine, run_directory, kind, resumed=False, after=after, broken=kind == "broken")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_no_file_gets_the_number_of_a_closed_stream(machine):
    """Or what libraries print would be written into it."""
    code = "from vit_jax import terminal; terminal.prepare(); import os; print(sorted(os.listdir('/proc/self/fd')))"
    (machine.folder / "code.py").write_text(f"{code}\nopened = open('/dev/null')\nassert opened.fileno() > 2\n")
    command = f"exec {sys.executable} {machine.folder}/code.py <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


class Full(io.StringIO):
    """A stream that cannot be written to."""

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


class Writer:
    """A stream of a program, such as one that writes to its log, with nothing but `write`."""

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


@pytest.mark.parametrize("stream", [Writer(), io.StringIO(), None], ids=["writer", "StringIO", "None"])
def test_streams_that_a_program_has_put_in_place_are_written_to(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert not terminal.is_live(stream)
    terminal.say("1")
    assert terminal.finish(lambda: terminal.warn("2")) == 0
    text = stream.getvalue() if isinstance(stream, io.StringIO) else getattr(stream, "text", "1\n2\n")
    assert text == "1\n2\n"


@pytest.mark.parametrize(
    "encoding, text, expected",
    [
        ("ascii", "5 × ü", b"5 \\xd7 \\xfc"),
        ("utf-8", "5 × ü", "5 × ü".encode()),
        ("utf-8", "\udcfc.png", b"\xfc.png"),
        ("ascii", "ü \udcfc", b"\\xfc \xfc"),
        ("euc_jp", "数 é\ud800", "数 é".encode("euc_jp") + b"\\ud800"),
        ("latin-1", "é…", b"\xe9\\u2026"),
    ],
)
def test_characters_that_a_terminal_does_not_have_are_escaped(encoding, text, expected):
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding)
    assert terminal.write(stream, text) is None
    assert raw.getvalue() == expected


def test_a_stream_that_fails_gives_the_reason(monkeypatch):
    closed = io.StringIO()
    closed.close()
    assert terminal.write(Full(), "x") == "No space left on device"
    assert "closed" in terminal.write(closed, "x")
    assert terminal.write(None, "x") == "Bad file descriptor"
    assert not terminal.is_live(closed) and not terminal.is_live(None)
    monkeypatch.setattr(sys, "stdout", Full())
    assert terminal.finish(lambda: terminal.say("progress")) == 0
    assert terminal.finish(lambda: terminal.output("result")) == 2


def test_everything_is_printed_by_one_module():
    for path in (ROOT / "vit_jax").rglob("*.py"):
        if path.name != "terminal.py":
            nodes = ast.walk(ast.parse(path.read_text()))
            lines = [node.lineno for node in nodes if getattr(node, "id", "") == "print"]
            assert not lines, f"{path}:{lines}: use vit_jax.terminal"


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(24, "Too many open files", "a.png"), "too many open files: a.png\n  raise the limit of this shell"),
        (OSError(28, "No space left on device"), "no space left on device\n  free disk space"),
        (PermissionError(13, "Permission denied", "/x"), "permission denied: /x\n  change its permissions"),
        (OSError(5, "Input/output error", "/x"), "input/output error: /x\n  the disk or the network failed"),
        (MemoryError(), "this machine has too little memory"),
        (RuntimeError("can't start new thread"), "no further thread can be started"),
        (ModuleNotFoundError("No module named 'optax'", name="optax"), "No module named 'optax'\n  install"),
        (FloatingPointError("invalid value (nan) encountered in sub"), "JAX_DEBUG_NANS"),
    ],
)
def test_errors_of_the_machine_are_explained(error, expected, capsys):
    def action():
        raise error

    assert terminal.finish(action) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {expected}") and len(errors.splitlines()) == 2


@pytest.mark.parametrize(
    "error", [ValueError("x"), FileNotFoundError(2, "No such file"), ImportError("x", name="vit_jax.x"), RuntimeError()]
)
def test_mistakes_of_the_code_keep_their_traceback(error):
    def action():
        raise error

    with pytest.raises(type(error)):
        terminal.finish(action)


# --- paths ----------------------------------------------------------------------------------------------------------

USER = "~nosuchuser/x"
RUN = f"--workdir={USER}"
# Commands with a path option of a user who does not exist, and the option that the message must name.
PATH_OPTIONS = {
    "main --workdir": ("main", [DIGITS, RUN], "--workdir"),
    "main --config": ("main", [f"--config={USER}.py"], "--config"),
    "main data.dir": ("main", [DIGITS, f"--config.data.dir={USER}"], "config.data.dir"),
    "main data.cache_dir": ("main", [DIGITS, f"--config.data.cache_dir={USER}"], "config.data.cache_dir"),
    "main data.features": ("main", [DIGITS, f"--config.data.features={USER}"], "config.data.features"),
    "main init_from": ("main", [DIGITS, f"--config.checkpoint.init_from={USER}"], "checkpoint.init_from"),
    "sweep --workdir": ("sweep", [DIGITS, "--rates=1,2", RUN], "--workdir"),
    "sweep --config": ("sweep", [f"--config={USER}.py", "--rates=1,2"], "--config"),
    "preview --out": ("preview", [DIGITS, f"--out={USER}"], "--out"),
    "evaluate --weights": ("evaluate", ["--workdir=x", f"--weights={USER}"], "--weights"),
    "evaluate --workdir": ("evaluate", [RUN], "--workdir"),
    "predict --workdir": ("predict", ["x.png", RUN], "--workdir"),
    "predict --init": ("predict", [__file__, f"--init={USER}"], "--init"),
    "predict IMAGE": ("predict", [USER, "--workdir=x"], "IMAGE"),
    "predict --csv": ("predict", ["x.png", "--workdir=x", f"--csv={USER}"], "--csv"),
    "predict --classes": ("predict", [__file__, "--init=x", f"--classes={USER}"], "--classes"),
    "features --workdir": ("features", [RUN], "--workdir"),
    "features --out": ("features", ["--workdir=x", f"--out={USER}"], "--out"),
    "transfer --init": ("transfer", [f"--init={USER}"], "--init"),
    "transfer --features": ("transfer", [f"--features={USER}"], "--features"),
    "reconstruct --workdir": ("reconstruct", [RUN], "--workdir"),
    "convert IN": ("convert", [USER, "x.npz"], "IN"),
    "convert OUT": ("convert", ["x.npz", f"{USER}.npz"], "OUT"),
    "checkpoints DIR": ("checkpoints", ["list", USER], "DIR"),
    "checkpoints --out": ("checkpoints", ["average", "x", f"--out={USER}.safetensors"], "--out"),
    "prepare --data_dir": ("data.prepare", ["cifar10", f"--data_dir={USER}"], "--data_dir"),
    "prepare --from": ("data.prepare", ["cifar10", f"--from={USER}", "--data_dir=DIR"], "--from"),
}  # fmt: skip


@pytest.mark.parametrize("case", PATH_OPTIONS)
@pytest.mark.parametrize("fault", ["user", "null", "long"])
def test_a_path_that_cannot_be_one_is_named_with_its_option(case, fault, tmp_path, monkeypatch, capsys):
    import importlib

    module, arguments, option = PATH_OPTIONS[case]
    wrong = {"user": USER, "null": "a\0b", "long": 300 * "x" + "/y"}[fault]
    arguments = [argument.replace(USER, wrong).replace("=DIR", f"={tmp_path}") for argument in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert importlib.import_module(f"vit_jax.{module}").main(arguments) == 2
    errors = capsys.readouterr().err
    assert option in errors, errors
    assert len(errors[errors.index("error: ") :].splitlines()) <= 3, errors
    assert not [path for path in tmp_path.iterdir() if "downloads" not in path.name]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "is empty"),
        ("~nosuchuser", "there is no user nosuchuser"),
        ("a\0b", "null"),
        (300 * "x", "name too long"),
        (3000 * "x/", "name too long"),
        ("loop/x", "symbolic links"),
        ("\ud800", "surrogates"),
    ],
)
def test_expand_refuses_what_cannot_be_a_path(text, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=reason) as raised:
        paths.expand(text, "--option")
    assert str(raised.value).startswith("--option") and len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize("text", ["x", "a b/[c]*", "\udce9", "é/数", "./~x", "/nowhere/x", "x/../y", "a:b", "file/x"])
def test_expand_takes_whatever_can_be_one(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert paths.expand(text, "--option").absolute() == tmp_path / text
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.expand(f"~/{text.lstrip('/')}", "--option") == tmp_path / text.lstrip("/")


def test_without_a_home_directory_caches_are_temporary(monkeypatch, capsys):
    import pwd

    def unknown(_):
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    found = paths.cache_dir()
    assert found.is_dir() and found == paths.cache_dir()
    assert capsys.readouterr().err.count("warning") == 1
    with pytest.raises(UserError, match=r"TFDS_DATA_DIR=~/tensorflow_datasets: .*no home directory\n  set HOME"):
        from vit_jax.data import prepare

        prepare.default_data_dir()


@pytest.mark.parametrize("base", ["/proc/nowhere", "/dev/null", "/dev/full", "/sys/x", 300 * "x"])
def test_a_cache_that_cannot_be_made_is_not_needed(base, monkeypatch, capsys):
    import numpy as np

    from vit_jax.data import cache

    def fill(images, labels):
        images[:], labels[:] = 7, (0, 1)

    monkeypatch.setenv("XDG_CACHE_HOME", base)
    split = cache.open_or_create(cache.default_dir() / "set", (2, 4, 4, 3), fill, title="set")
    assert split.folder is None and (np.asarray(split.images) == 7).all() and split.labels.tolist() == [0, 1]
    assert "warning: cannot write the cache" in capsys.readouterr().err


@pytest.mark.slow
def test_a_current_directory_that_was_removed_is_named(machine, run_directory):
    for command, arguments in (("main", [DIGITS, *TINY]), ("evaluate", ["--workdir=x"])):
        gone = machine.folder / "gone"
        gone.mkdir()
        done = machine.run(command, *arguments, cwd=gone, before=f"rmdir {shlex.quote(str(gone))}")
        check_message(done, 2, "is relative, and the current directory has been removed")
    gone.mkdir()
    before = f"rmdir {shlex.quote(str(gone))}"
    assert machine.run("evaluate", f"--workdir={run_directory}", cwd=gone, before=before).returncode == 0


# --- combinations ---------------------------------------------------------------------------------------------------


def outcome(command: str, names: list[str], stdout: str, machine: Machine, run_directory: Path) -> str:
    """Runs a command in several situations; '' if it ended as it should, else what went wrong."""
    env, expected = next((IMPOSSIBLE[name] for name in names if name in IMPOSSIBLE), ({}, ""))
    situations = [WORKING[name] for name in names if name in WORKING] + [{"env": env}]
    after, status, _ = STDOUT.get(stdout, ("", 0, ""))
    try:
        done = COMMANDS[command](
            machine, run_directory, 0, **merged(*situations, {"after": after}), broken=stdout == "broken"
        )
    except AssertionError as error:
        return f"{command} {names} {stdout}: {str(error)[-1500:]}"
    text = done.stderr.decode(errors="replace")
    wanted = 2 if expected and command != "help" else 0 if command == "train" else status
    if done.returncode != wanted or "Traceback (most" in text:
        return f"{command} {names} {stdout}: status {done.returncode}: {text[-1500:]}"
    return ""


def combination(generator: random.Random) -> tuple[str, list[str], str]:
    """A command, one to four situations that do not contradict each other, and the state of standard output."""
    left_out = {"no_proc", "no_such_user_of_the_cache", "no_metadata_of_jaxtyping"}
    names = generator.sample(sorted({*WORKING, *IMPOSSIBLE} - left_out), generator.randint(1, 4))
    command = generator.choice(["help"] * 6 + ["list"] * 6 + ["evaluate"] * 3 + ["predict"] * 3 + ["train"])
    stdout = generator.choice(["open", "open", "open", *STDOUT])
    flagged = [key for name in names for key in WORKING.get(name, {}) if key in ("python", "after")]
    impossible = sum(name in IMPOSSIBLE for name in names)
    if len(flagged) > len(set(flagged)) or impossible > 1 or (impossible and command in ("predict", "train")):
        return combination(generator)
    return command, names, stdout


@pytest.mark.slow
def test_combinations_never_end_with_a_traceback(machine, run_directory):
    generator = random.Random(0)
    count = 500 if THOROUGH else 6
    failed = [text for _ in range(count) if (text := outcome(*combination(generator), machine, run_directory))]
    assert not failed, f"{len(failed)} of {count}:\n" + "\n".join(failed)
