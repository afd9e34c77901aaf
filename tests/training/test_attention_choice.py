"""Which attention backend a run takes: timed candidates, what is left out, what is kept."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config as options
from vit_jax.errors import UserError
from vit_jax.models import attention_backends
from vit_jax.models.attention_backends import BACKENDS, Backend, Device, Shape
from vit_jax.training import attention_choice, objectives, records, state, workdir
from vit_jax.training import model as models
from vit_jax.training.attention_choice import Choice, choose, resolve

SHAPE = Shape(batch=4, tokens=65, heads=2, size=64, dtype="bfloat16")


class Gpu:
    """A device that says it is a GPU."""

    platform, device_kind, compute_capability = "gpu", "NVIDIA Imaginary", "9.0"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Such a device, an empty cache, and the names that are timed there."""
    timed = []
    seconds = {"cudnn": 1e-3, "pallas": 2e-3, "heads_first": 3e-3, "plain": 4e-3}

    def measure(name, shape, device, training):
        timed.append(name)
        if isinstance(seconds[name], Exception):
            raise seconds[name]
        return seconds[name]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(attention_choice, "measure", measure)
    gpu = Gpu()
    gpu.timed, gpu.seconds = timed, seconds
    return gpu


def test_the_fastest_candidate_is_taken():
    seconds = {"a": 3e-3, "b": 1e-3, "c": 2e-3}
    choice = choose(list(seconds), [SHAPE, SHAPE], lambda name, shape: seconds[name])
    assert choice == Choice("b", "timed", {"a": 6.0, "b": 2.0, "c": 4.0})


def test_a_candidate_that_fails_is_left_out_and_says_why():
    def measure(name, shape):
        if name == "a":
            raise NotImplementedError("Unsupported sequence length\nQ 65, KV 65.")
        return 1.0

    choice = choose(["a", "b"], [SHAPE], measure)
    assert choice.backend == "b"
    assert choice.failures == {"a": "NotImplementedError: Unsupported sequence length Q 65, KV 65."}
    assert choice.describe() == f"b (timed: b 1000.00 ms; a failed: {choice.failures['a']})"
    assert Choice("b", "device").describe() == "b" and Choice("b", "run").describe() == "b (as the run began)"


def test_where_nothing_can_be_timed_the_fallback_is_taken():
    def measure(name, shape):
        raise RuntimeError("no kernel image is available")

    assert choose(["cudnn", "plain"], [SHAPE], measure).backend == attention_backends.FALLBACK


def test_on_a_gpu_candidates_are_timed_once_and_then_read_from_the_cache(gpu):
    first = resolve("auto", [SHAPE], gpu)
    assert (first.backend, first.reason) == ("cudnn", "timed")
    assert set(gpu.timed) == set(attention_backends.candidates(Device("gpu", (9, 0)), [SHAPE]))
    gpu.timed.clear()
    again = resolve("auto", [SHAPE], gpu)
    assert again == dataclasses.replace(first, reason="cached") and not gpu.timed
    assert resolve("auto", [dataclasses.replace(SHAPE, tokens=197)], gpu).reason == "timed"
    assert resolve("auto", [SHAPE], gpu, training=False).reason == "timed"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"backend": "gone", "reason": "timed"}'])
def test_a_damaged_cache_costs_the_timing_alone(gpu, tmp_path, damage):
    first = resolve("auto", [SHAPE], gpu)
    (path,) = tmp_path.rglob("attention/*.json")
    path.write_text(damage)
    assert resolve("auto", [SHAPE], gpu) == first
    assert json.loads(path.read_text())["backend"] == "cudnn"


