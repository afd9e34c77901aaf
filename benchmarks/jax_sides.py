"""The JAX sides: the bare training step of a model, the step of the trainer, and inference. Started by sides.py."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import work as works
from child import resident_mb, serve
from work import Work

from vit_jax.runtime import cpu_allocator

if __name__ == "__main__":
    requested = Work(**json.loads(sys.argv[1]))
    if requested.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if requested.side != "plain_flax":
        cpu_allocator.keep_memory()  # as commands do, before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax
from plain_flax import PlainViT

from vit_jax import config as options
from vit_jax import sharding
from vit_jax.data.sources import Source
from vit_jax.models.attention_backends import FALLBACK
from vit_jax.models.parameters import nested
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.losses import cross_entropy
from vit_jax.runtime import attention_choice, hardware
from vit_jax.training import build_model, setup
from vit_jax.training.setup import Experiment
from vit_jax.training.step import make_update

FIRST = 3  # number of steps whose losses are reported
ROWS = 10  # maximum number of steps per dispatch of the trainer


def for_plain_flax(flat: dict[str, np.ndarray], work: Work) -> dict[str, Any]:
    """The same parameters by the names and with the shapes of Flax's own layers."""
    width, heads, patch = work.width, work.heads, work.patch_size
    size = width // heads
    named = {"token": flat["class_token"], "positions": flat["positions/table"]}

    def layer(ours: str, theirs: str) -> None:
        for name in ("kernel", "scale", "bias"):
            if f"{ours}/{name}" in flat:
                named[f"{theirs}/{name}"] = flat[f"{ours}/{name}"]

    layer("embedding/projection", "Conv_0")
    named["Conv_0/kernel"] = named["Conv_0/kernel"].reshape(patch, patch, 3, width)
    for index in range(work.depth):
        ours, theirs = f"encoder/block_{index}", f"Block_{index}"
        attention = f"{theirs}/MultiHeadDotProductAttention_0"
        pairs = {"norm_attention": "LayerNorm_0", "norm_mlp": "LayerNorm_1", "mlp/up": "Dense_0", "mlp/down": "Dense_1"}
        for name, other in pairs.items():
            layer(f"{ours}/{name}", f"{theirs}/{other}")
        layer(f"{ours}/attention/out", f"{attention}/out")
        named[f"{attention}/out/kernel"] = named[f"{attention}/out/kernel"].reshape(heads, size, width)
        for index_in_qkv, name in enumerate(("query", "key", "value")):
            part = slice(index_in_qkv * width, (index_in_qkv + 1) * width)
            kernel, bias = flat[f"{ours}/attention/qkv/kernel"][:, part], flat[f"{ours}/attention/qkv/bias"][part]
            named[f"{attention}/{name}/kernel"] = kernel.reshape(width, heads, size)
            named[f"{attention}/{name}/bias"] = bias.reshape(heads, size)
    layer("encoder/norm", "LayerNorm_0")
    layer("head/logits", "Dense_0")
    return nested(named)


def built(work: Work) -> VisionTransformer:
    """Our model as training builds it: with the attention backend and compute dtype for this device.

    Raises:
        UserError: it would be slower in the compute dtype asked for.
    """
    section = options.default().model
    sizes = {name: getattr(work, name) for name in ("width", "depth", "heads", "mlp_width")}
    section.update(work.fields or {"variant": f"Ti/{work.patch_size}", **sizes})
    section.dtype = work.dtype
    model = build_model.build(section, work.classes, dtype=None)
    image = (work.image_size, work.image_size, work.channels)
    training, wanted = work.mode == "train", section.attention_kernel
    choice = attention_choice.resolve_for(model, image, work.batch_size, wanted, training)
    return model.clone(attention_kernel=choice.backend)


def compiler_options(name: str) -> dict[str, Any]:
    """The compiler options of training for our sides; none for others."""
    return {} if name == "plain_flax" else {"compiler_options": hardware.compiler_options(jax.devices()[0].platform)}


def start(work: Work, name: str) -> tuple[Any, Any]:
    """The model and its initial parameters, which are the same for all sides."""
    if name == "plain_flax":
        model = PlainViT(classes=work.classes, dtype=jnp.dtype(work.dtype), **work.model())
    else:
        model = built(work)
    if work.fields:
        shape = (work.image_size, work.image_size, work.channels)
        return model, jax.jit(lambda: setup.init_parameters(model, shape, 0))()
    flat = works.parameters(work)
    tree = nested(flat) if name == "ours" else for_plain_flax(flat, work)
    # Copied, because donated buffers must not be those of NumPy.
    return model, jax.block_until_ready(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree))


def send(work: Work) -> list[tuple[jax.Array, jax.Array]]:
    """Normalized images and one-hot targets of each batch, on the device."""
    images, labels = works.examples(work)
    return [
        (jax.device_put(works.normalized(batch)), jax.nn.one_hot(indices, work.classes))
        for batch, indices in zip(images, labels, strict=True)
    ]


def make_step(model: Any, optimizer: optax.GradientTransformation) -> Callable:
    """A minimal training step: a function of (parameters, optimizer state), images and targets."""

    def step(state, images, targets):
        parameters, moments = state
        # For models with dropout; a function of the step, so that it is not a constant of the program.
        key = jax.random.fold_in(jax.random.key(0), optax.tree_utils.tree_get(moments, "count"))

        def loss(parameters):
            logits = model.apply({"params": parameters}, images, train=True, rngs={"dropout": key})
            return cross_entropy(logits, targets).mean()

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), value

    return step


