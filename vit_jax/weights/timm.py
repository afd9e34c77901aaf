"""Reads state dictionaries of timm's Vision Transformers, and others with similar names.

These are the models of vision_transformer.py, deit.py, eva.py and beit.py in timm, and the files of DeiT, DINO, DINOv2,
DINOv3 and MAE. In timm the final norm may come before pooling (`norm`) or after it (`fc_norm`), the position embedding
may have rows for class token and registers (`no_embed_class`), and the GELU is exact by default.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.positions import POSITIONS
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
    pair,
    pixels_per_patch,
)
from vit_jax.weights.files import Stored
from vit_jax.weights.rules import Parts
from vit_jax.weights.timm_architectures import (
    FOREIGN,
    HEADS,
    IGNORED,
    LARGE_EPSILON,
    NO_NORM,
    POST_NORM_WIDTH,
    QUICK,
    REFUSED,
    TANH,
)
from vit_jax.weights.timm_positions import Implied, implied
from vit_jax.weights.timm_rules import STEMS, TABLE, Spelling, make_rules, relative_grid

LABEL = "timm's naming"
FAMILY = "timm's models"
OWN = "vit_jax"  # key in the header of files that we write; its value is the config
POOLINGS = {"token": "token", "avg": "mean", "map": "map", "": "none"}
GELUS = {"gelu": "exact", "gelu_erf": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}
EPSILON = 1e-6

STEM = r"patch_embed\.backbone\."
# How a model is recognized in a file: the start of a block's names after the prefix, and of those of its embedding.
BLOCK, EMBEDDING, CLASSIFIER = r"blocks\.\d+\.(?:\d+\.)?attn\.", r"patch_embed\.", r"head(_dist)?\."
SEPARATOR, INNER = ".", ()
TWO_HEADS = "its logits are the mean of two heads, on class token and distillation token, which is not supported"
KNOWN = ("cls_token", "pos_embed", "reg_token", "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")


def describe(stored: Stored, overrides: Mapping[str, Any]) -> Description:
    """The description of a file.

    Raises:
        UserError: it is not a complete model, has parts that are not supported, or lacks a value of `overrides`.
    """
    names = Names(stored.shapes, "", LABEL)
    for pattern, what in FOREIGN.items():
        name = next((name for name in names if re.match(pattern, name)), None)
        if name is not None:
            raise UserError(
                f"{name}: the model has {what}, which is not supported\n"
                "  use a plain Vision Transformer (docs/weights.md)"
            )
    recorded, choices = _recorded(stored), Choices(overrides)
    pooling = _pooling(names, recorded, choices)
    parts, refusal = _parts(names, pooling, recorded), odd_head(names, "head.", bias=not names.any(r"norm_pre\."))
    two_heads = names.any(r"head_dist\.")
    if two_heads and pooling != "token_register":
        refusal = TWO_HEADS
    # A model without a position embedding is rare: it has to be stated, as the table may be missing from the file.
    none = recorded.get("positions") is False or "position" in overrides or not _needs_table(names, recorded)
    parts = dataclasses.replace(parts, positions=parts.positions or not none, head=parts.head and refusal is None)
    spelling = _spelling(names, parts, recorded)
    _check_supported(names, parts, spelling, own=OWN in stored.metadata)
    ignored, optional = _ignored(names, parts, refusal), _optional_biases(parts)
    check_names(
        stored.shapes, rules.without_absent(make_rules(parts, spelling, 1), names, optional)[0], ignored, KNOWN, LABEL
    )
    grid = None
    if parts.positions:
        rows = names.shape("pos_embed", 3)[1] - _rows_before(names, parts, spelling)[spelling.rows]
        grid = choices.grid(rows, _pixels_per_patch(names, parts), recorded.get("image_size"))
    position = implied(parts, spelling, None if grid is None or grid[0] != grid[1] else grid[0], recorded)
    model, channels = _model(names, parts, spelling, position, pooling, recorded, choices)
    rotates = POSITIONS[model.position].angles is not None
    spelling = dataclasses.replace(spelling, interleaved=rotates and model.position != "dinov3")
    table, zeros = rules.without_absent(make_rules(parts, spelling, model.width // model.heads), names, optional)
    return Description(
        LABEL,
        model,
        channels,
        grid or spelling.relative,
        tuple(table),
        ignored,
        decisions=tuple(choices.made),
        notes=_notes(names, parts, spelling),
        head_refusal=refusal,
        recorded_size=pair(recorded.get("image_size")) if grid is None else None,
        zeros=zeros,
        resampling="bicubic",
    )


def _check_supported(names: Names, parts: Parts, spelling: Spelling, own: bool) -> None:
    """Raises UserError for combinations of parts that our models do not have; `own`: the file is an export of ours."""
    width = names.shape("patch_embed.proj.weight", 4)[0]
    what = None
    if parts.positions and spelling.relative is not None:
        what = f"pos_embed and {TABLE}: positions at the input and in the layers are"
    elif parts.map and (parts.class_token or parts.registers) and not parts.input_norm and not own:
        what = "attn_pool and tokens before the patches, which timm leaves out of the pooling: that is"
    elif spelling.bias == "query_value" and parts.mlp == "gelu" and width == POST_NORM_WIDTH:
        what = f"the width {width} of EVA-02 E: norms after attention and MLP are"
    if what is not None:
        raise UserError(f"the file has {what} not supported\n  use a model of docs/weights.md")


def _ignored(names: Names, parts: Parts, refusal: str | None) -> dict[str, str]:
    ignored = {name: why for name in names for pattern, why in IGNORED.items() if re.match(pattern, name)}
    if refusal is not None:
        why = f"a head that is not supported: {refusal.removesuffix(', which is not supported')}"
        ignored |= {name: why for name in names if re.match(CLASSIFIER, name)}
    if parts.pre_logits and not parts.head:
        ignored |= dict.fromkeys(("pre_logits.fc.weight", "pre_logits.fc.bias"), "there is no head after it")
    return ignored


def _needs_table(names: Names, recorded: Mapping[str, Any]) -> bool:
    """Whether a file with these arrays is not complete without pos_embed."""
    with_registers = "storage_tokens" in names or ("reg_token" in names and names.any(r"blocks\.\d+\.gamma_1"))
    relative = names.any(rf"(rel_pos_bias\.|blocks\.\d+\.attn\.){TABLE}")
    return not (with_registers or relative or re.match(r".*(_rope_\d|dinov3)", recorded.get("architecture", "")))


def _optional_biases(parts: Parts) -> str:
    """A pattern of the paths of layers that may have no bias in models with these parts."""
    if parts.norm == "rms":  # AIMv2
        return r"encoder/block_\d+/(?:attention|mlp)/\w+"
    return "embedding/projection|head/logits" if parts.input_norm == "tokens" else "no layer"


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
    if arguments.get("norm_layer") not in (None, "layernorm", "rmsnorm"):
        raise UserError(f"config.json has norm_layer {arguments['norm_layer']!r}\n  allowed: layernorm, rmsnorm, none")
    if refusal or arguments.get("pool_include_prefix"):
        raise UserError(
            f"config.json has {name}: {refusal or REFUSED['test_vit3$']}, which is not supported\n"
            "  use a plain Vision Transformer (docs/weights.md)"
        )
    heads = next((heads for pattern, heads in HEADS.items() if re.match(pattern, name)), None)
    size = config_value(config_value(config, "pretrained_cfg", dict) or {}, "input_size", list) or []
    return {
        "architecture": name,
        "arguments": arguments,
        "num_features": config_value(config, "num_features", int),
        "depth": config_value(arguments, "depth", int),
        "class_token": config_value(arguments, "class_token", bool),
        # timm does not count DeiT's distillation token.
        "reg_tokens": None if "dist_token" in stored.shapes else config_value(arguments, "reg_tokens", int),
        "positions": False if arguments.get("pos_embed") in ("", "none") else None,
        "heads": config_value(arguments, "num_heads", int) or heads,
        "activation": config_value(arguments, "act_layer", str) or _activation(name, config),
        "pooling": config_value(config if "global_pool" in config else arguments, "global_pool", str),
        "no_embed_class": config_value(arguments, "no_embed_class", bool),
        "final_norm": False if re.match(NO_NORM, name) else config_value(arguments, "final_norm", bool),
        **({"pool_heads": pool} if (pool := config_value(arguments, "attn_pool_num_heads", int)) else {}),
        "image_size": arguments.get("img_size") or size[1:],
        "layer_norm_epsilon": config_value(config, "layer_norm_epsilon", float),
    }


def _activation(architecture: str, config: Mapping[str, Any]) -> str:
    """The activation that a model was trained with, by timm's name for it."""
    tag = config_value(config_value(config, "pretrained_cfg", dict) or {}, "tag", str) or ""
    quick = re.match(QUICK, f"{architecture}.{tag}")
    return "gelu_tanh" if re.match(TANH, architecture) else "quick_gelu" if quick else "gelu"


