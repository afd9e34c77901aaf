"""Features of a frozen backbone: loading the backbone, computing the features of every example, storing them once."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vit_jax import arguments, paths, sharding, terminal, weights
from vit_jax.data import feature_store, normalization, pipeline
from vit_jax.data.augment import Augment
from vit_jax.data.feature_store import StoredFeatures
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.evaluation import exact
from vit_jax.models import attention_backends
from vit_jax.models.vit import VisionTransformer, token_grid
from vit_jax.optim import trainable
from vit_jax.progress import Counter
from vit_jax.runtime import attention_choice, hardware

TIMED_BATCH = 64  # batch size at which attention backends are timed


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A model without a head.

    Attributes:
        model: its `classes` is None.
        parameters: of the model.
        pre_logits: kernel and bias of the Dense + tanh layer before the head's logits, if requested; else None.
        image_size: height and width of the images that the file records, or that the position embeddings are for; None
            if any size works.
        normalization: of the images in training, a value of `config.data.normalization`.
        description: one line about the origin of the parameters.
        statistics: mean and std of these images; None for those of the dataset that the features are of.
        assumed: `Report.assumed`: what mean and std were assumed, if the file does not record them.
        preparation: how images are resized and cropped.
    """

    model: VisionTransformer
    parameters: dict[str, Any]
    pre_logits: tuple[np.ndarray, np.ndarray] | None
    image_size: tuple[int, int] | None
    normalization: str
    description: str
    statistics: normalization.Statistics | None = None
    assumed: str = ""
    preparation: Preparation = COVER


def load(
    init: str | bytes | os.PathLike,
    *,
    step: int | np.integer | str | None = None,
    pooling: str | None = None,
    pre_logits: str | None = None,
    image_size: int | np.integer | None = None,
    channels: int | np.integer | None = None,
) -> Backbone:
    """Returns the backbone of one of our runs, or of any file that `weights.load` reads.

    Args:
        init: a run directory, file, directory, URL or name.
        step: for a run directory: a step, or 'best'; None for the newest.
        pooling: 'token' or 'mean' to replace the model's own pooling.
        pre_logits: also load the layer before the head's logits; with several heads, that of the head of this name.
        image_size: side in pixels; None for `Backbone.image_size`.
        channels: of the images; None for those of the file.

    Raises:
        UserError: as `weights.load`; or the model does not allow this pooling, or has no layer before the logits.
    """
    init = arguments.path("init", init)
    if pooling not in (None, "token", "mean"):
        raise UserError(f"pooling is {arguments.shown(pooling)}\n  allowed: 'token', 'mean' or None")
    overrides = {"step": step, "image_size": image_size, "channels": channels}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if pre_logits is None:
        overrides["classes"] = None
    model, parameters, report = load_sized(init, **overrides)
    model = prepare_for_device(model, "auto", report.image_size, report.channels)
    layer = None
    if pre_logits is not None:
        head = parameters.get("head", {})
        dense = head.get(pre_logits, head).get("pre_logits")
        if dense is None:
            raise UserError(f"--pre_logits: the head of {init} has no layer before its logits\n  omit --pre_logits")
        layer = dense["kernel"], dense["bias"]
    model = model.clone(classes=None)
    if pooling is not None and pooling != model.pooling:
        if model.pooling == "map" or model.norm_after_pooling or (pooling == "token" and not model.class_token):
            raise UserError(
                f"--pooling={pooling}: the model of {init} was trained with pooling {model.pooling!r}, which cannot be"
                " replaced\n  omit --pooling"
            )
        model = model.clone(pooling=pooling)
    if model.pooling == "none":
        raise UserError(f"the model of {init} does not pool its tokens\n  add --pooling=mean (or token)")
    parameters = {name: part for name, part in parameters.items() if name != "head"}
    notes = "; ".join(report.notes)
    description = f"{report.label} ({notes})" if notes else report.label
    # 'set' is the mean and std of the dataset that the features are of, also if those of the backbone's are recorded.
    statistics = None if report.normalization == "set" else report.statistics
    if statistics is not None and len(statistics[0]) != report.channels:  # only 'half' is known for any channels
        statistics = None
    known = report.image_size, report.normalization, description, statistics, report.assumed
    return Backbone(model, parameters, layer, *known, weights.preparation(report.evaluation, report.statistics))


def load_sized(source: str, **overrides: Any) -> tuple[VisionTransformer, dict, weights.Report]:
    """Returns what `weights.load` does, for images of the size that the file records, unless `image_size` is given.

    That may be smaller than what the positions are for.
    """
    loaded = weights.load(source, **overrides)
    recorded = tuple(loaded[2].evaluation.get("input_size", ()))
    if "image_size" not in overrides and recorded not in ((), loaded[2].image_size):
        loaded = weights.load(source, **overrides, image_size=recorded)
    return loaded


