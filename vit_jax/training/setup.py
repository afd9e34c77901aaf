"""A config turned into the parts of a run, checked against its data and the devices before anything is compiled."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import objectives, optim, sharding
from vit_jax.data import augment as augmentation
from vit_jax.data import feature_store, normalization, pipeline, sources
from vit_jax.data.augment import AsTheyAre, Augment
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.models.patches import patchify
from vit_jax.models.pooling import HeadAlone
from vit_jax.models.vit import VisionTransformer, token_grid
from vit_jax.objectives import losses
from vit_jax.objectives.base import Objective
from vit_jax.optim import layer_decay, trainable
from vit_jax.runtime import attention_choice
from vit_jax.runtime.attention_choice import Choice
from vit_jax.training import build_model
from vit_jax.training import state as states
from vit_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
        config: what it was built from.
        mesh: the devices.
        sources: by role: 'train', and 'validation' and 'test' where there are such.
        image_shape: height, width and channels.
        model: for the set's classes; in pre-training by masked patches, without a head.
        applied: what steps and evaluation apply: `module`, or the model's head alone where features are stored.
        augment: for the set's channels; in the model's dtype.
        steps: updates in all.
        optimizer: the chain.
        mask: True where a parameter is trained; None where all are.
        objective: what is learned.
        module: whose parameters the state holds: the model, or what the objective builds around it.
        attention: the attention backend, and why it was chosen.
    """

    config: ConfigDict
    mesh: Mesh
    sources: dict[str, Source]
    image_shape: tuple[int, int, int]
    model: VisionTransformer
    applied: nn.Module
    augment: Augment | AsTheyAre
    steps: int
    optimizer: optax.GradientTransformation
    mask: Any | None
    objective: Objective
    module: nn.Module
    attention: Choice

    @property
    def steps_per_epoch(self) -> float:
        """Updates that make up one pass over the training split."""
        return len(self.sources["train"]) / self.config.train.batch_size

    def describe_classes(self) -> str:
        """'10 classes', or '10 classes of label, 2 of parity'."""
        source = self.sources["train"]
        if not source.others:
            return f"{source.classes()} classes"
        first, *rest = source.classes().items()
        return ", ".join([f"{first[1]} classes of {first[0]}", *(f"{count} of {name}" for name, count in rest)])

    def feeds(self, role: str) -> pipeline.Pipeline:
        """The pipeline over one of the sources."""
        data = self.config.data
        reading = pipeline.Reading(data.workers, data.ahead, data.worker_timeout)
        return pipeline.make(self.sources[role], self.mesh, data.resident, reading)

    def evaluation_batch_size(self) -> int:
        """Examples a step of evaluation, rounded up so that the devices divide it."""
        asked = self.config.train.evaluation_batch_size or self.config.train.batch_size
        return -(-asked // self.mesh.size) * self.mesh.size

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, without making it."""
        shapes = jax.eval_shape(self._create)
        everywhere = sharding.replicated(self.mesh)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)

    def initial_state(self, parameters: Any | None = None) -> TrainState:
        """The state before the first step, on every device; from `parameters` of the model where they are given."""
        arguments = () if parameters is None else (parameters,)
        return jax.jit(self._create, out_shardings=sharding.replicated(self.mesh))(*arguments)

    def _create(self, parameters: Any | None = None) -> TrainState:
        initialize = functools.partial(states.initialize, self.module, self.image_shape, self.config.train.seed)
        parameters = initialize() if parameters is None else self.objective.init_from_backbone(parameters, initialize)
        average = self.config.optimizer.average_decay > 0
        return states.create(parameters, self.optimizer, average, self.objective.metrics, self.mask)


def check(config: ConfigDict) -> Mesh:
    """Checks a config against the devices and the presence of its data; quick, and nothing is loaded or compiled.

    Raises:
        UserError: what is wrong, and the way out.
    """
    data = config.data
    mesh = check_data(config, [split for split in (data.train, data.validation, data.test) if split])
    if config.train.batch_size != "auto":
        sharding.check_batch(config.train.batch_size, config.train.accumulation, mesh)
    return mesh


def check_data(config: ConfigDict, splits: list[str]) -> Mesh:
    """As `check`, for these splits, and whatever the batch size is."""
    mesh, data = sharding.make_mesh(config.mesh.devices), config.data
    if data.features:
        feature_store.find(Path(data.features).expanduser(), "train")
        return mesh
    where = {"data_dir": data.dir, "cache_dir": data.cache_dir, "image_size": data.image_size}
    shape = sources.check(data.name, splits, labels=losses.label_kinds(data), **where)
    normalization.constants(data.normalization, shape[2])
    _check_patch(config, shape)
    augmentation.check_shape(config, shape)
    return mesh


def _check_patch(config: ConfigDict, shape: tuple[int, ...]) -> None:
    model = build_model.build(config.model, classes=2, dtype="float32")
    if config.data.patches and (model.stem is not None or shape[0] != shape[1]):
        given = f"{config.model.variant} and images of {shape[0]}x{shape[1]}"
        raise UserError(
            f"config.data.patches is True, with {given}\n  allowed: with square images and no hybrid variant"
        )
    try:
        token_grid(model, (shape[0], shape[1]))
        objectives.check_shape(config, model, (shape[0], shape[1]))
    except ValueError as error:
        fitting = [size for size in range(1, min(shape[:2]) + 1) if shape[0] % size == shape[1] % size == 0]
        patches = f"patches of {', '.join(map(str, fitting))}; or " if model.stem is None else ""
        raise UserError(
            f"config.model.variant is {config.model.variant!r}: {error}\n"
            f"  allowed: {patches}another config.data.image_size"
        ) from None


def build(
    config: ConfigDict,
    mesh: Mesh,
    splits: dict[str, str] | None = None,
    *,
    attention: Choice | None = None,
    training: bool = True,
    vectorized: bool = False,
) -> Run:
    """Loads the data of a checked config and makes the parts of its run.

    Args:
        config: a config that has passed `check`.
        mesh: the devices.
        splits: split expressions by role, 'train' among them; None for those of the config.
        attention: the choice of an attention backend with which the run began; None for a new run.
        training: False where the run's model is only evaluated.
        vectorized: whether several seeds are trained in one program.

    Raises:
        UserError: the data cannot be had, or does not go with the model.
    """
    data, kinds = config.data, losses.label_kinds(config.data)
    if splits is None:
        splits = {role: data[role] for role in ("train", "validation", "test") if data[role]}
    if data.features:
        loaded, image_shape = _stored(config, splits)
    else:
        loaded = {role: load(config, split, kinds) for role, split in splits.items()}
        image_shape = loaded["train"].images.shape[1:]
    train = loaded["train"]
    objective, learns_labels = objectives.make(config), config.train.objective == "classify"
    model = build_model.build(config.model, classes=train.classes() if learns_labels else None, dtype=None)
    mean, std = normalization.of_source(data.normalization, train)
    with attention_choice.recorded_shapes() as calls:
        parameters = jax.eval_shape(
            lambda: states.initialize(objective.module(model, mean, std), image_shape, config.train.seed)
        )
    examples = max(1, config.train.batch_size // (mesh.size * config.train.accumulation))
    choice = attention_choice.resolve(
        config.model.attention_kernel,
        attention_choice.with_batch(calls, examples, vectorized=vectorized),
        jax.local_devices(backend=mesh.devices.flat[0].platform)[0],
        training=training,
        recorded=attention,
    )
    model = model.clone(attention_kernel=choice.backend)
    module = objective.module(model, mean, std)
    if data.features:
        applied, augment = HeadAlone(model.classes, model.pre_logits), AsTheyAre()
    else:
        arrange = functools.partial(patchify, patch_size=model.patch_size) if data.patches else None
        # Reconstruction targets stay float32; the model casts its inputs.
        dtype = model.dtype if learns_labels else "float32"
        augment = Augment(mean, std, arrange=arrange, dtype=dtype, **config.augment.to_dict())
        applied = module
    steps = config.train.steps or max(1, round(config.train.epochs * len(train) / config.train.batch_size))
    mask = trainable.trained(config.optimizer, parameters)
    factors = _factors(config.optimizer.layer_decay, parameters, objective, model.depth, mask)
    optimizer = optim.make(config.optimizer, steps, factors)
    parts = (loaded, image_shape, model, applied, augment, steps, optimizer, mask, objective, module, choice)
    return Run(config, mesh, *parts)


def _factors(decay: float, parameters: Any, objective: Objective, depth: int, mask: Any | None) -> Any | None:
    """Factors of layer-wise decay for the trained parameters; 1 for what an objective builds around the backbone."""
    if decay == 1:
        return None
    backbone = layer_decay.factors(decay, objective.backbone(parameters), depth)
    return trainable.select(
        objective.init_from_backbone(backbone, lambda: jax.tree.map(lambda _: 1.0, parameters)), mask
    )


def load(config: ConfigDict, split: str, labels: Sequence[str]) -> Source:
    """The images of a split as the config's section `data` has them, with these kinds of label."""
    data = config.data
    return sources.load(
        data.name,
        split,
        data_dir=data.dir,
        cache_dir=data.cache_dir,
        image_size=data.image_size,
        decoded=data.decoded,
        skip_broken=data.skip_broken,
        labels=labels,
    )


def _stored(config: ConfigDict, roles: Iterable[str]) -> tuple[dict[str, Source], tuple[int, int, int]]:
    """The stored features of each role, and the shape of the images that they are of."""
    folder, kinds = Path(config.data.features).expanduser(), losses.label_kinds(config.data)
    read = {role: feature_store.read(feature_store.find(folder, role)) for role in roles}
    for role, features in read.items():
        theirs, ours = (features.about["name"], features.about["split"]), (config.data.name, config.data[role])
        if theirs != ours:
            raise UserError(
                f"config.data.features: {features.path} is of {theirs[0]} {theirs[1]}, not of {ours[0]} {ours[1]}\n"
                f"  make it anew: python -m vit_jax.features --help; or say so: --config.data.{role}='{theirs[1]}'"
            )
        by = features.about.get("normalization", config.data.normalization)
        if by != config.data.normalization:
            raise UserError(
                f"config.data.normalization is {config.data.normalization!r}, and {features.path} is of images by "
                f"{by!r}\n  allowed: --config.data.normalization={by}"
            )
    return {role: features.source(kinds) for role, features in read.items()}, read["train"].image_shape


def check_features(config: ConfigDict, parameters: Any, roles: Iterable[str]) -> None:
    """Raises UserError where stored features are not those of these parameters' backbone."""
    digest = trainable.backbone_digest(parameters)
    for role in roles:
        features = feature_store.read(feature_store.find(Path(config.data.features).expanduser(), role))
        if features.backbone != digest:
            raise UserError(
                f"config.data.features: {features.path} was computed by another backbone\n"
                f"  than {config.checkpoint.init_from} has; make it again from that: python -m vit_jax.features --help"
            )
