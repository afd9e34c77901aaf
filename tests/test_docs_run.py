"""Every command and Python snippet of README.md and docs/*.md runs, in the order of its page.

They run in this process, in a directory that has what the pages assume: runs, photos, a weights file. Training is cut
to a few steps of a tiny model, sets of TFDS are synthetic, and published weights come from a local file. With
VIT_JAX_TEST_DOCS=full the commands run as they are written, on real data and over the network.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from helpers import ROOT, TINY, flags

from vit_jax import commands, sharding
from vit_jax import config as options
from vit_jax.data import sources, tfds
from vit_jax.data.preparation import Preparation
from vit_jax.data.spec import LABEL, DatasetSpec
from vit_jax.weights import hub

pytestmark = pytest.mark.slow

FULL = os.environ.get("VIT_JAX_TEST_DOCS") == "full"
# docs/extending.md changes the code (tests/test_extending.py); docs/options.md shows no commands.
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
PAGES = [page for page in PAGES if page not in ("docs/extending.md", "docs/options.md")]
COMMAND = re.compile(
    r"(?:\./run\.sh|vit-jax|python -m vit_jax(?:\.[a-z_]+)*|\.venv/bin/python -m vit_jax[.a-z_]*)(?: .*)?$"
)
# Why a command is not run here; the key is a regular expression for the whole command.
NOT_RUN = {
    r"\./run\.sh test.*": "it is the test suite itself",
    r"vit-jax prepare cifar100?( --from .*)?": "it needs the published file: tests/data/test_prepare.py",
    r"(vit-jax( [a-z-]+){0,2}|python -m vit_jax[.a-z]*)": "it is the name of a command",
    r".*(\[|\.\.\.|--help|\b(CONFIG|FILE|NAME|ARGS|INIT|SET|DIRECTORY|COMMAND|MODULE|DIR|IMAGE|RUN|OUT)\b).*": "a form",
    r"vit-jax evaluate --init=augreg-b16-224 .*": "its stand-in has 10 classes: tests/test_evaluate_weights.py",
    r".*--layers=-1,-4 .*": "its stand-in has one block: tests/test_backbones.py",
    r".*--config=pretrain:imagenet21k .*": "it holds out 50,000 images",
    r".*runs/chain/.*": "it continues what benchmarks/chain.py makes",
    r".*\$RECIPE.*": "RECIPE is a shell variable of the page",
    r"vit-jax predict .*--classes=(cat,|names|a photo|\"a photo).*": "its stand-in embeds no texts",
    r"vit-jax look --init=cifar10-lite .*": "the model is not part of the package: tests/test_look.py",
    r".*--config\.log\.tracker=.*": "its package is not a requirement: tests/training/test_trackers.py",
    r".*dino\.pth.*": "it needs a file with several models: tests/situations/test_weights_files.py",
}
TRAINING = ("train", "finetune", "sweep")
MODULES = {"train": "vit_jax.main", "prepare": "vit_jax.data.prepare"}
SETS = {
    "cifar10": {LABEL: 10},
    "cifar100": {LABEL: 100, "coarse_label": 20},
    "oxford_iiit_pet": {LABEL: 37},
    "oxford_flowers102": {LABEL: 102},
    "imagenet2012": {LABEL: 1000},
}


# --- what the pages say --------------------------------------------------------------------------------------------


def code_lines(text: str) -> list[tuple[int, str]]:
    """The lines of code of a page with their numbers: indented or fenced (not Python), and spans in backticks."""
    found, fence = [], None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
        elif fence is not None:
            found += [(number, line)] if fence != "python" else []
        elif line.startswith("    "):
            found.append((number, line[4:]))
        else:
            found += [(number, span) for span in re.findall(r"`([^`]+)`", line)]
    return found


def commands_of(page: str) -> list[tuple[int, str]]:
    """The commands of a page and the numbers of their lines; lines that end in a backslash are joined."""
    found, open_line = [], None
    for number, line in code_lines((ROOT / page).read_text()):
        if open_line is not None:
            number, line = open_line[0], f"{open_line[1]} {line.strip()}"
        open_line = (number, line.removesuffix("\\").strip()) if line.endswith("\\") else None
        command = re.sub(r"\s{2,}#.*| # .*", "", line).strip()
        if open_line is None and COMMAND.match(command):
            found.append((number, command))
    return found


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


ALL = [(page, number, command) for page in PAGES for number, command in commands_of(page)]
SNIPPETS = [
    (page, text.count("\n", 0, match.start()) + 1, match[1])
    for page in PAGES
    for text in [(ROOT / page).read_text()]
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
]


def arguments_of(command: str) -> list[str]:
    """A command as arguments of `vit-jax`: ['train', '--config=cifar10:cpu']."""
    words = shlex.split(command)
    if words[0] == "./run.sh":
        if len(words) == 1:
            return ["train", "--config=digits"]
        return words[1:] if not words[1].startswith("-") else ["train", *words[1:]]
    if words[0] == "vit-jax":
        return words[1:]
    module = words[words.index("-m") + 1]
    names = {value: key for key, value in MODULES.items()}
    return (
        words[words.index("-m") + 2 :]
        if module == "vit_jax"
        else [
            names.get(module, module.removeprefix("vit_jax.")),
            *words[words.index("-m") + 2 :],
        ]
    )


# --- what the pages assume -----------------------------------------------------------------------------------------


def synthetic_spec(name: str, *_) -> DatasetSpec:
    """A set of random images with the classes of a set of TFDS."""
    kinds = {kind: tuple(f"{kind} {index}" for index in range(count)) for kind, count in SETS[name].items()}
    sizes = {"train": 12 * len(kinds[LABEL]), "test": 64, "validation": 64}

    def decode(split: str, images: np.ndarray, labels: np.ndarray, how: Preparation) -> None:
        images[:] = np.random.default_rng(len(split)).integers(0, 256, images.shape, np.uint8)
        read_labels(split, LABEL, labels)

    def read_labels(split: str, kind: str, labels: np.ndarray) -> None:
        labels[:] = np.arange(len(labels)) % len(kinds[kind])

    return DatasetSpec(name, sizes, kinds, (32, 32, 3), None, decode, read_labels=read_labels)


def write_photos(directory: Path, count: int) -> None:
    directory.mkdir(parents=True)
    generator = np.random.default_rng(count)
    for index in range(count):
        PIL.Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8)).save(directory / f"{index}.jpg")


def scaled(arguments: list[str]) -> list[str]:
    """The arguments of a command, with options that end it after a few steps of a tiny model if it trains."""
    if arguments[0] not in TRAINING:
        return arguments
    config = options.load(next((word[9:] for word in arguments if word.startswith("--config=")), "photos"))
    steps = 5 if "--config.checkpoint.keep=5" in arguments else 2  # a command of the page averages five checkpoints
    sections = {
        "train": {"steps": steps, "batch_size": 8, "evaluation_batch_size": 8, "evaluate_every": 0},
        "checkpoint": {"every": 1},
    }
    if config.model.variant != options.INIT_FROM:
        sections["model"] = {key: value for key, value in TINY.items() if key != "variant"}
    if (config.data.image_size or 0) > 64:
        sections["data"] = {"image_size": 32}
    kept = [word for word in arguments if not word.startswith(("--config.train.epochs", "--config.data.image_size"))]
    return [*kept, *flags(**sections)]


def run(arguments: list[str]) -> int:
    """Runs `vit-jax` with these arguments in this process; its exit status."""
    name, *rest = scaled(arguments)
    return importlib.import_module(MODULES.get(name, f"vit_jax.{name}")).main(rest)


@pytest.fixture(scope="module")
def patched():
    """Within it, sets of TFDS are synthetic, and published weights come from published/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds, "dataset_spec", synthetic_spec)
        patch.setattr(sources, "_missing_archive", lambda *_: None)
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda devices: make_mesh(devices or 1))
        real = hub.fetch
        patch.setattr(hub, "fetch", lambda name: real(name) if Path(name).exists() else Path("published").absolute())
        yield patch


