"""Writes our parameters as a checkpoint that timm reads."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.errors import UserError, few
from vit_jax.models.vit import VisionTransformer, position_at
from vit_jax.weights import rules
from vit_jax.weights.timm import EPSILON, GELUS, POOLINGS
from vit_jax.weights.timm_rules import Spelling, make_rules

# What a file and its config can express: all values of these options (None) or the values listed.
SUPPORTED = {
    **rules.SIZES,
    **dict.fromkeys(("registers", "pooling", "mlp", "gelu", "qkv_bias", "qk_norm", "layer_scale")),
    **dict.fromkeys(("norm_after_pooling", "layer_norm_epsilon", "final_norm", "attention_norm", "mlp_norm")),
    "input_norm": (None, "tokens"),
    "position": ("learned", "none", "dinov3"),
    "position_at": ("input", "layers"),
}
# Architectures of timm that have what no argument can express: LayerNorms with another epsilon, a gated MLP.
PLAIN, GATED = "vit_base_patch16_224", "vit_giant_patch14_dinov2"
CLIP, DINOV3 = "vit_base_patch16_clip_224", "vit_base_patch16_dinov3_qkvb"
EPSILONS = {CLIP: 1e-5, DINOV3: 1e-5}


def write(
    model: VisionTransformer, parameters: Mapping[str, np.ndarray], image_size: tuple[int, int] | None, channels: int
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
    """Returns the arrays by timm's names, the config.json to go with them, and notes on what timm reads differently.

    Args:
        model: the model, not scanned.
        parameters: its parameters by path.
        image_size: height and width in pixels.
        channels: number of channels of the images.

    Raises:
        UserError: the model has options that timm does not support; all of them are named.
    """
    found = _unsupported(model)
    if found:
        raise UserError(
            f"timm's models do not support {few(found, 6)}\n"
            "  write Google's names (a .npz file) if those support them, or train the model without them"
        )
    if image_size is None:
        raise UserError("timm's models are for one image size\n  pass image_size=(height, width)")
    rows = "class"
    if model.position == "learned":
        without = not model.class_token or not parameters["positions/table"][:, :1].any()
        rows = "none" if without else "all" if model.registers else "class"
    rotary = model.position == "dinov3"
    key_bias = rotary and model.qkv_bias and any(map(_has_key_bias, parameters.items()))
    spelling = Spelling(
        rows=rows,
        scale="gamma_{}" if rotary else "ls{}.gamma",
        bias="query_value" if rotary and not key_bias else "fused",
        mlp="fc1" if model.mlp == "gelu" else "apart" if rotary and model.mlp_norm else "packed",
        norm="fc_norm." if model.norm_after_pooling else "norm.",
    )
    table = make_rules(rules.Parts.of(model), spelling, model.width // model.heads)
    arrays, notes = rules.written(table, parameters, model), []
    if model.input_norm is not None:
        before = {"none": 0, "class": 1, "all": 1 + model.registers}[rows]
        notes += _without_patch_bias(arrays, before)
    architecture = DINOV3 if rotary else CLIP if model.input_norm else GATED if model.mlp == "swiglu" else PLAIN
    epsilon = EPSILONS.get(architecture, EPSILON)
    if model.layer_norm_epsilon != epsilon:
        notes.append(
            f"timm always uses layer_norm_epsilon {epsilon:g}; this model has {model.layer_norm_epsilon:g}, which only "
            "vit_jax reads from the config"
        )
    arguments = _shared_arguments(model, image_size, channels)
    arguments |= _eva_arguments(model, key_bias) if rotary else _plain_arguments(model, rows)
    return arrays, _config(model, architecture, arguments, image_size, channels), tuple(notes)


def _unsupported(model: VisionTransformer) -> list[str]:
    """What timm has no model for, as 'option=value'."""
    found = rules.unsupported(model, SUPPORTED)
    if model.classes is not None and model.pre_logits is not None:
        found.append(f"pre_logits={model.pre_logits}")
    if model.pooling not in POOLINGS.values():
        found.append(f"pooling={model.pooling!r}")
    if model.pooling == "map" and model.position != "dinov3" and (model.class_token or model.registers):
        found.append("pooling='map' over class token or registers")
    if model.pooling == "map" and model.mlp != "gelu":
        found.append(f"pooling='map' with mlp={model.mlp!r}")
    if (model.position == "dinov3") != (position_at(model) == "layers") and "position" not in str(found):
        found.append(f"position={model.position!r} at {position_at(model)!r}")
    if model.position == "dinov3" and (model.input_norm or (model.mlp == "gelu" and model.gelu != "exact")):
        found.append(f"position='dinov3' with input_norm={model.input_norm!r} and gelu={model.gelu!r}")
    if model.input_norm == "tokens" and (model.mlp != "gelu" or model.position != "learned"):
        found.append(f"input_norm={model.input_norm!r} with mlp={model.mlp!r} and position={model.position!r}")
    return found


def _has_key_bias(parameter: tuple[str, np.ndarray]) -> bool:
    """Whether a parameter (path, array) has a bias of keys, which published models with rotary positions do not."""
    path, array = parameter
    return path.endswith("attention/qkv/bias") and bool(np.split(array, 3)[1].any())


def _without_patch_bias(arrays: dict[str, np.ndarray], before: int) -> list[str]:
    """Adds the bias of the patch embedding, which timm's CLIP does not have, to the positions; returns notes.

    Args:
        arrays: of the file; changed.
        before: number of rows of positions before those of patches.
    """
    bias, table = arrays.pop("patch_embed.proj.bias"), arrays["pos_embed"]
    if not bias.any():
        return []
    arrays["pos_embed"] = np.concatenate([table[:, :before], table[:, before:] + bias], axis=1)
    return ["timm's CLIP has no bias in its patch embedding: it was added to the positions"]


def _shared_arguments(model: VisionTransformer, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """The arguments that both of timm's classes have."""
    return {
        "img_size": list(image_size),
        "patch_size": model.patch_size,
        "in_chans": channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "init_values": model.layer_scale,
        "class_token": model.class_token,
        "global_pool": _pooling(model),
    }


