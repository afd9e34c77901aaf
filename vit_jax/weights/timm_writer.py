"""Writes our parameters as a checkpoint that timm reads."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.errors import UserError, few
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import rules
from vit_jax.weights.timm import EPSILON, POOLINGS
from vit_jax.weights.timm_rules import Spelling, make_rules

# What a file and its config can express: all values of these options (None) or the values listed.
SUPPORTED = {
    **rules.SIZES,
    **dict.fromkeys(("registers", "pooling", "mlp", "gelu", "qkv_bias", "qk_norm", "layer_scale")),
    **dict.fromkeys(("norm_after_pooling", "layer_norm_epsilon")),
    "position": ("learned", "none"),
}


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
    found = rules.unsupported(model, SUPPORTED)
    if model.classes is not None and model.pre_logits is not None:
        found.append(f"pre_logits={model.pre_logits}")
    if model.pooling == "map" and model.mlp != "gelu":
        found.append(f"pooling='map' with mlp={model.mlp!r}")
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
    spelling = Spelling(
        rows=rows,
        mlp="packed" if model.mlp == "swiglu" else "fc1",
        norm="fc_norm." if model.norm_after_pooling else "norm.",
    )
    arrays = rules.written(make_rules(rules.Parts.of(model), spelling, model.width // model.heads), parameters, model)
    notes = []
    if model.layer_norm_epsilon != EPSILON:
        notes.append(
            f"timm always uses layer_norm_epsilon {EPSILON:g}; this model has {model.layer_norm_epsilon:g}, which only "
            "vit_jax reads from the config"
        )
    return arrays, _config(model, image_size, channels, rows), tuple(notes)


def _config(model: VisionTransformer, image_size: tuple[int, int], channels: int, rows: str) -> dict[str, Any]:
    """The config from which timm.create_model('local-dir:DIRECTORY') makes the same model."""
    gated = model.mlp == "swiglu"
    hidden = model.mlp_width * (2 if gated else 1)
    ratio = hidden / model.width
    if int(model.width * ratio) != hidden:  # timm rounds width * ratio down
        ratio = (hidden + 0.5) / model.width
    pooling = next(word for word, ours in POOLINGS.items() if ours == model.pooling)
    arguments = {
        "img_size": list(image_size),
        "patch_size": model.patch_size,
        "in_chans": channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": ratio,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "init_values": model.layer_scale,
        "class_token": model.class_token,
        "reg_tokens": model.registers,
        "no_embed_class": rows == "none",
        "pos_embed": "learn" if model.position == "learned" else "none",
        "fc_norm": model.norm_after_pooling,
        "global_pool": pooling,
    }
    if not gated:
        arguments["act_layer"] = "gelu_tanh" if model.gelu == "tanh" else "gelu"
    classes = model.classes or 0
    return {
        # The arguments determine everything but the gated MLP, which only this architecture has.
        "architecture": "vit_giant_patch14_dinov2" if gated else "vit_base_patch16_224",
        "num_classes": classes,
        "num_features": model.width,
        "global_pool": pooling,
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [channels, *image_size], "num_classes": classes, "fixed_input_size": True},
        "layer_norm_epsilon": model.layer_norm_epsilon,
    }
