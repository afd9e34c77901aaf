"""timm's state dictionaries of Vision Transformers (also DeiT's, DINO's, DINOv2's and MAE's own, named nearly alike).

timm is exact about where the last norm stands (`norm` before pooling, `fc_norm` after it), whether the table of
positions has rows for class token and registers (`no_embed_class`), and uses the exact GELU unless told.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import rules as forms
from vit_jax.weights.describe import (
    Choices,
    Description,
    Names,
    check_config,
    check_names,
    few,
    hint,
    pixels_per_patch,
    said,
)
from vit_jax.weights.files import Stored
from vit_jax.weights.rules import Parts, Rule, dense, norm

LABEL = "timm's naming"
FAMILY = "timm's models"
OWN = "vit_jax"  # key of the config that a file of ours carries in its header
POOLINGS = {"token": "token", "avg": "mean", "map": "map", "": "none"}
GELUS = {"gelu": "exact", "gelu_erf": "exact", "gelu_tanh": "tanh"}
EPSILON = 1e-6

# Architectures that deviate from what their width suggests, as timm 1.0.31 has them: heads, and the tanh GELU.
HEADS = {r"test_vit2?$": 2, r"test_vit[34]$": 3, "vit_giantopt_": 16, "vit_base_patch16_gap_": 16}
TANH = r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip|vit_large_patch16_siglip_(gap_)?512"
REFUSED = {
    r".*_rpn_": "its blocks normalise behind attention and MLP",
    r".*quickgelu": "its activation is the quick GELU",
    r"test_vit3$": "its mean is over class token and registers too",
}

# Arrays that ours has no place for, and what they are.
FOREIGN = {
    "norm_pre.": "a LayerNorm before the blocks, as CLIP's",
    "attn_pool.q_norm.": "normalised queries in its pooling",
}
IGNORED = {
    r"mask_token$": "only masked pre-training reads it",
    r"decoder[_.]": "the decoder of masked pre-training",
}
STEM = r"patch_embed\.backbone\."
STEMS = ("patch_embed.backbone.stem.", "patch_embed.backbone.")  # with stages behind it, and alone
TWO_HEADS = "its logits are the mean of two heads, of class token and distillation token, which one head cannot be"
KNOWN = ("cls_token", "pos_embed", "reg_token", "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")


@dataclasses.dataclass(frozen=True)
class Spelling:
    """What differs between the files named so.

    Attributes:
        prefix: of all names.
        stem: of its first convolution and norm, where there is one.
        registers: the tokens that stand between class token and patches.
        scale: a block's layer scale, '{}' for 1 or 2.
        mlp: 'fc1' (plain), or of SwiGLU: 'packed' (fc1 holds gate and MLP), 'apart' (fc1_g, fc1_x) or 'w12'.
        norm: the last one.
        rows: of the table besides the patches': 'none', 'class' or 'all'.
    """

    prefix: str = ""
    stem: str = "patch_embed.backbone.stem."
    registers: str = "reg_token"
    scale: str = "ls{}.gamma"
    mlp: str = "fc1"
    norm: str = "norm."
    rows: str = "class"


def recognise(shapes: Mapping[str, Any]) -> bool:
    """Whether the names are of this family."""
    return any(re.search(r"(^|\.)blocks\.\d+\.", name) for name in shapes)


def describe(stored: Stored, given: Mapping[str, Any]) -> Description:
    """The model and the rules of a file.

    Raises:
        UserError: it is no whole model, has parts that ours cannot have, or does not tell what `given` has to.
    """
    names = Names(stored.shapes, _prefix(stored.shapes), LABEL)
    for start, what in FOREIGN.items():
        if names.any(re.escape(start)):
            raise UserError(f"{names.prefix}{start}...: the model has {what}; ours cannot have that")
    told, choices = _said(stored), Choices(given)
    pooling = _pooling(names, told, choices)
    # No table at all is a rare thing, which somebody has to say: it may as well have been lost.
    none = told.get("positions") is False or "position" in given
    parts, two_heads = _parts(names, pooling), names.any(r"head_dist\.")
    ignored = {
        f"{names.prefix}{name}": why for name in names for pattern, why in IGNORED.items() if re.match(pattern, name)
    }
    parts = dataclasses.replace(parts, positions=parts.positions or not none)
    if two_heads:
        parts = dataclasses.replace(parts, head=False)
        heads = [name for name in names if re.match(r"head(_dist)?\.", name)]
        ignored |= {f"{names.prefix}{name}": "one of two heads, whose mean ours cannot be" for name in heads}
    spelling = _spelling(names, parts, told)
    table = _rules(parts, spelling)
    check_names(stored.shapes, table, ignored, [names.prefix + name for name in KNOWN], LABEL)
    model, channels = _model(names, parts, spelling, pooling, told, choices)
    grid = None
    if parts.positions:
        rows = names.shape("pos_embed", 3)[1] - _rows_before(names, parts, spelling)[spelling.rows]
        grid = choices.grid(rows, pixels_per_patch(model), told.get("image_size"))
    return Description(
        LABEL,
        model,
        channels,
        grid,
        tuple(table),
        ignored,
        decisions=tuple(choices.made),
        notes=_notes(parts, spelling),
        head_refusal=TWO_HEADS if two_heads else None,
    )


def _prefix(shapes: Mapping[str, Any]) -> str:
    found = [match[1] for name in shapes if (match := re.match(r"(.*?)blocks\.\d+\.", name))]
    return max(set(found), key=found.count, default="")


def _said(stored: Stored) -> dict[str, Any]:
    """What the config in the file's header or beside it says: heads, gelu, pooling and the like; {} where none does.

    Raises:
        UserError: it says something that ours cannot do.
    """
    config = stored.config or {}
    if OWN in stored.metadata:
        try:
            config = json.loads(stored.metadata[OWN])
        except ValueError:
            raise UserError(f"the text {OWN!r} in its header is no JSON: the file is damaged") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return {}
    name, arguments = config["architecture"], said(config, "model_args", dict) or {}
    refusal = next((why for pattern, why in REFUSED.items() if re.match(pattern, name)), None)
    if refusal or arguments.get("pool_include_prefix"):
        raise UserError(f"config.json says {name}: {refusal or REFUSED['test_vit3$']}; ours cannot, nothing was loaded")
    heads = next((heads for pattern, heads in HEADS.items() if re.match(pattern, name)), None)
    size = said(said(config, "pretrained_cfg", dict) or {}, "input_size", list) or []
    return {
        "num_features": said(config, "num_features", int),
        "depth": said(arguments, "depth", int),
        "class_token": said(arguments, "class_token", bool),
        # DeiT's distillation token counts as none of timm's.
        "reg_tokens": None if "dist_token" in stored.shapes else said(arguments, "reg_tokens", int),
        "positions": False if arguments.get("pos_embed") in ("", "none") else None,
        "heads": said(arguments, "num_heads", int) or heads,
        "activation": said(arguments, "act_layer", str) or ("gelu_tanh" if re.match(TANH, name) else "gelu"),
        "pooling": said(config if "global_pool" in config else arguments, "global_pool", str),
        "no_embed_class": said(arguments, "no_embed_class", bool),
        "image_size": arguments.get("img_size") or size[1:],
        "layer_norm_epsilon": said(config, "layer_norm_epsilon", float),
    }


def _pooling(names: Names, told: Mapping[str, Any], choices: Choices) -> str:
    if names.any(r"attn_pool\."):
        if names.any(r"fc_norm\."):
            raise UserError(f"{names.prefix}fc_norm.: a norm behind attention pooling; ours cannot have that")
        return "map"
    word = told.get("pooling")
    if word is not None and POOLINGS.get(word, "map") == "map":
        raise UserError(f"config.json says global_pool {word!r}, which the file's arrays or our model do not have")
    convention = "mean" if names.any(r"fc_norm\.") or "cls_token" not in names else "token"
    return choices.decide("pooling", convention, None if word is None else POOLINGS[word], family=FAMILY)


def _parts(names: Names, pooling: str) -> Parts:
    block = r"blocks\.\d+\."
    gated = names.any(rf"{block}mlp\.(fc1_g|w12)\.") or _packed(names)
    return Parts(
        depth=names.count(r"blocks\.(\d+)\."),
        class_token="cls_token" in names,
        registers=names.any("(reg_token|register_tokens|dist_token)$"),
        positions="pos_embed" in names,
        mlp="swiglu" if gated else "gelu",
        qkv_bias=names.any(rf"{block}attn\.qkv\.bias"),
        qk_norm=names.any(rf"{block}attn\.[qk]_norm\."),
        layer_scale=names.any(rf"{block}(ls\d\.|gamma_\d)"),
        stem=_stem(names),
        map=pooling == "map",
        norm_after_pooling=pooling == "mean" and names.any(r"fc_norm\."),
        head=names.any(r"head\."),
    )


def _stem(names: Names) -> tuple[int, ...] | None:
    """The units of a ResNet v2 before the patches, as in Google's hybrids.

    Raises:
        UserError: there is another network before them.
    """
    if not names.any(STEM):
        return None
    stages = names.count(rf"{STEM}stages\.(\d+)\.")
    if not any(f"{start}conv.weight" in names for start in STEMS):
        raise UserError(f"{names.prefix}{STEMS[1]}...: the model has another network than ResNet v2 before its patches")
    return tuple(names.count(rf"{STEM}stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))


def _packed(names: Names) -> bool:
    """Whether the first product of an MLP makes twice what the second takes."""
    first, second = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
    return first in names and second in names and names.shape(first, 2)[0] == 2 * names.shape(second, 2)[1]


def _spelling(names: Names, parts: Parts, told: Mapping[str, Any]) -> Spelling:
    registers = next((name for name in ("register_tokens", "dist_token") if name in names), "reg_token")
    mlp = "fc1"
    if parts.mlp == "swiglu":
        mlp = "packed" if _packed(names) else "w12" if names.any(r"blocks\.\d+\.mlp\.w12\.") else "apart"
    spelling = Spelling(
        names.prefix,
        STEMS[0] if f"{STEMS[0]}conv.weight" in names else STEMS[1],
        registers,
        "gamma_{}" if names.any(r"blocks\.\d+\.gamma_") else "ls{}.gamma",
        mlp,
        "fc_norm." if names.any(r"fc_norm\.") else "norm.",
    )
    return dataclasses.replace(spelling, rows=_rows(names, parts, spelling, told))


def _rows_before(names: Names, parts: Parts, spelling: Spelling) -> dict[str, int]:
    first = int(parts.class_token)
    tokens = names.shape(spelling.registers, 3)[1] if parts.registers else 0
    return {"none": 0, "class": first, "all": first + tokens}


def _rows(names: Names, parts: Parts, spelling: Spelling, told: Mapping[str, Any]) -> str:
    """Which rows the table of positions has before the patches': as the config says, as a grid is left, as is usual."""
    if not parts.positions or "pos_embed" not in names:
        return "none"
    before = _rows_before(names, parts, spelling)
    rows, patch = names.shape("pos_embed", 3)[1], names.shape("patch_embed.proj.weight", 4)[-1]
    # timm has no rows for registers of its own kind, DINOv2's own files one for the class token, DeiT's all.
    usual = ("all", "none") if spelling.registers == "dist_token" else ("none", "class", "all")
    if spelling.registers == "register_tokens" or not parts.registers:
        usual = ("class", "none")
    if told.get("no_embed_class") is not None:
        usual = ("none",) if told["no_embed_class"] else ("all",)
    grid = hint(told.get("image_size"), patch)
    for kind in usual if grid is not None else ():
        if rows - before[kind] == grid[0] * grid[1]:
            return kind
    for kind in usual:
        if rows > before[kind] and math.isqrt(rows - before[kind]) ** 2 == rows - before[kind]:
            return kind
    return usual[0]


