"""A config assembled into an Experiment: data, model, objective, augmentation and optimizer, built once."""

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import objectives, optim, sharding
from vit_jax.data import augment as augmentation
from vit_jax.data import normalization, pipeline, sources, splits
from vit_jax.data.augment import Augment
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.evaluation import exact
from vit_jax.evaluation.per_class import Predictions
from vit_jax.models.patches import patchify
from vit_jax.models.vit import VisionTransformer, token_grid
from vit_jax.objectives.base import Objective
from vit_jax.optim import layer_decay, trainable
from vit_jax.runtime import attention_choice, hardware
from vit_jax.runtime.attention_choice import Choice
from vit_jax.training import build_model, stored_features, trackers
from vit_jax.training.plan import Chunk
from vit_jax.training.state import TrainState, zero_metrics
from vit_jax.training.throughput import Throughput

ROLES = ("train", "validation", "test")
# Maximum number of steps per chunk of a streamed set on a CPU, where it is not known beforehand how long a step takes.
CPU_STREAMED_STEPS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that training and evaluation need, made of a config, devices and sources.

    It does not depend on the seed: one experiment serves runs of several seeds.

    Attributes:
        config: the config.
        mesh: the devices.
        sources: role -> source: 'train', and 'validation' and 'test' if the config has such splits.
        image_shape: (height, width, channels).
        model: the Vision Transformer, with a classifier if the objective needs labels.
        module: the module that the training step applies: the model, what the objective builds around it, or the
            model's head alone on stored features.
        objective: what is learned.
        augment: augmentation and normalization of images to the module's inputs.
        num_steps: length of the run in training steps.
        schedule: learning rate after a number of updates.
        optimizer: the optax transformation.
        mask: tree of bool, True for trained parameters; None if all of them are trained.
        attention: the attention backend, and why it was chosen.
    """

    config: ConfigDict
    mesh: Mesh
    sources: dict[str, Source]
    image_shape: tuple[int, int, int]
    model: VisionTransformer
    module: nn.Module
    objective: Objective
    augment: Augment
    num_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    mask: Any | None
    attention: Choice

    @property
    def steps_per_epoch(self) -> float:
        """Number of training steps per pass over the training split."""
        return len(self.sources["train"]) / self.config.train.batch_size

    @property
    def platform(self) -> str:
        """The devices' platform: 'cpu', 'gpu' or 'tpu'."""
        return self.mesh.devices.flat[0].platform

    @property
    def evaluation_batch_size(self) -> int:
        """Examples per evaluation batch, rounded up to a multiple of the number of devices."""
        size = self.config.train.evaluation_batch_size or self.config.train.batch_size
        return -(-size // self.mesh.size) * self.mesh.size

    @functools.cached_property
    def pipelines(self) -> "Pipelines":
        """Role -> pipeline over that source, made when it is first asked for."""
        return Pipelines(self)

    @functools.cached_property
    def max_chunk_steps(self) -> int:
        """Maximum number of training steps per jitted call."""
        train, pipe = self.config.train, self.pipelines["train"]
        rows = pipe.rows(train.batch_size, train.steps_per_dispatch)
        return rows if pipe.resident is not None or self.platform != "cpu" else min(rows, CPU_STREAMED_STEPS)

    @property
    def adapts_chunks(self) -> bool:
        """Whether the number of steps per jitted call is adapted to the measured time.

        Not in a cluster, whose processes must use the same chunks, nor for a streamed dataset, which is read ahead.
        """
        return jax.process_count() == 1 and self.pipelines["train"].resident is not None

    @functools.cached_property
    def scorer(self) -> Callable:
        """The jitted evaluation of `evaluation.exact`."""
        return exact.make_scorer(self.module, self.augment, self.mesh, self.objective)

    def make_throughput(self, seconds: float) -> Throughput:
        """Returns a meter of training throughput; `seconds` were spent before this process."""
        peak = hardware.peak(self.mesh.devices.flat[0].device_kind)
        peak = None if peak is None or stored_features.in_use(self.sources) else peak * self.mesh.size
        # Forward, and twice that backward; a frozen backbone has no backward pass.
        passes = 1 if trainable.only_head(self.mask) else 3
        return Throughput(self.config.train.batch_size, passes * self.forward_flops, peak, seconds)

    def config_of(self, seed: int) -> ConfigDict:
        """Returns the config of a run with this seed alone."""
        return config_of_seed(self.config, seed)

    @property
    def network(self) -> nn.Module:
        """The module whose parameters the state holds: `module`, or the whole model if that is its head alone."""
        return self.model if stored_features.in_use(self.sources) else self.module

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._state_shapes.parameters))

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward pass."""
        height, width, channels = self.image_shape
        return self.objective.forward_flops(self.network, (height, width), channels)

    def init_state(self, seed: int, backbone: Any | None = None) -> TrainState:
        """Returns the state before the first step, on the devices.

        Args:
            seed: seeds the parameters.
            backbone: parameters of the Vision Transformer to start from; None for random ones.
        """
        # The seed is a constant of the program, not an argument: the compiler then folds the same operations as in 0.1.
        create = functools.partial(self._init_state, seed)
        return jax.jit(create, out_shardings=self.state_sharding())(*(() if backbone is None else (backbone,)))

    def abstract_state(self) -> TrainState:
        """Returns the state with shapes, dtypes and shardings in place of arrays."""

        def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(with_sharding, self._state_shapes, self.state_sharding())

    def state_sharding(self) -> TrainState:
        """Returns the sharding of every array of the state."""
        return sharding.state_sharding(self._state_shapes, self.mesh)

    @functools.cached_property
    def _state_shapes(self) -> TrainState:
        return jax.eval_shape(lambda: self._init_state(0))

    def _init_state(self, seed: int, backbone: Any | None = None) -> TrainState:
        def draw() -> Any:
            return init_parameters(self.network, self.image_shape, seed)

        parameters = draw() if backbone is None else self.objective.init_from_backbone(backbone, draw)
        counters = ("step", "skipped_batches", "nonfinite_streak", "updates")
        # A copy: no two arrays of the state may share a buffer, since all of them are donated.
        averaged = jax.tree.map(jnp.copy, parameters) if self.config.optimizer.average_decay > 0 else None
        return TrainState(
            **{name: jnp.zeros((), jnp.int32) for name in counters},
            parameters=parameters,
            optimizer=self.optimizer.init(trainable.select(parameters, self.mask)),
            averaged=averaged,
            objective=self.objective.init_state(parameters),
            metrics=zero_metrics(self.objective.metrics),
        )

    def feeds(
        self, chunks: Iterable[Chunk], seed: int, skipped_batches: int = 0
    ) -> Iterator[tuple[Chunk, pipeline.Feed]]:
        """Yields each chunk of training steps with its batches; a streamed dataset is read ahead."""
        train, planned = self.config.train, collections.deque()

        def tables() -> Iterator[tuple[np.ndarray, int]]:
            for chunk in chunks:
                planned.append(chunk)
                where = (chunk.start + skipped_batches, chunk.count, self.max_chunk_steps, len(self.sources["train"]))
                table = pipeline.train_indices(seed, train.batch_size, *where, self.config.augment.repeats)
                yield table, chunk.count

        for feed in self.pipelines["train"].feeds(tables()):
            yield planned.popleft(), feed

    def evaluate(
        self, parameters: Any, role: str, should_stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float | int], dict[str, Predictions]]:
        """Returns the metrics of a whole split, every example counted once, and the predictions by head.

        Raises:
            Interrupted: a stop was requested.
        """
        split = (self.pipelines[role], self.evaluation_batch_size, role)
        return exact.evaluate(self.scorer, parameters, *split, self.objective, should_stop)


class Pipelines(dict[str, pipeline.Pipeline]):
    """Role -> pipeline; each is made when it is first asked for, which copies a resident set to the devices."""

    def __init__(self, experiment: Experiment):
        """Makes none yet."""
        super().__init__()
        self._experiment = experiment

    def __missing__(self, role: str) -> pipeline.Pipeline:
        data = self._experiment.config.data
        reading = pipeline.Reading(data.workers, data.ahead, data.worker_timeout)
        source = self._experiment.sources[role]
        self[role] = made = pipeline.make(source, self._experiment.mesh, data.resident, reading)
        return made

    def make_all(self) -> "Pipelines":
        """Makes those of all sources; returns itself."""
        for role in self._experiment.sources:
            self[role]
        return self


def config_of_seed(config: ConfigDict, seed: int) -> ConfigDict:
    """Returns a copy of a config, for a run with this seed alone."""
    config = copy.deepcopy(config)
    config.train.update(seed=seed, seeds=None)
    return config


def check(config: ConfigDict) -> Mesh:
    """Checks a config against the devices and its data on disk, and returns the mesh; nothing is loaded or compiled.

    Raises:
        UserError: what is wrong, and what to do.
    """
    trackers.check(config)
    data = config.data
    try:
        mesh = check_data(config, [data[role] for role in ROLES if data[role]])
    except splits.UnknownSplit as error:
        raise UserError(f"{error}{_other_splits(data, error)}") from None
    if config.train.batch_size != "auto":
        sharding.check_batch(config.train.batch_size, config.train.accumulation, mesh)
    return mesh


def _other_splits(data: ConfigDict, error: splits.UnknownSplit) -> str:
    """Returns a line with the flags that set other splits in place of one that is not stored; '' if none do."""
    role = next((role for role in ROLES[1:] if data[role] == error.split), None)
    if role is None:
        return ""
    others = [name for name in error.sizes if name not in ("train", data.validation, data.test)]
    if others:
        return f"\n  use --config.data.{role}={others[0]}"
    return f"\n  use a part of train: --config.data.train='train[:80%]' --config.data.{role}='train[80%:]'"


def check_data(config: ConfigDict, expressions: list[str]) -> Mesh:
    """As `check`, for the given split expressions and any batch size."""
    mesh, data = sharding.make_mesh(config.mesh.devices), config.data
    if data.features:
        stored_features.check_files(config)
        return mesh
    where = {"data_dir": data.dir, "cache_dir": data.cache_dir, "image_size": data.image_size}
    shape = sources.check(data.name, expressions, held_out=data.held_out, labels=data.labels, **where)
    normalization.constants(data.normalization, shape[2])
    _check_image_size(config, shape)
    augmentation.check_shape(config.augment, shape)
    return mesh


def _check_classes(train: Source, loss: str) -> None:
    for name, names in train.class_names_by_label().items():
        if len(names) == 1 and loss == "softmax":
            raise UserError(
                f"dataset {train.name!r}: there is only one class ({name}: {names[0]}), so nothing can be learned\n"
                "  expected: two classes or more; set config.data.dir to the folder that contains one folder per class"
            )


def _check_image_size(config: ConfigDict, shape: tuple[int, ...]) -> None:
    model = build_model.build(config.model, classes=2, dtype="float32")
    if config.data.patches and (model.stem is not None or shape[0] != shape[1]):
        raise UserError(
            f"config.data.patches is True, model {config.model.variant}, images of {shape[0]}x{shape[1]}\n"
            "  allowed: only with square images and a model without a ResNet stem"
        )
    try:
        rows, columns = token_grid(model, (shape[0], shape[1]))
        if rows * columns < (minimum := objectives.make(config).min_patches):
            raise ValueError(f"config.train.objective={config.train.objective!r} needs at least {minimum} patches")
    except ValueError as error:
        fitting = [size for size in range(1, min(shape[:2]) + 1) if shape[0] % size == shape[1] % size == 0]
        patches = f"patches of {', '.join(map(str, fitting))}; or " if model.stem is None else ""
        raise UserError(
            f"config.model.variant is {config.model.variant!r}: {error}\n"
            f"  allowed: {patches}another config.data.image_size"
        ) from None


def load_sources(config: ConfigDict, expressions: dict[str, str] | None = None) -> dict[str, Source]:
    """Returns role -> source, for the splits of `config.data` or for `expressions` (role -> split expression).

    Raises:
        UserError: the data cannot be found or read.
    """
    data = config.data
    expressions = expressions or {role: data[role] for role in ROLES if data[role]}
    if data.features:
        return stored_features.load(config, expressions)
    return {role: load(config, split, data.labels) for role, split in expressions.items()}


def load(config: ConfigDict, split: str, labels: Sequence[str]) -> Source:
    """Returns one split of the dataset of `config.data`, with these kinds of label."""
    data = config.data
    return sources.load(
        data.name,
        split,
        data_dir=data.dir,
        cache_dir=data.cache_dir,
        image_size=data.image_size,
        decoded=data.decoded,
        skip_broken=data.skip_broken,
        held_out=data.held_out,
        labels=labels,
    )


def assemble(
    config: ConfigDict,
    mesh: Mesh,
    sources: dict[str, Source],
    *,
    attention: Choice | None = None,
    training: bool = True,
) -> Experiment:
    """Builds the model, objective, augmentation and optimizer of a config for these devices and sources.

    Args:
        config: a checked config.
        mesh: of `sharding.make_mesh`.
        sources: role -> source, 'train' among them; of `load_sources`, or made in memory.
        attention: the attention backend with which the run began; None for a new run.
        training: False if the model is only evaluated.

    Raises:
        UserError: the sources do not fit the model.
    """
    train, on_features = sources["train"], stored_features.in_use(sources)
    image_shape, objective = train.image_shape, objectives.make(config)
    if training and objective.needs_labels:
        _check_classes(train, config.train.loss)
    if training and config.train.class_weights == "balanced":
        objective = objective.balanced(train.labels_by_kind(), train.class_names_by_label())
    model = build_model.build(config.model, train.classes() if objective.needs_labels else None, dtype=None)
    mean, std = ((), ()) if on_features else normalization.of_source(config.data.normalization, train)
    with attention_choice.recorded_shapes() as calls:
        untuned = objective.make_module(model, mean, std)
        shapes = jax.eval_shape(lambda: init_parameters(untuned, image_shape, 0))
    choice = attention_choice.resolve(
        config.model.attention_kernel,
        attention_choice.with_batch(calls, max(1, config.train.batch_size // (mesh.size * config.train.accumulation))),
        jax.local_devices(backend=mesh.devices.flat[0].platform)[0],
        training=training,
        recorded=attention,
    )
    model = model.clone(attention_kernel=choice.backend)
    num_steps = config.train.steps or max(1, round(config.train.epochs * len(train) / config.train.batch_size))
    mask = trainable.trained(config.optimizer, shapes)
    factors = _layer_decay(config.optimizer.layer_decay, shapes, objective, model.depth, mask)
    if on_features:
        module, augment = stored_features.head_and_augment(model)
    else:
        module = objective.make_module(model, mean, std)
        arrange = functools.partial(patchify, patch_size=model.patch_size) if config.data.patches else None
        dtype = objective.input_dtype(model)
        augment = Augment(mean, std, arrange=arrange, dtype=dtype, **config.augment.to_dict())
    return Experiment(
        config=config,
        mesh=mesh,
        sources=sources,
        image_shape=image_shape,
        model=model,
        module=module,
        objective=objective,
        augment=augment,
        num_steps=num_steps,
        schedule=optim.schedule(config.optimizer, num_steps),
        optimizer=optim.make(config.optimizer, num_steps, factors),
        mask=mask,
        attention=choice,
    )


def init_parameters(module: nn.Module, image_shape: tuple[int, ...], seed: int) -> Any:
    """Returns random parameters of a module, for images of (height, width, channels)."""
    return module.init(jax.random.key(seed), jnp.zeros((1, *image_shape)))["params"]


def _layer_decay(decay: float, shapes: Any, objective: Objective, depth: int, mask: Any | None) -> Any | None:
    """Returns the factors of the learning rate for the trained parameters; 1 outside the backbone."""
    if decay == 1:
        return None
    backbone = layer_decay.factors(decay, objective.backbone(shapes), depth)
    ones = jax.tree.map(lambda _: 1.0, shapes)
    return trainable.select(objective.init_from_backbone(backbone, lambda: ones), mask)