@pytest.fixture(scope="module")
def base(patched, tmp_path_factory):
    """A directory with the runs and files that the pages assume."""
    root = tmp_path_factory.mktemp("docs")
    for name, count in {
        "PHOTOS/cat": 40,
        "PHOTOS/dog": 40,
        "OTHER_PHOTOS/cat": 2,
        "OTHER_PHOTOS/dog": 2,
        "album": 2,
    }.items():
        write_photos(root / name, count)
    for name in ("PHOTO.jpg", "holiday.jpg"):
        shutil.copy(root / "album" / "0.jpg", root / name)
    (root / "arrays").mkdir()
    for split in ("train", "test"):
        images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
        np.savez(root / "arrays" / f"{split}.npz", images=images, labels=np.arange(40) % 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for spec in ("digits", "cifar10:cpu", "pretrain:mae-cpu"):
            assert run(["train", f"--config={spec}"]) == 0
        for name in ("cifar10", "a", "b", "photos"):
            shutil.copytree("runs/cifar10-cpu", f"runs/{name}")
        shutil.copytree("runs/pretrain-mae-cpu", "runs/mae")
        halved = ["--config.data.normalization=half", "--workdir=runs/halved"]  # as Google's models
        assert run(["train", "--config=cifar10:cpu", *halved]) == 0
        assert run(["convert", "runs/halved", "published/model.safetensors"]) == 0
    return root


@pytest.fixture(scope="module")
def directories(base, tmp_path_factory):
    """A function that returns the directory of a page: a copy of `base`, the same for all commands of the page."""
    made = {}

    def directory_of(page: str) -> Path:
        if page not in made:
            made[page] = tmp_path_factory.mktemp(Path(page).stem) / "work"
            shutil.copytree(base, made[page])
        return made[page]

    return directory_of


# --- the tests -----------------------------------------------------------------------------------------------------


def test_commands_are_found():
    assert len(ALL) > 80
    assert ("README.md", "./run.sh") in {(page, command) for page, _, command in ALL}


def test_reasons_are_needed():
    unused = [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, command) for *_, command in ALL)]
    assert unused == []


