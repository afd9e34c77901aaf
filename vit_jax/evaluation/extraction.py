"""A frozen backbone of any origin, and what it makes of every image of a split, computed once."""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax import weights
from vit_jax.data import feature_store, normalization, pipeline
from vit_jax.data.augment import Augment
from vit_jax.data.feature_store import Stored
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.evaluation import exact
from vit_jax.models import attention_backends
from vit_jax.models.vit import VisionTransformer, token_grid
from vit_jax.optim import trainable
from vit_jax.runtime import attention_choice, hardware

TIMED_BATCH = 64  # examples with which attention backends are timed


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A model without a head.

    Attributes:
        model: it; its `classes` is None.
        parameters: its own.
        pre_logits: kernel and bias of the Dense + tanh layer before its head's logits, where they are asked for.
        image_size: height and width that its positions are for; None where any will do.
        channels: of its images.
        normalization: of the images it was trained on, as `config.data.normalization` names it.
        about: where it comes from, in words.
    """

    model: VisionTransformer
    parameters: dict[str, Any]
    pre_logits: tuple[np.ndarray, np.ndarray] | None
    image_size: tuple[int, int] | None
    channels: int
    normalization: str
    about: str

    def shape_of(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """The shape of one image's features.

        Raises:
            UserError: the patch does not divide such images.
        """
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        try:
            token_grid(self.model, image_shape[:2])
        except ValueError as error:
            raise UserError(f"--image_size: {error}\n  give one that suits the patch") from None
        return jax.eval_shape(self.model.apply, {"params": self.parameters}, images).shape[1:]


def load(
    init: str,
    *,
    step: int | str | None = None,
    pooling: str | None = None,
    pre_logits: str | None = None,
    **fitted: Any,
) -> Backbone:
    """The backbone of a run of our own or of any file that `weights.load` reads.

    Args:
        init: a workdir, file, folder, URL or name.
        step: of a workdir: a step, or 'best'; None for the newest.
        pooling: 'token' or 'mean' in place of the model's own.
        pre_logits: also the layer before the logits of a head; of several heads, the one for this kind of label.
        **fitted: `image_size` and `channels` that it shall be made for, where they are other than its own.

    Raises:
        UserError: as `weights.load`; or it cannot be pooled so, or has no such layer.
    """
    overrides = {name: value for name, value in {"step": step, **fitted}.items() if value is not None}
    if pre_logits is None:
        overrides["classes"] = None
    model, parameters, report = weights.load(init, **overrides)
    model = computing(model, "auto", report.image_size, report.channels)
    layer = None
    if pre_logits is not None:
        head = parameters.get("head", {})
        found = head.get(pre_logits, head).get("pre_logits")
        if found is None:
            raise UserError(f"--pre_logits: the model of {init} has no such layer\n  leave it out")
        layer = found["kernel"], found["bias"]
    bare = model.clone(classes=None)
    if pooling is not None and pooling != model.pooling:
        if model.pooling == "map" or model.norm_after_pooling or (pooling == "token" and not model.class_token):
            raise UserError(
                f"--pooling={pooling}: the model of {init} has pooling {model.pooling!r}, and cannot have another\n"
                "  leave it out"
            )
        bare = bare.clone(pooling=pooling)
    if bare.pooling == "none":
        raise UserError(f"the model of {init} does not pool its tokens\n  give --pooling=mean (or token)")
    parameters = {name: part for name, part in parameters.items() if name != "head"}
    note = "; ".join(report.notes)
    about = f"{report.label}{f' ({note})' if note else ''}"
    return Backbone(bare, parameters, layer, report.image_size, report.channels, report.normalization, about)


def computing(
    model: VisionTransformer,
    dtype: str,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    attention: str = attention_choice.AUTO,
) -> VisionTransformer:
    """The model with the compute dtype and the attention backend for this device.

    Args:
        model: with any compute dtype and backend.
        dtype: `config.model.dtype`: 'auto', 'float32' or 'bfloat16'.
        image_size: height and width of the images; None where they are not known, and no backend can be timed.
        channels: of the images.
        attention: `config.model.attention_kernel`.
    """
    dtype, matmul_dtype = hardware.compute_dtypes(dtype)
    kernel = attention_backends.default(jax.default_backend())
    model = model.clone(dtype=dtype, matmul_dtype=matmul_dtype, attention_kernel=kernel)
    if image_size is None:
        return model
    choice = attention_choice.resolve_for(model, (*image_size, channels), TIMED_BATCH, attention, training=False)
    return model.clone(attention_kernel=choice.backend)


def store(
    path: Path,
    backbone: Backbone,
    source: Source,
    mesh: Mesh,
    *,
    normalize: str | None = None,
    batch_size: int = 256,
    reading: pipeline.Reading | None = None,
) -> Stored:
    """The features of every example of a source, from a file if it holds those very ones, else computed into it.

    Args:
        path: a file ending in .npz, or a folder.
        backbone: what computes them.
        source: whose they are; no augmentation is applied.
        mesh: the devices.
        normalize: one of `normalization.NAMES`; None for what the backbone was trained with.
        batch_size: images at a time, rounded up so that the devices divide it.
        reading: how images are read that are not resident.

    Raises:
        UserError: the file cannot be written, or something else lies there.
    """
    mean, std = normalization.of_source(normalize or backbone.normalization, source, "--normalize")
    image_shape = tuple(source.images.shape[1:])
    about = {
        "image_shape": list(image_shape),
        "backbone": trainable.backbone_digest(backbone.parameters),
        "model": repr(backbone.model),
        "normalized_by": [list(mean), list(std)],
        "fingerprint": _fingerprint(source),
    }
    known = _known(path, source, about)
    if known is not None:
        print(f"features of {source.name} {source.split}: those in {path}", file=sys.stderr, flush=True)
        return known
    print(f"features of {source.name} {source.split}: {len(source):,} images ...", file=sys.stderr, flush=True)
    feature_store.check_place(path)
    shape = (len(source), *backbone.shape_of(image_shape))
    augment = Augment(mean, std, dtype=backbone.model.dtype)
    size = -(-batch_size // mesh.size) * mesh.size
    feed = pipeline.make(source, mesh, reading=reading)
    blocks = exact.extract(backbone.model, augment, backbone.parameters, feed, size)
    feature_store.write(path, shape, blocks, source, about)
    return feature_store.read(path)


def _fingerprint(source: Source) -> str:
    """What tells two sets of one name apart without reading every image: labels, statistics, pieces."""
    digest = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
    digest.update(repr((source.pieces, source.mean, source.std, source.class_names)).encode())
    return digest.hexdigest()


def _known(path: Path, source: Source, about: dict[str, Any]) -> Stored | None:
    """What lies there, where it is what would be computed."""
    if not path.exists():
        return None
    try:
        found = feature_store.read(path)
    except UserError:
        return None
    wanted = {**about, "name": source.name, "split": source.split}
    same = all(found.about.get(name) == value for name, value in wanted.items())
    return found if same and len(found.labels) else None


def after_pre_logits(backbone: Backbone, features: np.ndarray) -> np.ndarray:
    """Features behind the Dense + tanh layer, where the backbone has been asked for it; else as they are."""
    if backbone.pre_logits is None:
        return features
    kernel, bias = backbone.pre_logits
    return np.tanh(np.asarray(features, np.float32) @ kernel + bias)
