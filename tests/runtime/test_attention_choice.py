"""The choice of an attention backend: timed candidates, failing candidates, the cache, resumed runs."""

import dataclasses
import json
import platform
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import atomic, objectives
from vit_jax import config as options
from vit_jax.checkpoint import run_files
from vit_jax.errors import UserError
from vit_jax.models import attention_backends
from vit_jax.models.attention_backends import BACKENDS, Backend, Device, Shape
from vit_jax.runtime import attention_choice
from vit_jax.runtime.attention_choice import Choice, choose, resolve
from vit_jax.runtime.attention_timing import Probe
from vit_jax.training import build_model, environment, run_directory, setup

SHAPE = Shape(batch=4, tokens=65, heads=2, size=64, dtype="bfloat16")
ONE = {SHAPE: 1}
CPU = jax.devices("cpu")[0]


class Gpu:
    """A device that claims to be a GPU."""

    platform, device_kind, compute_capability = "gpu", "NVIDIA Imaginary", "9.0"
    client = None


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Such a device, an empty cache, and the seconds or the error of each backend on it."""
    gpu = Gpu()
    gpu.timed = []
    gpu.seconds = dict(zip(BACKENDS, (6e-3, 5e-3, 1e-3, 2e-3, 3e-3, 4e-3), strict=True))

    class Probe:
        def __init__(self, shape, device, training):
            assert device is gpu

        def seconds(self, name):
            gpu.timed.append(name)
            if isinstance(gpu.seconds[name], Exception):
                raise gpu.seconds[name]
            return gpu.seconds[name]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(attention_choice, "Probe", Probe)
    return gpu


def test_the_candidate_with_the_least_total_time_is_chosen():
    short, long = SHAPE, dataclasses.replace(SHAPE, tokens=197)
    seconds = {("a", short): 1e-3, ("a", long): 9e-3, ("b", short): 2e-3, ("b", long): 2e-3}
    choice = choose(["a", "b"], {short: 12, long: 1}, lambda name, shape: seconds[name, shape])
    assert choice == Choice("a", "timed", {"a": 21.0, "b": 26.0})
    assert choose(["a", "b"], {short: 1, long: 2}, lambda name, shape: seconds[name, shape]).backend == "b"


def test_a_failing_candidate_is_left_out_with_its_error():
    def seconds(name, shape):
        if name == "a":
            raise NotImplementedError("Unsupported sequence length\nQ 65, KV 65.")
        return 1.0

    choice = choose(["a", "b"], ONE, seconds)
    assert choice.backend == "b"
    assert choice.failures == {"a": "NotImplementedError: Unsupported sequence length Q 65, KV 65."}
    assert choice.describe() == f"b (timed: b 1000.00 ms; a failed: {choice.failures['a']})"
    assert Choice("b", "device").describe() == "b" and Choice("b", "run").describe() == "b (as when the run started)"


def test_the_fallback_is_chosen_if_every_candidate_fails():
    def seconds(name, shape):
        raise RuntimeError("no kernel image is available")

    assert choose(["cudnn", "plain"], ONE, seconds).backend == attention_backends.FALLBACK


def test_on_a_gpu_candidates_are_timed_once_and_then_cached(gpu, capsys):
    first = resolve("auto", ONE, gpu)
    assert (first.backend, first.reason, first.device) == ("cudnn", "timed", "NVIDIA Imaginary")
    assert set(gpu.timed) == set(attention_backends.candidates(Device("gpu", (9, 0)), ONE))
    assert capsys.readouterr().out.startswith("timing the attention backends ")
    gpu.timed.clear()
    again = resolve("auto", ONE, gpu)
    assert again == dataclasses.replace(first, reason="cached") and not gpu.timed
    assert resolve("auto", {dataclasses.replace(SHAPE, tokens=197): 1}, gpu).reason == "timed"
    assert resolve("auto", ONE, gpu, training=False).reason == "timed"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"backend": "gone", "reason": "timed"}'])
def test_a_damaged_cache_file_is_replaced(gpu, tmp_path, damage):
    first = resolve("auto", ONE, gpu)
    (path,) = tmp_path.rglob("attention/*.json")
    path.write_text(damage)
    assert resolve("auto", ONE, gpu) == first
    assert json.loads(path.read_text())["backend"] == "cudnn"


def test_a_cache_that_cannot_be_written_is_ignored(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert resolve("auto", ONE, gpu).backend == "cudnn"


def test_a_temporary_failure_is_not_cached(gpu):
    gpu.seconds["cudnn"] = RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert resolve("auto", ONE, gpu).backend == "pallas"
    gpu.seconds["cudnn"] = NotImplementedError("not for this shape")
    assert resolve("auto", ONE, gpu).reason == "timed"
    assert resolve("auto", ONE, gpu).reason == "cached"


def test_a_fallback_is_not_cached(gpu):
    gpu.seconds.update(dict.fromkeys(gpu.seconds, RuntimeError("out of memory")))
    assert resolve("auto", ONE, gpu).backend == "plain" and resolve("auto", ONE, gpu).reason == "fallback"
    gpu.seconds["pallas"] = 1.0
    assert resolve("auto", ONE, gpu).reason == "timed"


def test_a_resumed_run_keeps_its_backend_on_the_same_kind_of_device(gpu):
    def resumed(backend, reason="timed", device=gpu.device_kind):
        return resolve("auto", ONE, gpu, recorded=Choice(backend, reason, device=device))

    assert resumed("pallas") == Choice("pallas", "run", device=gpu.device_kind)
    timed = resolve("auto", ONE, gpu)
    assert resolve("auto", ONE, gpu, recorded=timed) == dataclasses.replace(timed, reason="run")  # with its timings
    assert resumed("gone").backend == resumed("heads_first", "device", "cpu").backend == "cudnn"
    assert resumed("pallas", device="NVIDIA Other").backend == "cudnn"
    assert resumed("plain", "fallback").backend == "cudnn"  # the device may have been busy
    assert resumed("pallas", "config").backend == "cudnn"  # named by the earlier config, not by this one
    assert resolve("auto", ONE, CPU, recorded=resumed("cudnn")) == Choice("heads_first", "device", device="cpu")


def test_with_attention_dropout_nothing_is_timed_in_training(gpu):
    dropping = {dataclasses.replace(SHAPE, dropout=True): 12}
    choice = resolve("auto", dropping, gpu)
    assert (choice.backend, choice.reason) == ("plain", "dropout") and not gpu.timed
    assert resolve("auto", dropping, gpu, training=False).reason == "timed"


def test_a_named_backend_that_does_not_work_is_refused():
    with pytest.raises(UserError) as refused:
        resolve("cudnn", ONE, CPU)
    first, second = str(refused.value).splitlines()
    assert first == "config.model.attention_kernel is 'cudnn': it needs an NVIDIA GPU, and this is a CPU"
    assert second == "  allowed here: 'auto', 'plain', 'heads_first'"
    assert resolve("plain", ONE, CPU) == Choice("plain", "config", device="cpu")
    assert resolve("cudnn", ONE, CPU, training=False).backend == "heads_first"  # evaluated on another machine


@pytest.mark.parametrize("name", ["cudnn", "pallas"])
def test_a_run_with_an_unavailable_backend_is_refused_before_tracing(name):
    config = options.default()
    config.model.update(variant="Ti/4", width=16, depth=1, heads=2, mlp_width=8, attention_kernel=name)
    config.train.steps = 1
    with pytest.raises(UserError, match=f"attention_kernel is '{name}': it needs an NVIDIA GPU"):
        setup.assemble(config, setup.check(config), setup.load_sources(config))
    assert (
        setup.assemble(config, setup.check(config), setup.load_sources(config), training=False).attention.backend
        == "heads_first"
    )


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("more", [{}, {"transformed": True, "bias": True}, {"lengths": True}])
def test_a_candidate_is_checked_and_timed_on_the_device(training, more):
    probe = Probe(Shape(3, 5, 2, 8, "float32", **more), CPU, training)
    assert 0 < probe.seconds("plain" if "lengths" in more else "heads_first") < 1


def scaled_gradient(values, factor):
    """The values, with a scaled gradient."""
    return factor * values + (1 - factor) * jax.lax.stop_gradient(values)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda values, bias: 1.1 * values, "the output has a relative error of 0.1"),
        (lambda values, bias: jnp.nan * values, "the output is not finite"),
        (lambda values, bias: scaled_gradient(values, 0.9), "the gradient of the tokens has a relative error of 0.1"),
        (lambda values, bias: values + bias.mean() - jax.lax.stop_gradient(bias.mean()), "the gradient of the bias"),
    ],
)
def test_an_incorrect_backend_is_left_out(monkeypatch, wrong, message):
    def attend(queries, keys, values, bias, lengths):
        return wrong(attention_backends.plain(queries, keys, values, bias, lengths), bias)

    monkeypatch.setitem(BACKENDS, "wrong", Backend(attend, takes_bias=True))
    shape = Shape(3, 5, 2, 8, "float32", bias=True)
    probe = Probe(shape, CPU, training=True)
    choice = choose(["wrong", "plain"], {shape: 1}, lambda name, shape: probe.seconds(name))
    assert choice.backend == "plain" and message in choice.failures["wrong"]


@pytest.mark.parametrize("scan", [False, True])
def test_the_attention_calls_of_a_model_are_counted_by_tracing(scan):
    config = options.default()
    config.model.update(variant="Ti/4", width=64, depth=3, heads=2, mlp_width=8, pooling="none", position="sincos_2d")
    config.decoder.update(width=32, depth=2, heads=4)
    config.train.objective = "masked_autoencoder"
    config.model.scan = scan
    objective = objectives.make(config)
    module = objective.make_module(build_model.build(config.model, None, "bfloat16"), (0.5,) * 3, (0.5,) * 3)
    with attention_choice.recorded_shapes() as calls:
        jax.eval_shape(lambda: setup.init_parameters(module, (32, 32, 3), 0))
    assert calls == {Shape(1, 16, 2, 32, "bfloat16"): 3, Shape(1, 64, 4, 8, "bfloat16"): 2}


def test_traced_calls_record_bias_transforms_and_dropout():
    config = options.default()
    config.model.update(variant="Ti/4", width=32, depth=1, heads=2, mlp_width=8, position="relative", qk_norm=True)
    config.model.attention_dropout = 0.1
    module = build_model.build(config.model, 10, "float32")
    with attention_choice.recorded_shapes() as calls:
        jax.eval_shape(lambda: setup.init_parameters(module, (8, 8, 3), 0))
    assert calls == {Shape(1, 5, 2, 16, "float32", bias=True, transformed=True, dropout=True): 1}


def test_the_environment_names_the_backend_and_never_raises(monkeypatch, tmp_path):
    choice = Choice("cudnn", "timed", {"cudnn": 1.0}, {"pallas": "IncorrectBackend: nan"})
    facts = environment.environment(choice)
    assert facts["attention"] == dataclasses.asdict(choice) and facts["packages"]["jax"] == jax.__version__
    atomic.write_json(tmp_path / run_files.ENVIRONMENT, facts)
    assert run_directory.attention_choice(tmp_path) == choice
    (tmp_path / run_files.ENVIRONMENT).write_text("{")
    assert run_directory.attention_choice(tmp_path) is None

    def missing(*_):
        raise metadata.PackageNotFoundError("jax")

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(environment, "git_revision", missing)
    monkeypatch.setattr(platform, "platform", missing)
    facts = environment.environment()
    assert facts["attention"] is None
    for value in (facts["git"], facts["platform"], facts["packages"]["jax"]):
        assert value.startswith("unknown: PackageNotFoundError: ")
    assert facts["backend"] == jax.default_backend()
    assert np.all([isinstance(name, str) for name in facts["packages"]])
