"""Reads the text towers of files of CLIP and SigLIP, by tables of names as those of image towers."""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from vit_jax.errors import UserError, few
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.parameters import flatten, nested
from vit_jax.models.text import TextTransformer, unit_length
from vit_jax.weights import files, hub, namings
from vit_jax.weights.describe import Choices, Names, check_config, config_value
from vit_jax.weights.files import OPEN_CLIP, Stored
from vit_jax.weights.load import as_user_error, read_rule
from vit_jax.weights.naming import PLAIN, Naming, Recorded, depth_of
from vit_jax.weights.namings import HUGGING_FACE_BLOCK, OPENAI

_BATCH_SIZE = 64  # texts


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A text encoder, and how its features are compared with those of images.

    Attributes:
        model: the encoder.
        parameters: of the model, NumPy arrays in float32.
        scale: by which cosine similarities are multiplied.
        bias: what is then added; None for a model of softmax probabilities, instead of sigmoid ones.
    """

    model: TextTransformer
    parameters: dict[str, Any]
    scale: float
    bias: float | None

    def embed(self, ids: Int[np.ndarray, "texts tokens"]) -> Float32[np.ndarray, "texts features"]:
        """Returns the features of texts at length 1."""
        size = min(len(ids), _BATCH_SIZE)
        apply = jax.jit(lambda parameters, batch: unit_length(self.model.apply({"params": parameters}, batch)))
        parameters = jax.device_put(self.parameters)
        padded = np.concatenate([ids, np.repeat(ids[-1:], -len(ids) % size, axis=0)])
        batches = [np.asarray(apply(parameters, batch)) for batch in np.split(padded, len(padded) // size)]
        return np.concatenate(batches)[: len(ids)]


def load_text(path_or_name: str | os.PathLike) -> TextTower:
    """Returns the text tower of a file of CLIP or SigLIP.

    Args:
        path_or_name: as for `weights.load`.

    Raises:
        UserError: the file has none, cannot be read, or is not complete.
    """
    stored, source = files.open_file(hub.fetch(path_or_name)), os.fspath(path_or_name)
    with as_user_error(source):
        naming = _naming(stored)
        if naming is None:
            raise UserError(
                "the file has no text tower that can be read\n"
                "  use a model of CLIP or SigLIP as transformers, OpenAI or OpenCLIP write it (docs/weights.md)"
            )
        names = Names(stored.shapes, "", naming.LABEL)
        found = naming.found(names, "".join(f"{start}." for start in naming.INNER))
        depth = depth_of(names, found)
        table, zeros = naming.rules_of(names, found, depth)
        missing = [name for rule in table for name in rule.names if name not in stored.shapes]
        if missing or not depth:
            raise UserError(
                f"its text tower has no array {few(missing or ['of a block'])}\n  use a complete file of the model"
            )
        model = _model(naming, names, found, depth, naming.recorded(stored))
        flat = {}
        for rule in table:
            flat |= dict(zip(rule.paths, read_rule(source, rule, stored.arrays)[0], strict=True))
        wanted = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, model.length), jnp.int32))
        wanted = {path: leaf.shape for path, leaf in flatten(wanted["params"]).items()}
        flat |= {path: np.zeros(wanted[path], np.float32) for path in zeros}
        wrong = [path for path, shape in wanted.items() if path not in flat or flat[path].shape != shape]
        if wrong or len(flat) != len(wanted):
            raise UserError(
                f"its text tower has arrays of other sizes: {few(wrong)}\n  use a complete file of one model"
            )
        scale, bias = _number(stored, "logit_scale"), _number(stored, "logit_bias")
        if scale is None:
            raise UserError("logit_scale is missing\n  use a complete file of the model")
        return TextTower(model, nested(flat), math.exp(scale), bias)


def has_text(path_or_name: str | os.PathLike) -> bool:
    """Returns whether a file has a text tower that can be read.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    path = hub.fetch(path_or_name)
    return (not path.is_dir() or files.holds_weights(path)) and _naming(files.open_file(path)) is not None


def _naming(stored: Stored) -> Naming | None:
    names = Names(stored.shapes, "", "")
    return next((one for one in (CLIP_TEXT, SIGLIP_TEXT, OPENAI_TEXT) if names.any(one.embedding)), None)


def _number(stored: Stored, name: str) -> float | None:
    return float(np.asarray(stored.arrays[name], np.float64).reshape(())) if name in stored.shapes else None