def prepare_for_device(
    model: VisionTransformer,
    dtype: str,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    attention: str = attention_choice.AUTO,
) -> VisionTransformer:
    """Returns the model with the compute dtype and the attention backend for inference on the default device.

    Args:
        model: with any compute dtype and backend.
        dtype: a value of `config.model.dtype`: 'auto', 'float32' or 'bfloat16'.
        image_size: height and width of the images; None if unknown: the backend is then the default of the platform.
        channels: of the images.
        attention: a value of `config.model.attention_kernel`.
    """
    dtype, matmul_dtype = hardware.compute_dtypes(dtype)
    kernel = attention_backends.default(jax.default_backend())
    model = model.clone(dtype=dtype, matmul_dtype=matmul_dtype, attention_kernel=kernel)
    if image_size is None:
        return model
    choice = attention_choice.resolve_for(model, (*image_size, channels), TIMED_BATCH, attention, training=False)
    return model.clone(attention_kernel=choice.backend)


def features_shape(model: VisionTransformer, parameters: Any, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Returns the shape of the features of one image.

    Raises:
        UserError: the patch size does not divide the image.
    """
    try:
        token_grid(model, image_shape[:2])
    except ValueError as error:
        raise UserError(f"--image_size: {error}\n  allowed: a size that the patch size divides") from None
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.apply, {"params": parameters}, images).shape[1:]


def extract(
    model: VisionTransformer, augment: Augment, parameters: Any, batches: pipeline.Pipeline, batch_size: int
) -> Iterator[Float[np.ndarray, "examples *features"]]:
    """Yields the model's outputs for every example, in order, some batches at a time.

    Images are normalized, not augmented, and dropout is off. With a model whose `classes` is None, these are features.
    """
    indices, is_real = exact.dispatch_tables(batches, batch_size)
    rows = indices.shape[1]

    def run(parameters: Any, feed: pipeline.Feed) -> jax.Array:
        def apply(position: jax.Array) -> jax.Array:
            inputs, _ = pipeline.get_batch(feed, position, sharding.data_sharding(batches.mesh))
            return model.apply({"params": parameters}, augment.normalize(inputs))

        return jax.lax.map(apply, jnp.arange(rows))

    options = hardware.compiler_options(batches.mesh.devices.flat[0].platform)
    compiled = jax.jit(run, out_shardings=sharding.replicated(batches.mesh), compiler_options=options)
    with Counter("computing the features of", len(batches.source), "images") as counter:
        for feed, real in zip(batches.feeds((table, rows) for table in indices), is_real, strict=True):
            features = np.asarray(compiled(parameters, feed))
            yield features.reshape(-1, *features.shape[2:])[real.ravel()]
            counter.add(real.size)


def load_or_compute(
    path: str | bytes | os.PathLike,
    backbone: Backbone,
    source: Source,
    mesh: Mesh,
    *,
    normalize: str | None = None,
    batch_size: int | np.integer = 256,
) -> StoredFeatures:
    """Returns the features of every example of a source: read from `path` if it holds them, else computed and written.

    Args:
        path: a file ending in .npz, or a directory.
        backbone: what computes the features.
        source: of the images; they are not augmented.
        mesh: the devices.
        normalize: one of `normalization.NAMES`, or numbers (`normalization.text`); None for the normalization of the
            backbone's training.
        batch_size: images per batch, rounded up to a multiple of the number of devices.

    Raises:
        UserError: the file cannot be written, or `path` is something other than features.
    """
    path, batch_size = paths.expand(path, "path"), arguments.integer("batch_size", batch_size)
    recorded = None if normalize else backbone.statistics
    mean, std = recorded or normalization.of_source(normalize or backbone.normalization, source, "--normalize")
    if mean == source.mean and (note := normalization.note(source.mean, source.std)):
        terminal.warn(note)
    image_shape = tuple(source.images.shape[1:])
    about = {
        "image_shape": list(image_shape),
        "backbone": trainable.backbone_digest(backbone.parameters),
        "model": repr(backbone.model),
        "normalized_by": [list(mean), list(std)],
        "fingerprint": _fingerprint(source),
    }
    known = _read_if_same(path, {**about, "name": source.name, "split": source.split})
    if known is not None:
        terminal.warn(f"features of {source.name} {source.split}: reading {path}")
        return known
    terminal.warn(f"features of {source.name} {source.split}: computing {len(source):,} ...")
    feature_store.check_path(path)
    shape = (len(source), *features_shape(backbone.model, backbone.parameters, image_shape))
    augment = Augment(mean, std, dtype=backbone.model.dtype)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    blocks = extract(backbone.model, augment, backbone.parameters, pipeline.make(source, mesh), batch_size)
    feature_store.write(path, shape, blocks, source, about)
    return feature_store.read(path)


def _fingerprint(source: Source) -> str:
    """Returns a digest of labels, statistics and split, which distinguishes datasets of one name; reads no image."""
    digest = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
    digest.update(repr((source.pieces, source.mean, source.std, source.class_names)).encode())
    return digest.hexdigest()


def _read_if_same(path: Path, about: dict[str, Any]) -> StoredFeatures | None:
    """Returns the features stored at `path` if their description has all of `about`; else None."""
    if not path.exists():
        return None
    try:
        stored = feature_store.read(path)
    except UserError:
        return None
    is_same = all(stored.about.get(name) == value for name, value in about.items())
    return stored if is_same and len(stored.labels) else None


def after_pre_logits(backbone: Backbone, features: np.ndarray) -> np.ndarray:
    """Returns tanh(features @ kernel + bias) of the layer before the logits if it was loaded, else the features."""
    if backbone.pre_logits is None:
        return features
    kernel, bias = backbone.pre_logits
    return np.tanh(np.asarray(features, np.float32) @ kernel + bias)