class Side:
    """Base of the sides: the report that they make once they are compiled and warmed up."""

    compile_s = 0.0

    def set_report(self, first: float, **more: Any) -> None:
        """`first`: seconds per step."""
        stats = jax.local_devices()[0].memory_stats() or {}
        peak = stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else resident_mb()
        self.report = {
            "device": jax.devices()[0].device_kind,
            "library": f"jax {jax.__version__}",
            "compile_s": round(self.compile_s, 2),
            "step_s": first,
            "peak_memory_mb": round(peak),
            **more,
        }

    def compile(self, function: Callable, *arguments: Any, **options: Any) -> jax.stages.Compiled:
        began = time.perf_counter()
        compiled = jax.jit(function, **options).lower(*arguments).compile()
        self.compile_s = time.perf_counter() - began
        return compiled


class Bare(Side):
    """Whole training steps with AdamW in a plain loop on the host."""

    def __init__(self, work: Work):
        model, parameters = start(work, work.side)
        optimizer = optax.adamw(works.LEARNING_RATE, *works.BETAS, works.EPSILON, weight_decay=works.WEIGHT_DECAY)
        self.batches, self.num_steps = send(work), 0
        self.state = (parameters, optimizer.init(parameters))
        settings = {"donate_argnums": 0, **compiler_options(work.side)}
        self.step = self.compile(make_step(model, optimizer), self.state, *self.batches[0], **settings)
        losses = []
        for _ in range(FIRST):
            self._run(1)
            losses.append(round(float(self.value), 5))
        self.set_report(self.turn(1), losses=losses)

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            batch = self.batches[self.num_steps % len(self.batches)]
            self.state, self.value = self.step(self.state, *batch)
            self.num_steps += 1

    def turn(self, steps: int) -> float:
        began = time.perf_counter()
        self._run(steps)
        jax.block_until_ready((self.state, self.value))
        return time.perf_counter() - began


def experiment_of(work: Work, model: VisionTransformer) -> Experiment:
    """The experiment that training assembles for such a model: one device, no augmentation, the set resident."""
    config = options.default()
    config.model.update(variant=f"Ti/{model.patch_size}", attention_kernel=FALLBACK)  # replaced by the model below
    config.optimizer.update(schedule="constant", weight_decay=works.WEIGHT_DECAY)
    config.train.update(batch_size=work.batch_size, steps=10**6, steps_per_dispatch=ROWS)
    config.data.resident, config.log.every = "always", 10**6
    images, labels = (array.reshape(-1, *array.shape[2:]) for array in works.examples(work))
    names = tuple(str(k) for k in range(work.classes))
    source = Source("synthetic", "train", images, labels, names, (works.MEAN,) * 3, (works.STD,) * 3)
    experiment = setup.assemble(config, sharding.make_mesh(1), {"train": source})
    augment = dataclasses.replace(experiment.augment, dtype=model.dtype)
    return dataclasses.replace(experiment, model=model, module=model, augment=augment)


class Trainer(Side):
    """The step of training: many per dispatch, from uint8 images, with all its checks and metrics."""

    def __init__(self, work: Work):
        model, parameters = start(work, "ours")
        experiment = experiment_of(work, model)
        self.state = experiment.init_state(0, parameters)
        # Batch k always has the same examples, so that the first losses equal those of the other sides.
        table = np.arange(work.batches * work.batch_size, dtype=np.int32).reshape(work.batches, -1)
        self.feed = experiment.pipelines["train"].feed(np.resize(table, (ROWS, work.batch_size)))
        update = make_update(experiment)
        began = time.perf_counter()
        self.update = update.lower(self.state, self.feed, np.int32(0), np.int32(0)).compile()
        self.compile_s = time.perf_counter() - began
        losses = np.diff([0.0] + [self._losses_after(1) for _ in range(FIRST)]).round(4).tolist()
        self.set_report(self.turn(1), losses=losses)

    def _losses_after(self, steps: int) -> float:
        """Runs steps; the sum of the losses since the start."""
        self.turn(steps)
        return float(self.sums["loss"])

    def turn(self, steps: int) -> float:
        began = time.perf_counter()
        while steps:
            count = min(steps, ROWS)
            self.state, self.sums = self.update(self.state, self.feed, np.int32(count), np.int32(0))
            steps -= count
        jax.block_until_ready((self.state, self.sums))
        return time.perf_counter() - began


class Inference(Side):
    """Computes the logits of one batch; waits for every call."""

    def __init__(self, work: Work):
        model, self.parameters = start(work, work.side)
        self.images = send(work)[0][0]

        def logits(parameters, images):
            return model.apply({"params": parameters}, images)

        self.run = self.compile(logits, self.parameters, self.images, **compiler_options(work.side))
        first_logits = [round(float(value), 5) for value in self.run(self.parameters, self.images)[0, :3]]
        self.turn(2)
        self.set_report(self.turn(1)[0], logits=first_logits)

    def turn(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            jax.block_until_ready(self.run(self.parameters, self.images))
            seconds.append(time.perf_counter() - began)
        return seconds


def make(work: Work) -> Side:
    if work.mode == "infer":
        return Inference(work)
    return Trainer(work) if work.side == "ours_trainer" else Bare(work)


if __name__ == "__main__":
    serve(make)