def test_a_cache_that_cannot_be_written_to_changes_nothing(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert resolve("auto", [SHAPE], gpu).backend == "cudnn"


def test_a_failure_of_all_is_not_cached(gpu):
    gpu.seconds.update(dict.fromkeys(gpu.seconds, RuntimeError("out of memory")))
    assert resolve("auto", [SHAPE], gpu).reason == "fallback"
    gpu.seconds["plain"] = 1.0
    assert resolve("auto", [SHAPE], gpu).reason == "timed"


def test_a_resumed_run_keeps_its_backend_where_the_device_has_it(gpu):
    assert resolve("auto", [SHAPE], gpu, recorded="plain") == Choice("plain", "run")
    assert resolve("auto", [SHAPE], gpu, recorded="gone").backend == "cudnn"
    assert resolve("auto", [SHAPE], jax.devices("cpu")[0], recorded="cudnn") == Choice("heads_first", "device")


def test_a_backend_asked_for_by_name_is_refused_with_what_is_allowed():
    with pytest.raises(UserError) as refused:
        resolve("cudnn", [SHAPE], jax.devices("cpu")[0])
    first, second = str(refused.value).splitlines()
    assert first == "config.model.attention_kernel is 'cudnn': it needs an NVIDIA GPU, and this is a CPU"
    assert second == "  allowed here: 'auto', 'heads_first'"
    assert resolve("plain", [SHAPE], jax.devices("cpu")[0]) == Choice("plain", "config")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transformed, bias", [(False, False), (True, True)])
def test_a_candidate_is_timed_and_compared_on_the_device(training, transformed, bias):
    shape = Shape(3, 5, 2, 8, "float32", bias=bias, transformed=transformed)
    assert 0 < attention_choice.measure("heads_first", shape, jax.devices("cpu")[0], training) < 1


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda values: values * 1.1, "the outputs are off by 0.1"),
        (lambda values: values + 0.1 * jax.lax.stop_gradient(values) - 0.1 * values, "the gradients are off"),
        (lambda values: values * jnp.nan, "the outputs are off by nan"),
    ],
)
def test_a_backend_that_computes_something_else_is_left_out(monkeypatch, wrong, words):
    def attend(queries, keys, values, bias, lengths):
        return wrong(attention_backends.plain(queries, keys, values, bias, lengths))

    monkeypatch.setitem(BACKENDS, "wrong", Backend(attend))
    device = jax.devices("cpu")[0]
    shape = Shape(3, 5, 2, 8, "float32")
    choice = choose(["wrong", "plain"], [shape], lambda name, shape: attention_choice.measure(name, shape, device))
    assert choice.backend == "plain" and words in choice.failures["wrong"]


def test_the_shapes_of_a_model_are_found_by_tracing_it():
    config = options.default()
    config.model.update(variant="Ti/4", width=64, depth=3, heads=2, mlp_width=8, pooling="none", position="sincos_2d")
    config.decoder.update(width=32, depth=2, heads=4)
    config.train.objective = "masked_autoencoder"
    objective = objectives.make(config)
    module = objective.module(models.build(config.model, None, "bfloat16"), (0.5,) * 3, (0.5,) * 3)
    with attention_choice.recorded_shapes() as calls:
        jax.eval_shape(lambda: state.initialize(module, (32, 32, 3), 0))
    assert list(calls) == [Shape(1, 16, 2, 32, "bfloat16"), Shape(1, 64, 4, 8, "bfloat16")]


def test_what_a_model_asks_of_a_backend_is_found_too():
    config = options.default()
    config.model.update(variant="Ti/4", width=32, depth=1, heads=2, mlp_width=8, position="relative", qk_norm=True)
    module = models.build(config.model, 10, "float32")
    with attention_choice.recorded_shapes() as calls:
        jax.eval_shape(lambda: state.initialize(module, (8, 8, 3), 0))
    assert list(calls) == [Shape(1, 5, 2, 16, "float32", bias=True, transformed=True)]


def test_the_environment_names_the_backend_and_never_ends_a_run(monkeypatch, tmp_path):
    choice = Choice("cudnn", "timed", {"cudnn": 1.0}, {"pallas": "Wrong: nan"})
    facts = records.environment(choice)
    assert facts["attention"] == dataclasses.asdict(choice) and facts["packages"]["jax"] == jax.__version__
    records.write_json(tmp_path / records.ENVIRONMENT, facts)
    assert workdir.attention_backend(tmp_path) == "cudnn"
    (tmp_path / records.ENVIRONMENT).write_text("{")
    assert workdir.attention_backend(tmp_path) is None

    def missing(*_):
        raise records.metadata.PackageNotFoundError("jax")

    monkeypatch.setattr(records.metadata, "version", missing)
    monkeypatch.setattr(records, "git_revision", missing)
    monkeypatch.setattr(records.platform, "platform", missing)
    facts = records.environment()
    assert facts["git"] is facts["platform"] is facts["attention"] is facts["packages"]["jax"] is None
    assert facts["backend"] == jax.default_backend()
    assert np.all([isinstance(name, str) for name in facts["packages"]])