def _model(
    names: Names, parts: Parts, spelling: Spelling, pooling: str, told: Mapping[str, Any], choices: Choices
) -> tuple[VisionTransformer, int]:
    width, channels, patch, across = names.shape("patch_embed.proj.weight", 4)
    if patch != across:
        raise UserError(f"patch_embed.proj.weight has patches of {patch}x{across}: only square ones can be had")
    first = {"fc1": "fc1", "packed": "fc1", "apart": "fc1_g", "w12": "w12"}[spelling.mlp]
    hidden = names.shape(f"blocks.0.mlp.{first}.weight", 2)[0]
    fields = {
        "classes": names.shape("head.weight", 2)[0] if parts.head else None,
        "patch_size": patch,
        "width": width,
        "depth": parts.depth,
        "heads": choices.heads(width, told.get("heads"), FAMILY),
        "mlp_width": hidden // 2 if spelling.mlp in ("packed", "w12") else hidden,
        "class_token": parts.class_token,
        "registers": names.shape(spelling.registers, 3)[1] if parts.registers else 0,
        "pooling": pooling,
        "position": "learned" if parts.positions else choices.decide("position", "none", "none", family=FAMILY),
        "mlp": parts.mlp,
        "qkv_bias": parts.qkv_bias,
        "qk_norm": parts.qk_norm,
        "layer_scale": 1e-5 if parts.layer_scale else None,
        "norm_after_pooling": parts.norm_after_pooling,
        "layer_norm_epsilon": choices.decide(
            "layer_norm_epsilon", EPSILON, told.get("layer_norm_epsilon"), family=FAMILY
        ),
    }
    own = {"num_features": width, "depth": parts.depth, "reg_tokens": fields["registers"]}
    own |= {"class_token": parts.class_token}
    check_config({key: (told.get(key), has) for key, has in own.items()})
    if parts.stem is not None:
        root, channels, _, _ = names.shape(f"{spelling.stem}conv.weight", 4)
        fields |= {"stem": parts.stem, "stem_width": root}
    if parts.mlp == "gelu":
        activation = told.get("activation")
        if activation is not None and activation not in GELUS:
            raise UserError(f"config.json says act_layer {activation!r}\n  ours has: {', '.join(GELUS)}")
        fields["gelu"] = choices.decide("gelu", "exact", GELUS.get(activation), family=FAMILY)
    return VisionTransformer(**fields), channels