trained: set[tuple[str, Path]] = set()  # run directories that commands of a page have made


@pytest.mark.parametrize(
    ("page", "command"),
    [pytest.param(page, command, id=f"{page}:{number}") for page, number, command in ALL if reason(command) is None],
)
def test_a_command_runs(page, command, directories, monkeypatch, capfd):
    monkeypatch.chdir(directories(page))
    if FULL:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = command.replace("./run.sh", f"{ROOT}/run.sh", 1)
        assert subprocess.run(command, shell=True, check=False, env={**os.environ, "PATH": path}).returncode == 0
        return
    arguments = arguments_of(command)
    if arguments[0] in ("train", "finetune"):  # not as the resumed run of `base`
        workdir = workdir_of(arguments)
        if (page, workdir) not in trained:
            shutil.rmtree(workdir, ignore_errors=True)
        trained.add((page, workdir))
    assert run(arguments) == 0, capfd.readouterr().err


def workdir_of(arguments: list[str]) -> Path:
    stated = [word.partition("=")[2] for word in arguments if word.startswith("--workdir=")]
    spec = next((word[9:] for word in arguments if word.startswith("--config=")), "photos")
    return Path(stated[0]) if stated else commands.default_workdir(spec)


namespaces: dict[str, dict] = {}


@pytest.mark.parametrize(
    ("page", "code"), [pytest.param(page, code, id=f"{page}:{number}") for page, number, code in SNIPPETS]
)
def test_a_snippet_runs(page, code, directories, monkeypatch):
    monkeypatch.chdir(directories(page))
    exec(code, namespaces.setdefault(page, {}))
