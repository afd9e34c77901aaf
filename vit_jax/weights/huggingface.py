"""Reads Hugging Face's ViT, DeiT, DINOv2 (with and without registers), DINO, MSN and the encoder of ViTMAE.

State dictionaries of transformers 5 have other names than the files that transformers writes; both are read. By
default the GELU is exact and the epsilon of LayerNorm 1e-12 (DINOv2: 1e-6); config.json may state others.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import rules
from vit_jax.weights.describe import Choices, Description, Names, check_config, check_names, config_value, odd_head
from vit_jax.weights.files import Stored
from vit_jax.weights.rules import Parts, Rule, dense, norm

LABEL = "Hugging Face's naming"
KINDS = ("vit", "vit_msn", "ijepa", "deit", "dinov2", "dinov2_with_registers", "vit_mae")
GELUS = {"gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
GELUS |= {"quick_gelu": "quick"}
LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."

# How a model is recognized in a file, as in timm.py. In models with a head, the encoder is below one of INNER.
BLOCK = r"(?:encoder\.layer|layers)\.\d+\.(?:attention|layernorm_before|norm1)\."
EMBEDDING, CLASSIFIER = r"(?:\w+\.)?embeddings\.patch_embeddings\.projection\.", r"(\w+_)?classifier\."
SEPARATOR, INNER = ".", ("vit", "vit_msn", "ijepa", "deit", "dinov2", "dinov2_with_registers", "vit_mae")

IGNORED = {r"pooler\.dense\.": "a layer of the pooled output, which the classifier does not use"}
HEADS = ("cls_classifier", "distillation_classifier")  # their logits are averaged
KNOWN = ("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.register_tokens", "classifier.weight")


@dataclasses.dataclass(frozen=True)
class Spelling:
    """The names that differ between files of this kind.

    Attributes:
        prefix: start of the encoder's names.
        block: start of a block's names; '{}' stands for its index.
        dinov2: whether a block's norms and MLP have DINOv2's names.
        attention: 'attention' (attention.attention.query, ...) or 'proj' (attention.q_proj, ...).
        mlp: 'dense' (intermediate.dense), 'fc' (mlp.fc1), or for SwiGLU 'packed' (weights_in) or 'apart' (gate_proj).
        registers: name of the tokens between class token and patches: 'register_tokens' or 'distillation_token'.
    """

    prefix: str
    block: str
    dinov2: bool
    attention: str
    mlp: str
    registers: str


def describe(stored: Stored, overrides: Mapping[str, Any]) -> Description:
    """The description of a file.

    Raises:
        UserError: it is not a complete model, has parts that are not supported, or lacks a value of `overrides`.
    """
    names = Names(stored.shapes, _prefix(stored.shapes), LABEL)
    config, choices = _config(stored), Choices(overrides)
    spelling, heads = _spelling(names), [name for name in stored.shapes if re.match(CLASSIFIER, name)]
    own = Names(stored.shapes, "", LABEL)
    two = any(f"{start}.weight" in own for start in HEADS)
    odd = (odd_head(own, f"{start}.") for start in (HEADS if two else ("classifier",)))
    refusal = next((why for why in odd if why is not None), None)
    parts = _parts(names, spelling, bool(heads) and refusal is None)
    ignored = {
        f"{names.prefix}{name}": why for name in names for pattern, why in IGNORED.items() if re.match(pattern, name)
    }
    if refusal is not None:
        ignored |= dict.fromkeys(heads, "a head that is not supported: " + refusal.split(", which")[0])
    table = _rules(parts, spelling, two)
    check_names(stored.shapes, table, ignored, [names.prefix + name for name in KNOWN], LABEL)
    model, channels = _model(names, stored.shapes, parts, spelling, config, choices)
    rows = names.shape("embeddings.position_embeddings", 3)[1] - int(parts.class_token)
    if spelling.registers == "distillation_token":
        rows -= model.registers
    grid = choices.grid(rows, model.patch_size, config.get("image_size"))
    return Description(
        LABEL,
        model,
        channels,
        grid,
        tuple(table),
        ignored,
        decisions=tuple(choices.made),
        notes=_notes(spelling, parts),
        head_refusal=refusal,
        resampling="bicubic" if spelling.registers == "register_tokens" and parts.registers else "bicubic_no_antialias",
    )


def _prefix(shapes: Mapping[str, Any]) -> str:
    return next((f"{start}." for start in INNER if any(name.startswith(f"{start}.") for name in shapes)), "")


def _config(stored: Stored) -> dict[str, Any]:
    config = stored.config or {}
    # Models with a decoder or a text tower have the config of the image encoder inside.
    inner = (config.get(key) for key in ("vision_config", "encoder", "backbone_config"))
    config = next((one for one in inner if isinstance(one, dict) and one.get("model_type") in KINDS), config)
    if not isinstance(config.get("model_type"), str):
        return {}
    if config["model_type"] not in KINDS:
        raise UserError(f"config.json has model_type {config['model_type']!r}\n  allowed: {', '.join(KINDS)}")
    kinds = {"hidden_size": int, "num_hidden_layers": int, "num_attention_heads": int, "num_register_tokens": int}
    kinds |= {"hidden_act": str, "layer_norm_eps": float}
    return {key: config_value(config, key, kind) for key, kind in kinds.items()} | {
        "image_size": config.get("image_size")
    }


def _spelling(names: Names) -> Spelling:
    swiglu = "apart" if names.any(rf"{LAYER}mlp\.gate_proj\.") else "packed"
    gated = names.any(rf"{LAYER}mlp\.(gate_proj|weights_in)\.")
    return Spelling(
        prefix=names.prefix,
        block="encoder.layer.{}." if names.any(r"encoder\.layer\.") else "layers.{}.",
        dinov2=names.any(rf"{LAYER}(norm1|layer_scale1)\."),
        attention="proj" if names.any(rf"{LAYER}attention\.[qkv]_proj\.") else "attention",
        mlp=swiglu if gated else "fc" if names.any(rf"{LAYER}mlp\.") else "dense",
        registers="distillation_token" if "embeddings.distillation_token" in names else "register_tokens",
    )


def _parts(names: Names, spelling: Spelling, head: bool) -> Parts:
    return Parts(
        depth=names.count(LAYER),
        class_token="embeddings.cls_token" in names,
        registers=f"embeddings.{spelling.registers}" in names,
        positions=True,
        mlp="swiglu" if spelling.mlp in ("packed", "apart") else "gelu",
        qkv_bias=names.any(rf"{LAYER}attention\.(attention\.query|q_proj)\.bias"),
        layer_scale=names.any(rf"{LAYER}layer_scale\d\."),
        head=head,
    )


def _model(
    names: Names,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Parts,
    spelling: Spelling,
    config: Mapping[str, Any],
    choices: Choices,
) -> tuple[VisionTransformer, int]:
    width, channels, patch, across = names.shape("embeddings.patch_embeddings.projection.weight", 4)
    if patch != across:
        raise UserError(f"the file has patches of {patch}x{across}\n  allowed: square patches")
    first = {"dense": "intermediate.dense", "fc": "mlp.fc1", "packed": "mlp.weights_in", "apart": "mlp.gate_proj"}
    hidden = names.shape(f"{spelling.block.format(0)}{first[spelling.mlp]}.weight", 2)[0]
    family = "Hugging Face's " + ("DINOv2" if spelling.dinov2 else "ViT and DeiT")
    convention, classes = "token" if parts.class_token else "mean", None
    if parts.head:
        one = "classifier.weight" in shapes
        classes, reads = Names(shapes, "", LABEL).shape("classifier.weight" if one else f"{HEADS[0]}.weight", 2)
        convention = "token_register" if not one else "token_mean" if reads == 2 * width else convention
    fields = {
        "classes": classes,
        "patch_size": patch,
        "width": width,
        "depth": parts.depth,
        "heads": choices.heads(width, config.get("num_attention_heads"), family),
        "mlp_width": hidden // 2 if spelling.mlp == "packed" else hidden,
        "class_token": parts.class_token,
        "registers": names.shape(f"embeddings.{spelling.registers}", 3)[1] if parts.registers else 0,
        "pooling": choices.decide("pooling", convention, family=family),
        "mlp": parts.mlp,
        "qkv_bias": parts.qkv_bias,
        "layer_scale": 1.0 if parts.layer_scale else None,
        "layer_norm_epsilon": choices.decide(
            "layer_norm_epsilon", 1e-6 if spelling.dinov2 else 1e-12, config.get("layer_norm_eps"), family=family
        ),
    }
    own = {"hidden_size": width, "num_hidden_layers": parts.depth}
    own |= {"num_register_tokens": fields["registers"]} if spelling.registers == "register_tokens" else {}
    check_config({key: (config.get(key), has) for key, has in own.items()})
    if parts.mlp == "gelu":
        activation = config.get("hidden_act")
        if activation is not None and activation not in GELUS:
            raise UserError(f"config.json has hidden_act {activation!r}\n  allowed: {', '.join(GELUS)}")
        fields["gelu"] = choices.decide("gelu", "exact", GELUS.get(activation), family=family)
    return VisionTransformer(**fields), channels


def _notes(spelling: Spelling, parts: Parts) -> tuple[str, ...]:
    if parts.registers and spelling.registers == "distillation_token":
        return ("the distillation token became a register, with its row of positions added to it",)
    return ()


def _rules(parts: Parts, spelling: Spelling, two_heads: bool) -> list[Rule]:
    p = f"{spelling.prefix}embeddings."
    table = dense(f"{p}patch_embeddings.projection.", "embedding/projection", rules.PATCH_CONVOLUTION)
    if parts.class_token:
        table += [Rule((f"{p}cls_token",), ("class_token",), rules.SAME)]
    tokens, rows = (f"{p}{spelling.registers}",), (f"{p}position_embeddings",)
    if parts.registers and spelling.registers == "distillation_token":
        table += [Rule(tokens + rows, ("registers", "positions/table"), rules.with_register_rows(parts.class_token))]
    else:
        table += [Rule(tokens, ("registers",), rules.SAME)] if parts.registers else []
        table += [Rule(rows, ("positions/table",), rules.SAME)]
    for index in range(parts.depth):
        name = spelling.prefix + spelling.block.format(index)
        table += _attention_rules(name, f"encoder/block_{index}", parts, spelling)
        table += _mlp_rules(name, f"encoder/block_{index}", parts, spelling)
    table += norm(f"{spelling.prefix}layernorm.", "encoder/norm")
    if parts.head and two_heads:
        table += dense("{}.", "head/logits", rules.MEAN_OF_HEADS, rules.MEAN_OF_BIASES, HEADS)
    elif parts.head:
        table += dense("classifier.", "head/logits", rules.LINEAR)
    return table


def _attention_rules(name: str, path: str, parts: Parts, spelling: Spelling) -> list[Rule]:
    inner, out = f"{name}attention.attention.{{}}.", f"{name}attention.output.dense."
    kinds = ("query", "key", "value")
    if spelling.attention == "proj":
        inner, out, kinds = f"{name}attention.{{}}_proj.", f"{name}attention.o_proj.", ("q", "k", "v")
    qkv = dense(inner, f"{path}/attention/qkv", rules.fused_linear(3), rules.fused_vectors(3), kinds)
    return [
        *norm(f"{name}{'norm1' if spelling.dinov2 else 'layernorm_before'}.", f"{path}/norm_attention"),
        *(qkv if parts.qkv_bias else qkv[:1]),
        *dense(out, f"{path}/attention/out", rules.LINEAR),
        *_scale_rules(name, path, parts, "1", "attention"),
    ]


def _mlp_rules(name: str, path: str, parts: Parts, spelling: Spelling) -> list[Rule]:
    up, down = {
        "dense": ("intermediate.dense.", "output.dense."),
        "fc": ("mlp.fc1.", "mlp.fc2."),
        "packed": ("mlp.weights_in.", "mlp.weights_out."),
        "apart": ("mlp.{}_proj.", "mlp.down_proj."),
    }[spelling.mlp]
    ours = f"{path}/mlp/{'up' if parts.mlp == 'gelu' else 'gate_up'}"
    if spelling.mlp == "apart":
        first = dense(name + up, ours, rules.fused_linear(2), rules.fused_vectors(2), ("gate", "up"))
    else:
        first = dense(name + up, ours, rules.LINEAR)
    return [
        *norm(f"{name}{'norm2' if spelling.dinov2 else 'layernorm_after'}.", f"{path}/norm_mlp"),
        *first,
        *dense(name + down, f"{path}/mlp/down", rules.LINEAR),
        *_scale_rules(name, path, parts, "2", "mlp"),
    ]


def _scale_rules(name: str, path: str, parts: Parts, number: str, branch: str) -> list[Rule]:
    if not parts.layer_scale:
        return []
    return [Rule((f"{name}layer_scale{number}.lambda1",), (f"{path}/scale_{branch}/scale",), rules.SAME)]
