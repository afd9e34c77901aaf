"""Before any test: eight host devices, no TensorFlow, and every shape annotation of vit_jax checked as it is called."""

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
# Many tests compile the same small programs, in this process and in those they start: once is enough.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vit_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Shells have what runs in the background ignore Ctrl-C, and what it starts too: the tests that send it need it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class NoTensorFlow:
    """An import finder that knows TensorFlow and refuses it, whether it is installed or not."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"no module named {name!r}: the tests make TensorFlow unimportable", name=name)


sys.meta_path.insert(0, NoTensorFlow())
_find_spec = importlib.util.find_spec
# Who asks whether TensorFlow is there (TFDS does, at import) shall hear that it is not.
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] == "tensorflow" else _find_spec(name, package)
)

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("vit_jax", "typechecker.check")

import pytest  # noqa: E402

IMAGES = "VIT_JAX_TEST_DATA"
# These run longest, the longest first: a worker that finds one of them last leaves the other idle.
LONG = (
    "tests/test_reliability.py",
    "tests/test_cifar10.py",
    "tests/test_finetune.py",
    "tests/training/test_resuming.py",
    "tests/test_benchmarks.py",
    "tests/test_main.py",
    "tests/training/test_seeds.py",
    "tests/objectives/test_pretraining.py",
    "tests/training/test_cluster.py",
    "tests/objectives/test_objectives.py",
    "tests/runtime/test_gpu_lowering.py",
    "tests/training/test_step.py",
    "tests/models/test_attention_backends.py",
    "tests/models/test_pallas_attention.py",
    "tests/data/test_augment.py",
    "tests/training/test_nonfinite.py",
    "tests/checkpoint/test_damage.py",
    "tests/checkpoint/test_manager.py",
    "tests/runtime/test_hardware.py",
    "tests/training/test_heads.py",
    "tests/evaluation/test_exact.py",
    "tests/training/test_auto_batch_size.py",
    "tests/test_features.py",
    "tests/test_transfer.py",
    "tests/models/test_masked_autoencoder.py",
    "tests/models/test_masked_patches.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items) -> None:
    """Sorts the files by what they cost: those named above, then those of many tests."""
    many = collections.Counter(item.path for item in items)
    long = {ROOT / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (long.get(item.path, len(LONG)), -many[item.path], item.path))


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of reference numbers of the published implementation."""
    return ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def images() -> Path:
    """The folder with the extracted archives of CIFAR-10 and CIFAR-100."""
    if IMAGES not in os.environ:
        pytest.skip(f"{IMAGES} names no folder with the extracted CIFAR archives")
    return Path(os.environ[IMAGES])


@pytest.fixture(scope="session")
def real_sets(images, tmp_path_factory) -> Path:
    """A data folder with CIFAR-10 and CIFAR-100, prepared from the published files; all workers share it."""
    from vit_jax.data import archives, prepare

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "sets"
    for name in ("cifar10", "cifar100"):
        prepare.prepare(archives.ARCHIVES[name], data_dir=folder, source=images)  # one waits while another prepares
    return folder


@pytest.fixture(scope="session")
def toy():
    """The class of a compiled update over the toy source."""
    from toy import Toy

    return Toy


@pytest.fixture(scope="session")
def make_config():
    """A function that makes the config of a model so small that it compiles in a second or two."""
    from toy import toy_config

    return toy_config


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """A function that makes the workdir of a run of a small model on the digits, its parameters drawn, not trained."""

    def make(**sections) -> Path:
        import jax
        import numpy as np

        from vit_jax import atomic, sharding
        from vit_jax import config as options
        from vit_jax.checkpoint import run_files
        from vit_jax.checkpoint.manager import Checkpoints
        from vit_jax.training import input_spec, setup

        config = options.default()
        config.model.update(variant="Ti/4", width=16, depth=1, heads=2, mlp_width=16)
        config.train.update(steps=10, batch_size=64)
        for section, values in sections.items():
            config[section].update(values)
        built, folder = setup.build(config, sharding.make_mesh(1)), tmp_path_factory.mktemp("run")
        shapes, generator = built.abstract_state().parameters, np.random.default_rng(0)
        drawn = jax.tree.map(lambda leaf: generator.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
        atomic.write_json(folder / run_files.CONFIG, config.to_dict())
        source = built.sources["train"]
        input_spec.write(folder, source, source.mean, source.std)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(built.initial_state(drawn), {"config": config.to_dict(), "seconds": 0.0})
        return folder

    return make


@pytest.fixture(scope="session")
def digits_run(make_run) -> Path:
    """Such a workdir, with a head of its own for each kind of label the digits have, and a layer before the logits."""
    return make_run(data={"labels": "label,parity"}, model={"pre_logits": 8})


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
    """A function that lowers another, jitted or not, for an NVIDIA GPU, on any machine: its StableHLO text.

    Arguments are arrays or `jax.ShapeDtypeStruct`s.
    """
    import jax
    from jax._src.cudnn import fused_attention_stablehlo

    def lower(function, *arguments):
        function = function if hasattr(function, "trace") else jax.jit(function)
        with _described_gpu():
            return function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # there is none to ask
        yield lower