def _pooling(names: Names, recorded: Mapping[str, Any], choices: Choices) -> str:
    if names.any(r"attn_pool\."):
        if names.any(r"fc_norm\."):
            raise UserError(
                "fc_norm.: a norm after attention pooling is not supported\n"
                "  use a plain Vision Transformer (docs/weights.md)"
            )
        return "map"
    word = recorded.get("pooling")
    if names.any(r"head_dist\.") and names.any(r"head\.") and "dist_token" in names and word in (None, "token"):
        return choices.decide("pooling", "token_register", family=FAMILY)
    if word is not None and POOLINGS.get(word, "map") == "map":
        raise UserError(
            f"config.json has global_pool {word!r}, which is not supported for the file's arrays\n"
            "  correct it, or remove config.json"
        )
    convention = "mean" if names.any(r"fc_norm\.") or "cls_token" not in names else "token"
    return choices.decide("pooling", convention, None if word is None else POOLINGS[word], family=FAMILY)


def _parts(names: Names, pooling: str, recorded: Mapping[str, Any]) -> Parts:
    block = r"blocks\.\d+\."
    gated = names.any(rf"{block}mlp\.(fc1_g|w12|w1)\.") or _packed(names)
    layer_norm = not names.any(rf"{block}norm1\.") or names.any(rf"({block}norm[12]|patch_embed\.norm|norm)\.bias")
    no_norm = recorded.get("final_norm") is False or (not names.any(r"head\.") and _may_end_without_norm(names))
    return Parts(
        depth=names.count(r"blocks\.(\d+)\."),
        class_token="cls_token" in names,
        registers=names.any("(reg_token|register_tokens|dist_token|storage_tokens)$"),
        positions="pos_embed" in names,
        mlp="swiglu" if gated else "gelu",
        qkv_bias=names.any(rf"{block}attn\.(qkv\.|q_proj\.|q_)bias"),
        qk_norm=names.any(rf"{block}attn\.[qk]_norm\."),
        layer_scale=names.any(rf"{block}(ls\d\.|gamma_\d)"),
        stem=_stem(names),
        map=pooling == "map",
        norm_after_pooling=pooling == "mean" and names.any(r"fc_norm\."),
        head=names.any(r"head\."),
        pre_logits=names.any(r"pre_logits\.fc\."),
        norm="layer" if layer_norm else "rms",
        input_norm="tokens" if names.any(r"norm_pre\.") else "patches" if names.any(r"patch_embed\.norm\.") else None,
        attention_norm=names.any(rf"{block}attn\.norm\."),
        mlp_norm=names.any(rf"{block}mlp\.norm\."),
        final_norm=names.any(r"(fc_)?norm\.") or not no_norm,
    )