def _pooling(model: VisionTransformer) -> str:
    return next(word for word, ours in POOLINGS.items() if ours == model.pooling)


def _ratio(model: VisionTransformer, hidden: int) -> float:
    """A ratio for which timm, which rounds width * ratio down, makes `hidden` units."""
    ratio = hidden / model.width
    return ratio if int(model.width * ratio) == hidden else (hidden + 0.5) / model.width


def _plain_arguments(model: VisionTransformer, rows: str) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer; `rows` as in `Spelling`."""
    gated = model.mlp == "swiglu"
    arguments = {
        "mlp_ratio": _ratio(model, model.mlp_width * (2 if gated else 1)),
        "reg_tokens": model.registers,
        "no_embed_class": rows == "none",
        "pos_embed": "learn" if model.position == "learned" else "none",
        "fc_norm": model.norm_after_pooling,
        "final_norm": model.final_norm,
        "scale_attn_norm": model.attention_norm,
        "scale_mlp_norm": model.mlp_norm,
    }
    if not gated:
        arguments["act_layer"] = next(word for word, form in GELUS.items() if form == model.gelu)
    return arguments


def _eva_arguments(model: VisionTransformer, key_bias: bool) -> dict[str, Any]:
    """Arguments of timm's Eva, in which the architecture has the rotation."""
    return {
        "attn_type": "rope" if key_bias else "eva",  # Eva's own attention has no bias of keys
        "mlp_ratio": _ratio(model, model.mlp_width),
        "swiglu_mlp": model.mlp == "swiglu",
        "num_reg_tokens": model.registers,
        "use_fc_norm": model.norm_after_pooling,
        "use_post_transformer_norm": model.final_norm and not model.norm_after_pooling,
        "scale_attn_inner": model.attention_norm,
        "scale_mlp": model.mlp_norm,
    }


def _config(
    model: VisionTransformer, architecture: str, arguments: dict[str, Any], image_size: tuple[int, int], channels: int
) -> dict[str, Any]:
    """The config from which timm.create_model('local-dir:DIRECTORY') makes the same model."""
    classes = model.classes or 0
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": model.width,
        "global_pool": _pooling(model),
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [channels, *image_size], "num_classes": classes, "fixed_input_size": True},
        "layer_norm_epsilon": model.layer_norm_epsilon,
    }
