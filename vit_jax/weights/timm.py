"""Reads state dictionaries of timm's Vision Transformers, and DeiT's, DINO's, DINOv2's and MAE's, with similar names.

In timm the final norm may come before pooling (`norm`) or after it (`fc_norm`), the position embedding may have rows
for class token and registers (`no_embed_class`), and the GELU is exact by default.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import rules
from vit_jax.weights.describe import (
    Choices,
    Description,
    Names,
    check_config,
    check_names,
    config_value,
    hint,
    odd_head,
    pixels_per_patch,
)
from vit_jax.weights.files import Stored
from vit_jax.weights.rules import Parts, Rule, dense, norm

LABEL = "timm's naming"
FAMILY = "timm's models"
OWN = "vit_jax"  # key in the header of files that we write; its value is the config
POOLINGS = {"token": "token", "avg": "mean", "map": "map", "": "none"}
GELUS = {"gelu": "exact", "gelu_erf": "exact", "gelu_tanh": "tanh"}
EPSILON = 1e-6

# Architectures of timm 1.0.31 whose number of heads does not follow from the width, or whose GELU is the tanh form.
HEADS = {r"test_vit2?$": 2, r"test_vit[34]$": 3, "vit_giantopt_": 16, "vit_base_patch16_gap_": 16}
TANH = r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip|vit_large_patch16_siglip_(gap_)?512"
REFUSED = {
    r".*_rpn_": "its blocks have LayerNorms after attention and MLP",
    r".*quickgelu": "its activation is the quick GELU",
    r".*(rope|dinov3|eva02)": "its positions are rotary",
    r".*relpos": "its positions are relative",
    r"test_vit3$": "its mean includes class token and registers",
}

# Arrays that our models have no parameters for.
FOREIGN = {
    "norm_pre.": "a LayerNorm before the blocks, as in CLIP",
    "attn_pool.q_norm.": "normalized queries in attention pooling",
}
STEM = r"patch_embed\.backbone\."
STEMS = ("patch_embed.backbone.stem.", "patch_embed.backbone.")  # with stages after it, and without
# How a model is recognized in a file: the start of a block's names after the prefix, and of those of its embedding.
BLOCK, EMBEDDING, CLASSIFIER = r"blocks\.\d+\.(?:\d+\.)?attn\.", r"patch_embed\.", r"head(_dist)?\."
SEPARATOR, INNER = ".", ()
TWO_HEADS = "its logits are the mean of two heads, on class token and distillation token, which is not supported"
KNOWN = ("cls_token", "pos_embed", "reg_token", "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")


@dataclasses.dataclass(frozen=True)
class Spelling:
    """The names that differ between files of this kind.

    Attributes:
        stem: start of the names of the first convolution and norm, if there is a stem.
        registers: name of the tokens between class token and patches.
        scale: name of a block's LayerScale; '{}' stands for 1 or 2.
        mlp: 'fc1' (GELU), or for SwiGLU 'packed' (fc1 holds gate and up), 'apart' (fc1_g, fc1_x) or 'w12'.
        norm: start of the names of the final norm.
        rows: rows of the position embedding before those of patches: 'none', 'class' or 'all'.
    """

    stem: str = "patch_embed.backbone.stem."
    registers: str = "reg_token"
    scale: str = "ls{}.gamma"
    mlp: str = "fc1"
    norm: str = "norm."
    rows: str = "class"


def describe(stored: Stored, overrides: Mapping[str, Any]) -> Description:
    """The description of a file.

    Raises:
        UserError: it is not a complete model, has parts that are not supported, or lacks a value of `overrides`.
    """
    names = Names(stored.shapes, "", LABEL)
    for start, what in FOREIGN.items():
        if names.any(re.escape(start)):
            raise UserError(
                f"{start}...: the model has {what}, which is not supported\n"
                "  use a plain Vision Transformer (docs/weights.md)"
            )
    recorded, choices = _recorded(stored), Choices(overrides)
    pooling = _pooling(names, recorded, choices)
    # A model without a position embedding is rare: it has to be stated, as the table may be missing from the file.
    none = recorded.get("positions") is False or "position" in overrides
    parts, refusal = _parts(names, pooling), odd_head(names, "head.")
    if names.any(r"head_dist\."):
        refusal = TWO_HEADS
    parts = dataclasses.replace(parts, positions=parts.positions or not none, head=parts.head and refusal is None)
    ignored = {}
    if refusal is not None:
        why = f"a head that is not supported: {refusal.removesuffix(', which is not supported')}"
        ignored = {name: why for name in names if re.match(CLASSIFIER, name)}
    if parts.pre_logits and not parts.head:
        ignored |= dict.fromkeys(("pre_logits.fc.weight", "pre_logits.fc.bias"), "there is no head after it")
    spelling = _spelling(names, parts, recorded)
    table = make_rules(parts, spelling)
    check_names(stored.shapes, table, ignored, KNOWN, LABEL)
    model, channels = _model(names, parts, spelling, pooling, recorded, choices)
    grid = None
    if parts.positions:
        rows = names.shape("pos_embed", 3)[1] - _rows_before(names, parts, spelling)[spelling.rows]
        grid = choices.grid(rows, pixels_per_patch(model), recorded.get("image_size"))
    return Description(
        LABEL,
        model,
        channels,
        grid,
        tuple(table),
        ignored,
        decisions=tuple(choices.made),
        notes=_notes(parts, spelling),
        head_refusal=refusal,
    )


def _recorded(stored: Stored) -> dict[str, Any]:
    """Heads, GELU, pooling and so on from the config in the file's header or next to it; {} if there is none.

    Raises:
        UserError: the config is of a model that is not supported.
    """
    config = stored.config or {}
    if OWN in stored.metadata:
        try:
            config = json.loads(stored.metadata[OWN])
        except ValueError:
            raise UserError(
                f"the value of {OWN!r} in its header is not JSON: the file is damaged\n  download or export it again"
            ) from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return {}
    name, arguments = config["architecture"], config_value(config, "model_args", dict) or {}
    refusal = next((why for pattern, why in REFUSED.items() if re.match(pattern, name)), None)
    if refusal or arguments.get("pool_include_prefix"):
        raise UserError(
            f"config.json has {name}: {refusal or REFUSED['test_vit3$']}, which is not supported\n"
            "  use a plain Vision Transformer (docs/weights.md)"
        )
    heads = next((heads for pattern, heads in HEADS.items() if re.match(pattern, name)), None)
    size = config_value(config_value(config, "pretrained_cfg", dict) or {}, "input_size", list) or []
    return {
        "num_features": config_value(config, "num_features", int),
        "depth": config_value(arguments, "depth", int),
        "class_token": config_value(arguments, "class_token", bool),
        # timm does not count DeiT's distillation token.
        "reg_tokens": None if "dist_token" in stored.shapes else config_value(arguments, "reg_tokens", int),
        "positions": False if arguments.get("pos_embed") in ("", "none") else None,
        "heads": config_value(arguments, "num_heads", int) or heads,
        "activation": config_value(arguments, "act_layer", str) or ("gelu_tanh" if re.match(TANH, name) else "gelu"),
        "pooling": config_value(config if "global_pool" in config else arguments, "global_pool", str),
        "no_embed_class": config_value(arguments, "no_embed_class", bool),
        "image_size": arguments.get("img_size") or size[1:],
        "layer_norm_epsilon": config_value(config, "layer_norm_epsilon", float),
    }


def _pooling(names: Names, recorded: Mapping[str, Any], choices: Choices) -> str:
    if names.any(r"attn_pool\."):
        if names.any(r"fc_norm\."):
            raise UserError(
                "fc_norm.: a norm after attention pooling is not supported\n"
                "  use a plain Vision Transformer (docs/weights.md)"
            )
        return "map"
    word = recorded.get("pooling")
    if word is not None and POOLINGS.get(word, "map") == "map":
        raise UserError(
            f"config.json has global_pool {word!r}, which is not supported for the file's arrays\n"
            "  correct it, or remove config.json"
        )
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
        pre_logits=names.any(r"pre_logits\.fc\."),
    )


def _stem(names: Names) -> tuple[int, ...] | None:
    """The units of a ResNet v2 stem, as in Google's hybrids; None without a stem.

    Raises:
        UserError: the stem is another network.
    """
    if not names.any(STEM):
        return None
    stages = names.count(rf"{STEM}stages\.(\d+)\.")
    if not any(f"{start}conv.weight" in names for start in STEMS):
        raise UserError(f"{STEMS[1]}...: only ResNet v2 is supported as a stem\n  use a model of docs/weights.md")
    return tuple(names.count(rf"{STEM}stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))


def _packed(names: Names) -> bool:
    """Whether the first matmul of an MLP returns twice as many features as the second reads."""
    first, second = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
    return first in names and second in names and names.shape(first, 2)[0] == 2 * names.shape(second, 2)[1]


def _spelling(names: Names, parts: Parts, recorded: Mapping[str, Any]) -> Spelling:
    registers = next((name for name in ("register_tokens", "dist_token") if name in names), "reg_token")
    mlp = "fc1"
    if parts.mlp == "swiglu":
        mlp = "packed" if _packed(names) else "w12" if names.any(r"blocks\.\d+\.mlp\.w12\.") else "apart"
    spelling = Spelling(
        STEMS[0] if f"{STEMS[0]}conv.weight" in names else STEMS[1],
        registers,
        "gamma_{}" if names.any(r"blocks\.\d+\.gamma_") else "ls{}.gamma",
        mlp,
        "fc_norm." if names.any(r"fc_norm\.") else "norm.",
    )
    return dataclasses.replace(spelling, rows=_rows(names, parts, spelling, recorded))


def _rows_before(names: Names, parts: Parts, spelling: Spelling) -> dict[str, int]:
    first = int(parts.class_token)
    tokens = names.shape(spelling.registers, 3)[1] if parts.registers else 0
    return {"none": 0, "class": first, "all": first + tokens}


def _rows(names: Names, parts: Parts, spelling: Spelling, recorded: Mapping[str, Any]) -> str:
    """The rows of the position embedding before those of patches: by the config, else the first that leave a grid."""
    if not parts.positions or "pos_embed" not in names:
        return "none"
    before = _rows_before(names, parts, spelling)
    rows, patch = names.shape("pos_embed", 3)[1], names.shape("patch_embed.proj.weight", 4)[-1]
    # Files of timm usually have no rows for registers, DINOv2's a row for the class token, DeiT's rows for all tokens.
    usual = ("all", "none") if spelling.registers == "dist_token" else ("none", "class", "all")
    if spelling.registers == "register_tokens" or not parts.registers:
        usual = ("class", "none")
    if recorded.get("no_embed_class") is not None:
        usual = ("none",) if recorded["no_embed_class"] else ("all",)
    grid = hint(recorded.get("image_size"), patch)
    for kind in usual if grid is not None else ():
        if rows - before[kind] == grid[0] * grid[1]:
            return kind
    for kind in usual:
        if rows > before[kind] and math.isqrt(rows - before[kind]) ** 2 == rows - before[kind]:
            return kind
    return usual[0]


def _model(
    names: Names, parts: Parts, spelling: Spelling, pooling: str, recorded: Mapping[str, Any], choices: Choices
) -> tuple[VisionTransformer, int]:
    width, channels, patch, across = names.shape("patch_embed.proj.weight", 4)
    if patch != across:
        raise UserError(f"patch_embed.proj.weight has patches of {patch}x{across}\n  allowed: square patches")
    first = {"fc1": "fc1", "packed": "fc1", "apart": "fc1_g", "w12": "w12"}[spelling.mlp]
    hidden = names.shape(f"blocks.0.mlp.{first}.weight", 2)[0]
    fields = {
        "classes": names.shape("head.weight", 2)[0] if parts.head else None,
        "pre_logits": names.shape("pre_logits.fc.weight", 2)[0] if parts.head and parts.pre_logits else None,
        "patch_size": patch,
        "width": width,
        "depth": parts.depth,
        "heads": choices.heads(width, recorded.get("heads"), FAMILY),
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
            "layer_norm_epsilon", EPSILON, recorded.get("layer_norm_epsilon"), family=FAMILY
        ),
    }
    own = {"num_features": width, "depth": parts.depth, "reg_tokens": fields["registers"]}
    own |= {"class_token": parts.class_token}
    check_config({key: (recorded.get(key), has) for key, has in own.items()})
    if parts.stem is not None:
        root, channels, _, _ = names.shape(f"{spelling.stem}conv.weight", 4)
        fields |= {"stem": parts.stem, "stem_width": root}
    if parts.mlp == "gelu":
        activation = recorded.get("activation")
        if activation is not None and activation not in GELUS:
            raise UserError(f"config.json has act_layer {activation!r}\n  allowed: {', '.join(GELUS)}")
        fields["gelu"] = choices.decide("gelu", "exact", GELUS.get(activation), family=FAMILY)
    return VisionTransformer(**fields), channels


def _notes(parts: Parts, spelling: Spelling) -> tuple[str, ...]:
    notes = []
    if parts.stem is not None:
        notes.append("the stem's norms use the epsilon of Google's code that it was trained with, 1e-6; timm uses 1e-5")
    if parts.class_token and parts.positions and spelling.rows == "none":
        notes.append("the position embedding has no row for the class token: a row of zeros was added")
    if spelling.rows == "all" and spelling.registers == "dist_token":
        notes.append("the distillation token became a register, with its row of positions added to it")
    return tuple(notes)


def make_rules(parts: Parts, spelling: Spelling) -> list[Rule]:
    """The rules of a file with these parts and names."""
    table = dense("patch_embed.proj.", "embedding/projection", rules.PATCH_CONVOLUTION)
    if parts.stem is not None:
        table += _stem_rules(parts.stem, spelling)
    if parts.class_token:
        table += [Rule(("cls_token",), ("class_token",), rules.SAME)]
    tokens, rows = (spelling.registers,), ("pos_embed",)
    if parts.registers and parts.positions and spelling.rows == "all":
        form = rules.with_register_rows(parts.class_token)
        table += [Rule(tokens + rows, ("registers", "positions/table"), form)]
    else:
        table += [Rule(tokens, ("registers",), rules.SAME)] if parts.registers else []
        form = rules.CLASS_ROW if parts.class_token and spelling.rows == "none" else rules.SAME
        table += [Rule(rows, ("positions/table",), form)] if parts.positions else []
    for index in range(parts.depth):
        table += _block_rules(f"blocks.{index}.", f"encoder/block_{index}", parts, spelling)
    table += norm(spelling.norm, "norm" if parts.norm_after_pooling else "encoder/norm")
    if parts.map:
        table += _map_rules("attn_pool.")
    if parts.head:
        table += dense("head.", "head/logits", rules.LINEAR)
        if parts.pre_logits:
            table += dense("pre_logits.fc.", "head/pre_logits", rules.LINEAR)
    return table


def _stem_rules(stem: tuple[int, ...], spelling: Spelling) -> list[Rule]:
    table = [Rule((f"{spelling.stem}conv.weight",), ("stem/convolution_root/kernel",), rules.CONVOLUTION)]
    table += norm(f"{spelling.stem}norm.", "stem/norm_root")
    for stage, count in enumerate(stem):
        for unit in range(count):
            name, path = f"{STEMS[1]}stages.{stage}.blocks.{unit}.", f"stem/stage_{stage}_unit_{unit}"
            parts = [(f"conv{i}.", f"norm{i}.", str(i)) for i in (1, 2, 3)]
            parts += [("downsample.conv.", "downsample.norm.", "projection")] if unit == 0 else []
            for convolution, normalization, ours in parts:
                kernel = (f"{name}{convolution}weight",), (f"{path}/convolution_{ours}/kernel",)
                table += [Rule(*kernel, rules.CONVOLUTION), *norm(f"{name}{normalization}", f"{path}/norm_{ours}")]
    return table


def _block_rules(name: str, path: str, parts: Parts, spelling: Spelling) -> list[Rule]:
    table = norm(f"{name}norm1.", f"{path}/norm_attention")
    qkv = dense(f"{name}attn.qkv.", f"{path}/attention/qkv", rules.LINEAR)
    table += qkv if parts.qkv_bias else qkv[:1]
    if parts.qk_norm:
        table += norm(f"{name}attn.q_norm.", f"{path}/attention/norm_queries")
        table += norm(f"{name}attn.k_norm.", f"{path}/attention/norm_keys")
    table += dense(f"{name}attn.proj.", f"{path}/attention/out", rules.LINEAR)
    table += norm(f"{name}norm2.", f"{path}/norm_mlp")
    first = {"fc1": "fc1", "packed": "fc1", "apart": "{}", "w12": "w12"}[spelling.mlp]
    up = f"{path}/mlp/{'up' if parts.mlp == 'gelu' else 'gate_up'}"
    if spelling.mlp == "apart":
        table += dense(f"{name}mlp.{first}.", up, rules.fused_linear(2), rules.fused_vectors(2), ("fc1_g", "fc1_x"))
    else:
        table += dense(f"{name}mlp.{first}.", up, rules.LINEAR)
    table += dense(f"{name}mlp.{'w3' if spelling.mlp == 'w12' else 'fc2'}.", f"{path}/mlp/down", rules.LINEAR)
    if parts.layer_scale:
        for number, branch in (("1", "attention"), ("2", "mlp")):
            scale = name + spelling.scale.replace("{}", number)
            table += [Rule((scale,), (f"{path}/scale_{branch}/scale",), rules.SAME)]
    return table


def _map_rules(name: str) -> list[Rule]:
    return [
        Rule((f"{name}latent",), ("pooling/probe",), rules.SAME),
        *dense(f"{name}q.", "pooling/query", rules.LINEAR),
        *dense(f"{name}kv.", "pooling/key_value", rules.LINEAR),
        *dense(f"{name}proj.", "pooling/out", rules.LINEAR),
        *norm(f"{name}norm.", "pooling/norm"),
        *dense(f"{name}mlp.fc1.", "pooling/mlp/up", rules.LINEAR),
        *dense(f"{name}mlp.fc2.", "pooling/mlp/down", rules.LINEAR),
    ]