def _may_end_without_norm(names: Names) -> bool:
    """Whether the arrays are of a model that has published files without a final norm: PE, RADIO, InternViT."""
    return names.any(r"norm_pre\.|reg_token$|blocks\.\d+\.ls1\.gamma")


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
    others = ("register_tokens", "dist_token", "storage_tokens")
    mlp, block = "fc1", r"blocks\.\d+\."
    if parts.mlp == "swiglu":
        first = next((name for name in ("w12", "w1") if names.any(rf"{block}mlp\.{name}\.")), "apart")
        mlp = "packed" if _packed(names) else first
    masked, apart = names.any(rf"{block}attn\.qkv\.bias_mask"), names.any(rf"{block}attn\.q_bias")
    shared = names.any(r"rel_pos_bias\.")
    spelling = Spelling(
        stem=STEMS[0] if f"{STEMS[0]}conv.weight" in names else STEMS[1],
        registers=next((name for name in others if name in names), "reg_token"),
        scale="gamma_{}" if names.any(rf"{block}gamma_") else "ls{}.gamma",
        mlp=mlp,
        norm="fc_norm." if names.any(r"fc_norm\.") else "norm.",
        qkv="apart" if names.any(rf"{block}attn\.q_proj\.") else "fused",
        bias="masked" if masked else "query_value" if apart else "fused",
        relative=_relative(names, f"{'rel_pos_bias' if shared else 'blocks.0.attn'}.{TABLE}", recorded),
        shared=shared,
        heads="two" if names.any(r"head_dist\.") else "one",
    )
    return dataclasses.replace(spelling, rows=_rows(names, parts, spelling, recorded))