def _notes(parts: Parts, spelling: Spelling) -> tuple[str, ...]:
    notes = []
    if parts.stem is not None:
        notes.append("the stem's norms add the 1e-6 of Google's code, for which it was trained, where timm adds 1e-5")
    if parts.class_token and parts.positions and spelling.rows == "none":
        notes.append("the table of positions has no row for the class token: it got one of zeros")
    if spelling.rows == "all" and spelling.registers == "dist_token":
        notes.append("the distillation token became a register, with its row of positions added to it")
    return tuple(notes)


def _rules(parts: Parts, spelling: Spelling) -> list[Rule]:
    p = spelling.prefix
    table = dense(f"{p}patch_embed.proj.", "embedding/projection", forms.PATCH_CONVOLUTION)
    if parts.stem is not None:
        table += _stem_rules(parts.stem, spelling)
    if parts.class_token:
        table += [Rule((f"{p}cls_token",), ("class_token",), forms.SAME)]
    tokens, rows = (f"{p}{spelling.registers}",), (f"{p}pos_embed",)
    if parts.registers and parts.positions and spelling.rows == "all":
        form = forms.with_register_rows(parts.class_token)
        table += [Rule(tokens + rows, ("registers", "positions/table"), form)]
    else:
        table += [Rule(tokens, ("registers",), forms.SAME)] if parts.registers else []
        form = forms.CLASS_ROW if parts.class_token and spelling.rows == "none" else forms.SAME
        table += [Rule(rows, ("positions/table",), form)] if parts.positions else []
    for index in range(parts.depth):
        table += _block_rules(f"{p}blocks.{index}.", f"encoder/block_{index}", parts, spelling)
    table += norm(f"{p}{spelling.norm}", "norm" if parts.norm_after_pooling else "encoder/norm")
    if parts.map:
        table += _map_rules(f"{p}attn_pool.")
    if parts.head:
        table += dense(f"{p}head.", "head/logits", forms.LINEAR)
    return table


