"""Set-up of all tests: eight CPU devices, no TensorFlow, and annotations of vit_jax that are checked at every call."""

import atexit
import collections
import contextlib
import importlib.util
import inspect
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DEVICES = 8
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same small programs, in this process and in those that they start: they share a cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vit_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Shells start background jobs with SIGINT ignored, and their children inherit that; some tests send SIGINT to children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class NoTensorFlow:
    """An import finder that blocks TensorFlow, whether it is installed or not."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"no module named {name!r}: tests block TensorFlow", name=name)


sys.meta_path.insert(0, NoTensorFlow())
_find_spec = importlib.util.find_spec
# TFDS asks at import whether TensorFlow is installed.
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] == "tensorflow" else _find_spec(name, package)
)

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("vit_jax", "typechecker.check")

import pytest  # noqa: E402

from vit_jax import report  # noqa: E402

_at_end, report.at_end = report.at_end, lambda *_: contextlib.nullcontext()  # a report takes seconds

IMAGES = "VIT_JAX_TEST_DATA"
SECONDS = "vit_jax/seconds"  # in pytest's cache: how long each test took when it last ran
_seconds = collections.Counter()


def _recorded(config) -> dict[str, float]:
    """Seconds by test: in a worker, as the controller sent them, so that all workers have the same order."""
    if hasattr(config, "workerinput"):
        return config.workerinput[SECONDS]
    return config.cache.get(SECONDS, {}) if hasattr(config, "cache") else {}


def _guess(item) -> float:
    """Seconds of a test that has not run yet: slow tests take longer, and those that start commands longest."""
    if item.get_closest_marker("slow") is None:
        return 1.0
    return 20.0 if {"start_command", "run_command"} & vars(item.module).keys() else 5.0


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Sends the recorded durations to a worker."""
    node.workerinput[SECONDS] = _recorded(node.config)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Sorts files by duration, the longest first: a worker that starts one last would leave the other idle.

    Files are not split between workers (--dist loadfile in run.sh), because many have a fixture that trains a run.
    """
    recorded, seconds = _recorded(config), collections.Counter()
    for item in items:
        seconds[item.path] += recorded.get(item.nodeid, _guess(item))
    items.sort(key=lambda item: (-seconds[item.path], item.path))


def pytest_runtest_logreport(report) -> None:
    """Adds up the durations of set-up, call and tear-down of each test."""
    _seconds[report.nodeid] += round(report.duration, 3)


def pytest_sessionfinish(session) -> None:
    """Records the durations for the next run."""
    if hasattr(session.config, "cache") and not hasattr(session.config, "workerinput"):
        session.config.cache.set(SECONDS, _recorded(session.config) | _seconds)


@pytest.fixture
def reports(monkeypatch):
    """Runs that finish in a test write their report, which they do not in other tests."""
    monkeypatch.setattr(report, "at_end", _at_end)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The directory of reference values of the published implementation."""
    return ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def images() -> Path:
    """The directory with the extracted archives of CIFAR-10 and CIFAR-100."""
    if IMAGES not in os.environ:
        pytest.skip(f"{IMAGES} is not set to a directory with the extracted CIFAR archives")
    return Path(os.environ[IMAGES])


@pytest.fixture(scope="session")
def real_sets(images, tmp_path_factory) -> Path:
    """A data directory with CIFAR-10 and CIFAR-100, prepared from the published files; all workers share it."""
    from vit_jax.data import archives, prepare

    base = tmp_path_factory.getbasetemp()
    data_dir = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sets"
    for name in ("cifar10", "cifar100"):
        prepare.prepare(archives.ARCHIVES[name], data_dir=data_dir, source=images)  # takes a lock: one worker prepares
    return data_dir


@pytest.fixture(scope="session")
def toy():
    """The class that compiles the update of a toy run."""
    from toy import Toy

    return Toy


@pytest.fixture(scope="session")
def make_config():
    """A function that makes the config of a model that compiles in a second or two."""
    from toy import toy_config

    return toy_config


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """A function that makes the run directory of a tiny model for the digits, with random parameters."""

    def make(**sections) -> Path:
        import jax
        import numpy as np
        from helpers import tiny_config

        from vit_jax import atomic, sharding
        from vit_jax.checkpoint import input_spec, run_files
        from vit_jax.checkpoint.manager import CheckpointManager
        from vit_jax.training import setup

        config = tiny_config(**sections)
        workdir = tmp_path_factory.mktemp("run")
        built = setup.assemble(config, sharding.make_mesh(1), setup.load_sources(config))
        shapes, generator = built.abstract_state().parameters, np.random.default_rng(0)
        random = jax.tree.map(lambda leaf: generator.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
        atomic.write_json(workdir / run_files.CONFIG, config.to_dict())
        source = built.sources["train"]
        facts = (source.mean, source.std, source.class_names_by_label())
        input_spec.write(workdir, input_spec.InputSpec(source.name, source.image_shape, *facts))
        with CheckpointManager(workdir) as checkpoints:
            checkpoints.save(built.init_state(0, random).to_arrays(), {"config": config.to_dict(), "seconds": 0.0})
        return workdir

    return make


@pytest.fixture(scope="session")
def digits_run(make_run) -> Path:
    """Such a run directory, with one head for each kind of label of the digits, and a layer before the logits."""
    return make_run(data={"labels": ("label", "parity")}, model={"pre_logits": 8})


def _described_gpu():
    """A context in which JAX assumes an H200. JAX 0.11 and later need it; earlier versions assume a GPU themselves."""
    import jax

    device = getattr(jax.sharding, "AbstractDevice", None)
    if device is None or "platform" not in inspect.signature(device).parameters:
        return contextlib.nullcontext()
    described = device(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=described))


@pytest.fixture(scope="session")
def lower_for_gpu():
    """A function that lowers a function (jitted or not) for an NVIDIA GPU, on any machine, and returns its StableHLO.

    Arguments are arrays or `jax.ShapeDtypeStruct`s.
    """
    import jax
    from jax._src.cudnn import fused_attention_stablehlo

    def lower(function, *arguments):
        function = function if hasattr(function, "trace") else jax.jit(function)
        with _described_gpu():
            return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # no cuDNN is installed here
        yield lower