def _relative(names: Names, table: str, recorded: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of patches of a relative position embedding; None if there is none."""
    if table not in names:
        return None
    if "pos_embed" in names:  # refused
        return 1, 1
    rows, patch = names.shape(table, 2)[0], names.shape("patch_embed.proj.weight", 4)[-1]
    grid = relative_grid(rows, hint(recorded.get("image_size"), patch))
    if grid is None:
        raise UserError(
            f"{table} has {rows} rows, which are not those of a square grid with a class token\n"
            "  put the model's config.json, with its image size, next to the file"
        )
    return grid


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


def _pixels_per_patch(names: Names, parts: Parts) -> int:
    """Height and width of a patch in pixels of the image."""
    patch = names.shape("patch_embed.proj.weight", 4)[-1]
    if parts.stem is None:
        return patch
    sizes = {"patch_size": patch, "width": 64, "depth": 1, "heads": 1, "mlp_width": 1, "classes": None}
    return pixels_per_patch(VisionTransformer(**sizes, stem=parts.stem))


def _heads(parts: Parts, position: Implied | None, width: int) -> int | None:
    """The usual number of heads of models with these parts; None for that of plain Vision Transformers."""
    kind = "" if position is None else position.position
    if parts.input_norm == "patches":  # AIMv2 has 128 channels per head
        return width // 128 or None
    if kind == "dinov3":
        return 32 if width == 4096 else width // 64 or None
    return 16 if kind == "learned_pe" and width == 1536 else None


def _model(
    names: Names,
    parts: Parts,
    spelling: Spelling,
    position: Implied | None,
    pooling: str,
    recorded: Mapping[str, Any],
    choices: Choices,
) -> tuple[VisionTransformer, int]:
    width, channels, patch, across = names.shape("patch_embed.proj.weight", 4)
    if patch != across:
        raise UserError(f"patch_embed.proj.weight has patches of {patch}x{across}\n  allowed: square patches")
    first = {"fc1": "fc1", "packed": "fc1", "apart": "fc1_g", "w12": "w12", "w1": "w1"}[spelling.mlp]
    hidden = names.shape(f"blocks.0.mlp.{first}.weight", 2)[0]
    kind = "none" if position is None else position.position
    if position is None or position.is_open:
        kind = choices.decide("position", kind, None if position else "none", family=FAMILY)
    sub_norms = parts.attention_norm and parts.mlp_norm and parts.mlp == "gelu"  # BEiT-3
    large = bool(parts.input_norm or kind == "dinov3" or sub_norms)
    if "architecture" in recorded:
        large = re.match(LARGE_EPSILON, recorded["architecture"]) and "norm_layer" not in recorded["arguments"]
    epsilon = 1e-5 if large else EPSILON
    is_pe = position is not None and position.position == "learned_pe"
    fields = {
        "classes": names.shape("head.weight", 2)[0] if parts.head else None,
        "pre_logits": names.shape("pre_logits.fc.weight", 2)[0] if parts.head and parts.pre_logits else None,
        "patch_size": patch,
        "width": width,
        "depth": parts.depth,
        "heads": choices.heads(width, recorded.get("heads"), FAMILY, usual=_heads(parts, position, width)),
        "mlp_width": hidden // 2 if spelling.mlp in ("packed", "w12") else hidden,
        "class_token": parts.class_token,
        "registers": names.shape(spelling.registers, 3)[1] if parts.registers else 0,
        "pooling": pooling,
        "position": kind,
        "position_at": "shared" if spelling.shared else None,
        "position_grid": None if position is None else position.grid,
        "pool_heads": recorded.get("pool_heads", 8) if is_pe and parts.map else None,
        "layer_scale": 1e-5 if parts.layer_scale else None,
        "layer_norm_epsilon": choices.decide(
            "layer_norm_epsilon", epsilon, recorded.get("layer_norm_epsilon"), family=FAMILY
        ),
    }
    same = ("mlp", "qkv_bias", "qk_norm", "norm_after_pooling", "norm", "input_norm", "attention_norm", "mlp_norm")
    fields |= {name: getattr(parts, name) for name in (*same, "final_norm")}
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


def _notes(names: Names, parts: Parts, spelling: Spelling) -> tuple[str, ...]:
    notes = [] if parts.final_norm else ["the file has no norm after the last block, so that the model has none"]
    if parts.stem is not None:
        notes.append("the stem's norms use the epsilon of Google's code that it was trained with, 1e-6; timm uses 1e-5")
    if parts.class_token and parts.positions and spelling.rows == "none":
        notes.append("the position embedding has no row for the class token: a row of zeros was added")
    if spelling.rows == "all" and spelling.registers == "dist_token":
        notes.append("the distillation token became a register, with its row of positions added to it")
    return tuple(notes)