def _stem_rules(stem: tuple[int, ...], spelling: Spelling) -> list[Rule]:
    p = spelling.prefix
    table = [Rule((f"{p}{spelling.stem}conv.weight",), ("stem/convolution_root/kernel",), forms.CONVOLUTION)]
    table += norm(f"{p}{spelling.stem}norm.", "stem/norm_root")
    for stage, count in enumerate(stem):
        for unit in range(count):
            name, path = f"{p}{STEMS[1]}stages.{stage}.blocks.{unit}.", f"stem/stage_{stage}_unit_{unit}"
            parts = [(f"conv{i}.", f"norm{i}.", str(i)) for i in (1, 2, 3)]
            parts += [("downsample.conv.", "downsample.norm.", "projection")] if unit == 0 else []
            for convolution, normalisation, ours in parts:
                kernel = (f"{name}{convolution}weight",), (f"{path}/convolution_{ours}/kernel",)
                table += [Rule(*kernel, forms.CONVOLUTION), *norm(f"{name}{normalisation}", f"{path}/norm_{ours}")]
    return table


def _block_rules(name: str, path: str, parts: Parts, spelling: Spelling) -> list[Rule]:
    table = norm(f"{name}norm1.", f"{path}/norm_attention")
    qkv = dense(f"{name}attn.qkv.", f"{path}/attention/qkv", forms.LINEAR)
    table += qkv if parts.qkv_bias else qkv[:1]
    if parts.qk_norm:
        table += norm(f"{name}attn.q_norm.", f"{path}/attention/norm_queries")
        table += norm(f"{name}attn.k_norm.", f"{path}/attention/norm_keys")
    table += dense(f"{name}attn.proj.", f"{path}/attention/out", forms.LINEAR)
    table += norm(f"{name}norm2.", f"{path}/norm_mlp")
    first = {"fc1": "fc1", "packed": "fc1", "apart": "{}", "w12": "w12"}[spelling.mlp]
    up = f"{path}/mlp/{'up' if parts.mlp == 'gelu' else 'gate_up'}"
    if spelling.mlp == "apart":
        table += dense(f"{name}mlp.{first}.", up, forms.fused_linear(2), forms.fused_vectors(2), ("fc1_g", "fc1_x"))
    else:
        table += dense(f"{name}mlp.{first}.", up, forms.LINEAR)
    table += dense(f"{name}mlp.{'w3' if spelling.mlp == 'w12' else 'fc2'}.", f"{path}/mlp/down", forms.LINEAR)
    if parts.layer_scale:
        for number, branch in (("1", "attention"), ("2", "mlp")):
            scale = name + spelling.scale.replace("{}", number)
            table += [Rule((scale,), (f"{path}/scale_{branch}/scale",), forms.SAME)]
    return table


