"""Reads and writes Google's .npz files: published ones, those with current linen names, big_vision's, and hybrids.

The published files (arXiv 2010.11929, 2106.10270) number all modules of a block consecutively: LayerNorm_0,
MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3. Linen numbers each kind of module: LayerNorm_0,
MultiHeadDotProductAttention_0, LayerNorm_1, MlpBlock_0. So does big_vision, whose position embedding is outside the
encoder and has no row for the class token, which pools by attention (MAPHead_0), and which may store all blocks in one
(scanned) array.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.data import normalization
from vit_jax.errors import UserError, few
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import rules
from vit_jax.weights.describe import Choices, Description, Names, check_names, pixels_per_patch
from vit_jax.weights.files import Stored
from vit_jax.weights.rules import Parts, Rule, dense, norm

LABEL = "Google's naming"
FAMILY = "Google's files"
BIG_VISION = "big_vision's files"
QKV = ("query", "key", "value")

# How a model is recognized in a file, as in timm.py.
BLOCK, EMBEDDING, CLASSIFIER = (
    r"Transformer\.encoderblock(?:_\d+)?\.",
    r"embedding/(?:kernel|bias)$",
    r"head/|pre_logits/",
)
CLASSIFIER, SEPARATOR, INNER = r"head/|pre_logits/", "/", ()


@dataclasses.dataclass(frozen=True)
class Naming:
    """The names that differ between Google's files.

    Attributes:
        attention, norm_mlp, mlp: names of a block's modules.
        positions: name of the position embedding.
        class_row: whether the position embedding has a row for the class token.
        channels: whether the parameters of GroupNorms are [1, 1, 1, channels].
        scanned: whether all blocks are in one array.
    """

    attention: str = "MultiHeadDotProductAttention_1"
    norm_mlp: str = "LayerNorm_2"
    mlp: str = "MlpBlock_3"
    positions: str = "Transformer/posembed_input/pos_embedding"
    class_row: bool = True
    channels: bool = True
    scanned: bool = False


PUBLISHED = Naming()

# What a published file can express: all values of these options (None) or the values listed.
SUPPORTED = {
    **rules.SIZES,
    **dict.fromkeys(("pooling", "gelu", "layer_norm_epsilon", "stem", "stem_width")),
    "position": ("learned",),
}


def describe(stored: Stored, overrides: Mapping[str, Any]) -> Description:
    """The description of a file.

    Raises:
        UserError: it is not a complete model, or lacks a value of `overrides`.
    """
    names = Names(stored.shapes, "", LABEL)
    naming, parts = _naming(names), _parts(names)
    # Files of big_vision may have fixed positions, without an array; in other files the array must not be missing.
    fixed = "position" in overrides or parts.map or naming.scanned or stored.prefix.startswith("params")
    parts = dataclasses.replace(parts, positions=parts.positions or not fixed)
    table = _rules(parts, naming)
    ignored = {}
    headless = parts.pre_logits and not parts.head
    if headless:
        why = "there is no head after it; features are those before it"
        ignored = {f"pre_logits/{part}": why for part in ("kernel", "bias")}
    check_names(stored.shapes, table, ignored, ("cls", naming.positions), LABEL)
    choices = Choices(overrides)
    model, channels = _model(names, parts, naming, choices)
    grid = _grid(names, parts, naming, model, choices)
    return Description(
        LABEL,
        model,
        channels,
        grid,
        tuple(table),
        ignored,
        decisions=tuple(choices.made),
        statistics=normalization.constants("half", channels),
    )


def _naming(names: Names) -> Naming:
    block = r"Transformer/encoderblock(_\d+)?/"
    prelinen = names.any(f"{block}(MultiHeadDotProductAttention_1|MlpBlock_3|LayerNorm_2)/")
    outside = "pos_embedding" in names
    return Naming(
        attention=f"MultiHeadDotProductAttention_{1 if prelinen else 0}",
        norm_mlp=f"LayerNorm_{2 if prelinen else 1}",
        mlp=f"MlpBlock_{3 if prelinen else 0}",
        positions="pos_embedding" if outside else PUBLISHED.positions,
        class_row=not outside,
        channels="gn_root/scale" in names and names.axes("gn_root/scale") == 4,
        scanned=names.any("Transformer/encoderblock/"),
    )


def _parts(names: Names) -> Parts:
    stages = names.count(r"block(\d+)/") - 1  # numbered from 1
    units = tuple(names.count(rf"block{stage + 1}/unit(\d+)/") - 1 for stage in range(stages))
    scanned = names.any("Transformer/encoderblock/")
    norm_name = "Transformer/encoderblock/LayerNorm_0/scale"
    return Parts(
        depth=names.shape(norm_name, 2)[0] if scanned else names.count(r"Transformer/encoderblock_(\d+)/"),
        class_token="cls" in names,
        positions="pos_embedding" in names or PUBLISHED.positions in names,
        map=names.any("MAPHead_0/"),
        head=names.any("head/"),
        pre_logits=names.any("pre_logits/"),
        stem=units if names.any("conv_root/|gn_root/|block1/") else None,
    )


def _model(names: Names, parts: Parts, naming: Naming, choices: Choices) -> tuple[VisionTransformer, int]:
    patch, across, channels, width = names.shape("embedding/kernel", 4)
    if patch != across:
        raise UserError(f"embedding/kernel has patches of {patch}x{across}\n  allowed: square patches")
    first = "Transformer/encoderblock" + ("/" if naming.scanned else "_0/")
    axes = 1 if naming.scanned else 0
    heads = names.shape(f"{first}{naming.attention}/query/kernel", 3 + axes)[1 + axes]
    mlp_width = names.shape(f"{first}{naming.mlp}/Dense_0/kernel", 2 + axes)[1 + axes]
    head, usual = parts.head, "token" if parts.class_token else "mean"
    fields = {
        "classes": names.shape("head/kernel", 2)[1] if head else None,
        "patch_size": patch,
        "width": width,
        "depth": parts.depth,
        "heads": heads,
        "mlp_width": mlp_width,
        "class_token": parts.class_token,
        "pooling": "map" if parts.map else choices.decide("pooling", usual, family=FAMILY),
        "position": "learned" if parts.positions else choices.decide("position", "sincos_2d", family=BIG_VISION),
        "pre_logits": names.shape("pre_logits/kernel", 2)[1] if head and parts.pre_logits else None,
        "gelu": choices.decide("gelu", "tanh", family=FAMILY),
        "layer_norm_epsilon": choices.decide("layer_norm_epsilon", 1e-6, family=FAMILY),
    }
    if parts.stem is not None:
        *_, channels, root = names.shape("conv_root/kernel", 4)
        fields |= {"stem": parts.stem, "stem_width": root}
    return VisionTransformer(**fields), channels


def _grid(
    names: Names, parts: Parts, naming: Naming, model: VisionTransformer, choices: Choices
) -> tuple[int, int] | None:
    if not parts.positions:
        return None
    rows = names.shape(naming.positions, 3)[1] - int(parts.class_token and naming.class_row)
    return choices.grid(rows, pixels_per_patch(model))


def _rules(parts: Parts, naming: Naming) -> list[Rule]:
    table = dense("embedding/", "embedding/projection", rules.PATCH)
    if parts.stem is not None:
        table += _stem_rules(parts.stem, naming)
    if parts.class_token:
        table += [Rule(("cls",), ("class_token",), rules.SAME)]
    if parts.positions:
        form = rules.SAME if naming.class_row or not parts.class_token else rules.CLASS_ROW
        table += [Rule((naming.positions,), ("positions/table",), form)]
    if naming.scanned:
        block = _block_rules("Transformer/encoderblock/", "encoder/block_0", naming)
        table += [rules.scanned(rule, parts.depth) for rule in block]
    else:
        for index in range(parts.depth):
            table += _block_rules(f"Transformer/encoderblock_{index}/", f"encoder/block_{index}", naming)
    table += norm("Transformer/encoder_norm/", "encoder/norm")
    if parts.map:
        table += _map_rules("MAPHead_0/")
    if parts.head:
        table += dense("head/", "head/logits", rules.SAME)
        if parts.pre_logits:
            table += dense("pre_logits/", "head/pre_logits", rules.SAME)
    return table


def _block_rules(name: str, path: str, naming: Naming) -> list[Rule]:
    attention = f"{name}{naming.attention}/"
    return [
        *norm(f"{name}LayerNorm_0/", f"{path}/norm_attention"),
        *dense(f"{attention}{{}}/", f"{path}/attention/qkv", rules.fused_heads(3), rules.fused_heads_bias(3), QKV),
        *dense(f"{attention}out/", f"{path}/attention/out", rules.HEADS_OUT),
        *norm(f"{name}{naming.norm_mlp}/", f"{path}/norm_mlp"),
        *dense(f"{name}{naming.mlp}/Dense_0/", f"{path}/mlp/up", rules.SAME),
        *dense(f"{name}{naming.mlp}/Dense_1/", f"{path}/mlp/down", rules.SAME),
    ]


def _map_rules(name: str) -> list[Rule]:
    attention = f"{name}MultiHeadDotProductAttention_0/"
    fused, fused_bias = rules.fused_heads(2), rules.fused_heads_bias(2)
    return [
        Rule((f"{name}probe",), ("pooling/probe",), rules.SAME),
        *dense(f"{attention}query/", "pooling/query", rules.HEADS, rules.HEADS_BIAS),
        *dense(f"{attention}{{}}/", "pooling/key_value", fused, fused_bias, QKV[1:]),
        *dense(f"{attention}out/", "pooling/out", rules.HEADS_OUT),
        *norm(f"{name}LayerNorm_0/", "pooling/norm"),
        *dense(f"{name}MlpBlock_0/Dense_0/", "pooling/mlp/up", rules.SAME),
        *dense(f"{name}MlpBlock_0/Dense_1/", "pooling/mlp/down", rules.SAME),
    ]


def _stem_rules(stem: tuple[int, ...], naming: Naming) -> list[Rule]:
    form = rules.CHANNELS if naming.channels else rules.SAME
    table = [Rule(("conv_root/kernel",), ("stem/convolution_root/kernel",), rules.SAME)]
    table += norm("gn_root/", "stem/norm_root", form)
    for stage, count in enumerate(stem):
        for unit in range(count):
            name, path = f"block{stage + 1}/unit{unit + 1}/", f"stem/stage_{stage}_unit_{unit}"
            for theirs, ours in [("1", "1"), ("2", "2"), ("3", "3"), *([("_proj", "projection")] if unit == 0 else [])]:
                kernel = (f"{name}conv{theirs}/kernel",), (f"{path}/convolution_{ours}/kernel",)
                table += [Rule(*kernel, rules.SAME), *norm(f"{name}gn{theirs}/", f"{path}/norm_{ours}", form)]
    return table


def write(
    model: VisionTransformer, parameters: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the arrays by the published names, and notes on what such a file cannot express.

    Args:
        model: the model, not scanned.
        parameters: its parameters by path.

    Raises:
        UserError: the model has options that Google's files do not support; all of them are named.
    """
    if found := rules.unsupported(model, SUPPORTED):
        raise UserError(
            f"Google's .npz does not support {few(found, 6)}\n  write .safetensors, in timm's naming, instead"
        )
    arrays = rules.written(_rules(Parts.of(model), PUBLISHED), parameters, model)
    return arrays, tuple(_notes(model))


def _notes(model: VisionTransformer) -> list[str]:
    notes = []
    usual = {"gelu": "tanh", "layer_norm_epsilon": 1e-6, "pooling": "token" if model.class_token else "mean"}
    for field, convention in usual.items():
        value = getattr(model, field)
        if value != convention and not (field == "pooling" and value == "map"):
            notes.append(f"the file cannot express {field}={value!r}: it is read as {convention!r} by default")
    return notes