def _model(
    naming: Naming, names: Names, found: dict[str, tuple[str, ...]], depth: int, recorded: Recorded
) -> TextTransformer:
    vocabulary, width = names.shape(found["token_embedding"][0], 2)
    length, _ = names.shape(found["token_positions"][0], 2)
    if "head/logits/kernel" in found:
        features = names.shape(found["head/logits/kernel"][0], 2)[1]
    else:
        features = names.shape(f"{found['head/logits'][0]}weight", 2)[0]
    has = {"width": width, "depth": depth}
    check_config({key: (value, has[one]) for one, (key, value) in recorded.sizes.items() if one in has})
    choices, end = Choices({}), recorded.values.get("end_token")
    config = BlockConfig(
        heads=naming.heads_of(width, recorded, choices),
        mlp_width=names.shape(f"{found[PLAIN][0].format(0)}weight", 2)[0],
        gelu=naming.decide("gelu", naming.gelu, recorded, choices),
        layer_norm_epsilon=naming.decide("layer_norm_epsilon", naming.epsilon, recorded, choices),
    )
    # Configs of OpenAI's models have the id 2, which is wrong: it is the largest id.
    end = None if end == 2 else end
    return TextTransformer(config, vocabulary, length, width, depth, features, naming is not SIGLIP_TEXT, end)


def _open_clip(stored: Stored) -> Recorded:
    """What OPEN_CLIP says of the text tower; without it, the activation is that of the image tower.

    Raises:
        UserError: it has options that are not supported.
    """
    path, images = stored.path.parent / OPEN_CLIP, OPENAI.recorded(stored)
    if not path.is_file():
        return images
    text = config_value(config_value(files.read_json(path), "model_cfg", dict) or {}, "text_cfg", dict) or {}
    fixed = {"pool_type": "argmax", "no_causal_mask": False, "embed_cls": False, "hf_model_name": None}
    for key, value in fixed.items():
        if text.get(key, value) != value:
            raise UserError(
                f"{OPEN_CLIP} has {key} {text[key]!r}\n  allowed: {value!r}; use a model of docs/weights.md"
            )
    values = {"heads": config_value(text, "heads", int), "gelu": images.values["gelu"]}
    return Recorded(values, by=dict.fromkeys(values, OPEN_CLIP))


def _recorded(kind: str, epsilon: float, **defaults: Any) -> functools.partial:
    later = ("siglip2", "siglip2_text_model") if kind == "siglip" else ()
    kinds, defaults = (kind, f"{kind}_text_model", *later), {**defaults, "layer_norm_eps": epsilon}
    return functools.partial(namings.hugging_face, kinds=kinds, defaults=defaults, fixed={}, tower="text")


CLIP_TEXT = Naming(
    LABEL="Hugging Face's naming of CLIP's texts",
    BLOCK="",
    INNER=("text_model",),
    embedding=r"text_projection\.weight$",
    family="Hugging Face's CLIP",
    block="encoder.layers.{}.",
    names={
        "token_embedding": "embeddings.token_embedding.weight",
        "token_positions": "embeddings.position_embedding.weight",
        **HUGGING_FACE_BLOCK,
        "encoder/norm": "final_layer_norm.",
        "head/logits": "text_projection.",
    },
    optional="(?!)",
    biasless="head/logits",
    gelu="quick",
    epsilon=1e-5,
    recorded=_recorded("clip", 1e-5, num_attention_heads=8, hidden_act="quick_gelu"),
)
SIGLIP_TEXT = dataclasses.replace(
    CLIP_TEXT,
    LABEL="Hugging Face's naming of SigLIP's texts",
    embedding=r"text_model\.head\.weight$",
    family="Hugging Face's SigLIP",
    names={**CLIP_TEXT.names, "head/logits": "text_model.head."},
    biasless="(?!)",
    gelu="tanh",
    epsilon=1e-6,
    recorded=_recorded("siglip", 1e-6, num_attention_heads=12, hidden_act="gelu_pytorch_tanh"),
)
OPENAI_TEXT = Naming(
    LABEL=OPENAI.LABEL,
    BLOCK="",
    embedding=r"text_projection$",
    family=OPENAI.family,
    block=OPENAI.block,
    names={
        "token_embedding": "token_embedding.weight",
        "token_positions": "positional_embedding",
        **{key: name for key, name in OPENAI.names.items() if key.startswith("block/") and "scale" not in key},
        "encoder/norm": "ln_final.",
        "head/logits/kernel": "text_projection",
    },
    optional="(?!)",
    epsilon=OPENAI.epsilon,
    recorded=_open_clip,
)