def _map_rules(name: str) -> list[Rule]:
    return [
        Rule((f"{name}latent",), ("pooling/probe",), forms.SAME),
        *dense(f"{name}q.", "pooling/query", forms.LINEAR),
        *dense(f"{name}kv.", "pooling/key_value", forms.LINEAR),
        *dense(f"{name}proj.", "pooling/out", forms.LINEAR),
        *norm(f"{name}norm.", "pooling/norm"),
        *dense(f"{name}mlp.fc1.", "pooling/mlp/up", forms.LINEAR),
        *dense(f"{name}mlp.fc2.", "pooling/mlp/down", forms.LINEAR),
    ]


def write(
    model: VisionTransformer, parameters: Mapping[str, np.ndarray], image_size: tuple[int, int] | None, channels: int
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
    """The arrays of a model in timm's naming, the config.json to stand beside them, and what these do not say.

    Args:
        model: whose parameters they are, not scanned.
        parameters: by path.
        image_size: height and width, pixels.
        channels: values a pixel.

    Raises:
        UserError: the model has what timm's has not; all of it is named.
    """
    lacking = [what for what, there in _lacking(model).items() if there]
    if lacking:
        raise UserError(f"timm's models have no place for {few(lacking)}")
    if image_size is None:
        raise UserError("timm's models are for one image size: give image_size=(height, width)")
    rows = "class"
    if model.position == "learned":
        without = not model.class_token or not parameters["positions/table"][:, :1].any()
        rows = "none" if without else "all" if model.registers else "class"
    spelling = Spelling(
        rows=rows,
        mlp="packed" if model.mlp == "swiglu" else "fc1",
        norm="fc_norm." if model.norm_after_pooling else "norm.",
    )
    arrays = forms.written(_rules(Parts.of(model), spelling), parameters, model)
    notes = []
    if model.layer_norm_epsilon != EPSILON:
        notes.append(
            f"timm takes layer_norm_epsilon {EPSILON:g} whatever the file says; this model has "
            f"{model.layer_norm_epsilon:g} (a file of ours says so to us)"
        )
    return arrays, _config(model, image_size, channels, rows), tuple(notes)


def _lacking(model: VisionTransformer) -> dict[str, bool]:
    return {
        f"pre_logits ({model.pre_logits})": model.classes is not None and model.pre_logits is not None,
        "parallel blocks": model.parallel,
        "the stem of a hybrid": model.stem is not None,
        f"position {model.position!r}": model.position not in ("learned", "none"),
        f"positions in the {model.position_at}": model.position_at not in (None, "input"),
        "several heads": isinstance(model.classes, Mapping),
        "attention pooling beside swiglu": model.pooling == "map" and model.mlp == "swiglu",
    }


def _config(model: VisionTransformer, image_size: tuple[int, int], channels: int, rows: str) -> dict[str, Any]:
    """What timm.create_model('local-dir:FOLDER') makes the same model of."""
    gated = model.mlp == "swiglu"
    hidden = model.mlp_width * (2 if gated else 1)
    ratio = hidden / model.width
    if int(model.width * ratio) != hidden:  # timm rounds the product down
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
        # Of what its arguments do not say, the gated MLP is this architecture's; all else is said.
        "architecture": "vit_giant_patch14_dinov2" if gated else "vit_base_patch16_224",
        "num_classes": classes,
        "num_features": model.width,
        "global_pool": pooling,
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [channels, *image_size], "num_classes": classes, "fixed_input_size": True},
        "layer_norm_epsilon": model.layer_norm_epsilon,
    }
