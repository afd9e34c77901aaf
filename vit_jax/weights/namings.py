"""The names of other projects' image towers: a `Naming` for each, and what their JSON files say."""

import dataclasses
import functools
import operator
import re
from typing import Any

from vit_jax.errors import UserError
from vit_jax.weights.describe import config_value
from vit_jax.weights.files import OPEN_CLIP, Stored, read_json
from vit_jax.weights.huggingface import GELUS
from vit_jax.weights.naming import Naming, Recorded
from vit_jax.weights.timm_rules import TABLE

TRANSFORMERS = "transformers' default, which config.json does not change"
PROJECTION = "the head is the projection to image embeddings, which are not normalized to length 1"

_KINDS = {"hidden_size": int, "num_hidden_layers": int, "num_attention_heads": int, "num_register_tokens": int}
_KINDS |= {"hidden_act": str, "layer_norm_eps": float, "eos_token_id": int}
_SIZES = {"width": "hidden_size", "depth": "num_hidden_layers", "registers": "num_register_tokens"}
_OPTIONS = {"heads": "num_attention_heads", "gelu": "hidden_act", "layer_norm_epsilon": "layer_norm_eps"}
_OPTIONS |= {"end_token": "eos_token_id"}


def hugging_face(
    stored: Stored, kinds: tuple[str, ...], defaults: dict[str, Any], fixed: dict[str, Any], tower: str = "vision"
) -> Recorded:
    """What config.json says of a tower, alone or in `vision_config`.

    Args:
        stored: the file.
        kinds: values of `model_type` that are read.
        defaults: of transformers, for keys that config.json does not have.
        fixed: values that other keys must have, if they are there.
        tower: 'vision', or 'text' for `text_config`.

    Raises:
        UserError: the config is of another kind of model, or has values that are not supported.
    """
    config = stored.config or {}
    inner = [config[key] for key in (f"{tower}_config", f"{tower}_config_dict") if isinstance(config.get(key), dict)]
    if inner:  # the second one is of old files, and has precedence
        config = functools.reduce(operator.or_, inner, {"model_type": config.get("model_type")})
    if not isinstance(config.get("model_type"), str):
        return Recorded()
    if config["model_type"] not in kinds:
        raise UserError(f"config.json has model_type {config['model_type']!r}\n  allowed: {', '.join(kinds)}")
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UserError(
                f"config.json has {key} {config[key]!r}\n  allowed: {value!r}; use a model of docs/weights.md"
            )
    values = {key: config_value(config, key, kind) for key, kind in _KINDS.items()}
    if values["layer_norm_eps"] is None:
        values["layer_norm_eps"] = config_value(config, "rms_norm_eps", float)
    options = {ours: defaults.get(key) if values[key] is None else values[key] for ours, key in _OPTIONS.items()}
    activation = options["gelu"]
    if activation not in (None, "silu", *GELUS):
        raise UserError(f"config.json has hidden_act {activation!r}\n  allowed: {', '.join(GELUS)}")
    options["gelu"] = GELUS.get(activation, activation)
    return Recorded(
        values={**options, "image_size": config.get("image_size", defaults.get("image_size"))},
        sizes={ours: (key, values[key]) for ours, key in _SIZES.items()},
        by={ours: TRANSFORMERS for ours, key in _OPTIONS.items() if values[key] is None},
    )


def _recorded(kinds: tuple[str, ...], fixed: dict[str, Any] | None = None, **defaults: Any) -> functools.partial:
    return functools.partial(hugging_face, kinds=kinds, defaults=defaults, fixed=fixed or {})


def _open_clip(stored: Stored) -> Recorded:
    """What OPEN_CLIP beside the file says; without it, models of OpenAI have three numbers next to the arrays.

    Raises:
        UserError: it has options that are not supported.
    """
    path = stored.path.parent / OPEN_CLIP
    if not path.is_file():
        ours = any(re.search(r"(^|\.)(input_resolution|context_length)$", name) for name in stored.arrays)
        return Recorded({"gelu": "quick"}, by={"gelu": "convention of OpenAI's CLIP"}) if ours else Recorded()
    config = read_json(path)
    model = config_value(config, "model_cfg", dict) or {}
    vision = config_value(model, "vision_cfg", dict) or {}
    for key, value in {"pool_type": "tok", "final_ln_after_pool": False, "attentional_pool": False}.items():
        if vision.get(key, value) != value:
            raise UserError(
                f"{OPEN_CLIP} has {key} {vision[key]!r}\n  allowed: {value!r}; use a model of docs/weights.md"
            )
    width, size = config_value(vision, "width", int), config_value(vision, "head_width", int) or 64
    values = {"image_size": vision.get("image_size")}
    values["gelu"] = "quick" if model.get("quick_gelu") else _activation(vision)
    values["heads"] = width // size if width else None
    values["layer_norm_epsilon"] = config_value(config_value(vision, "norm_kwargs", dict) or {}, "eps", float)
    return Recorded(
        values,
        {"width": ("width", width), "depth": ("layers", config_value(vision, "layers", int))},
        dict.fromkeys(values, OPEN_CLIP),
    )


def trunk_config(stored: Stored) -> dict[str, Any] | None:
    """A config as of timm for a tower of timm in a file of OpenCLIP, by OPEN_CLIP; None if there is none."""
    path = stored.path.parent / OPEN_CLIP
    vision = (config_value(read_json(path), "model_cfg", dict) or {}).get("vision_cfg") if path.is_file() else None
    if not isinstance(vision, dict) or not isinstance(vision.get("timm_model_name"), str):
        return None
    pooling = config_value(vision, "timm_pool", str)
    return {"architecture": vision["timm_model_name"], **({"global_pool": pooling} if pooling else {})}


def _activation(vision: dict[str, Any]) -> str:
    return "tanh" if (vision.get("act_kwargs") or {}).get("approximate") == "tanh" else "exact"


HUGGING_FACE_BLOCK = {
    "block/norm_attention": "layer_norm1.",
    "block/attention/qkv": "self_attn.q_proj. self_attn.k_proj. self_attn.v_proj.",
    "block/attention/out": "self_attn.out_proj.",
    "block/norm_mlp": "layer_norm2.",
    "block/mlp/up": "mlp.fc1.",
    "block/mlp/down": "mlp.fc2.",
}
CLIP = Naming(
    LABEL="Hugging Face's naming of CLIP",
    BLOCK=r"encoder\.layers\.\d+\.self_attn\.",
    embedding=r"(?:embeddings\.class_embedding$|pre_layrnorm\.)",
    INNER=("vision_model",),
    family="Hugging Face's CLIP",
    block="encoder.layers.{}.",
    names={
        "embedding/projection": "embeddings.patch_embedding.",
        "class_token": "embeddings.class_embedding",
        "positions/table": "embeddings.position_embedding.weight",
        "norm_input": "pre_layrnorm.",
        **HUGGING_FACE_BLOCK,
        "encoder/norm": "post_layernorm.",
        "head/logits": "visual_projection.",
    },
    biasless="embedding/projection|head/logits",
    classifier="classifier.",
    unread="encoder/norm",  # the mean of the patches is that of the last block
    fields={"input_norm": "tokens"},
    gelu="quick",
    epsilon=1e-5,
    recorded=_recorded(
        ("clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model"),
        num_attention_heads=12,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    head_note=PROJECTION,
)
SIGLIP = Naming(
    LABEL="Hugging Face's naming of SigLIP",
    BLOCK=CLIP.BLOCK,
    embedding=r"(?:embeddings\.patch_embedding\.bias$|head\.probe$)",
    INNER=CLIP.INNER,
    family="Hugging Face's SigLIP",
    block=CLIP.block,
    names={
        "embedding/projection": "embeddings.patch_embedding.",
        "positions/table": "embeddings.position_embedding.weight",
        **HUGGING_FACE_BLOCK,
        "encoder/norm": "post_layernorm.",
        "pooling/probe": "head.probe",
        "pooling/qkv": "head.attention.in_proj_",
        "pooling/out": "head.attention.out_proj.",
        "pooling/norm": "head.layernorm.",
        "pooling/mlp/up": "head.mlp.fc1.",
        "pooling/mlp/down": "head.mlp.fc2.",
    },
    optional="pooling/.*",
    classifier="classifier.",
    unread="pooling/.*",
    gelu="tanh",
    recorded=_recorded(
        ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"),
        num_attention_heads=12,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    ),
)
OPENAI = Naming(
    LABEL="OpenAI's naming of CLIP",
    resampling="bicubic",  # of OpenCLIP
    BLOCK=r"transformer\.resblocks\.\d+\.",
    embedding=r"conv1\.",
    family="OpenCLIP's models",
    block="transformer.resblocks.{}.",
    names={
        "embedding/projection": "conv1.",
        "class_token": "class_embedding",
        "positions/table": "positional_embedding",
        "norm_input": "ln_pre.",
        "block/norm_attention": "ln_1.",
        "block/attention/qkv": "attn.in_proj_",
        "block/attention/out": "attn.out_proj.",
        "block/scale_attention/scale": "ls_1.gamma",
        "block/norm_mlp": "ln_2.",
        "block/mlp/up": "mlp.c_fc.",
        "block/mlp/down": "mlp.c_proj.",
        "block/scale_mlp/scale": "ls_2.gamma",
        "encoder/norm": "ln_post.",
        "head/logits/kernel": "proj",
    },
    optional="head/.*|block/scale_.*",
    biasless="embedding/projection",
    fields={"input_norm": "tokens"},
    epsilon=1e-5,
    recorded=_open_clip,
    head_note=PROJECTION,
)
DINOV3 = Naming(
    LABEL="Hugging Face's naming of DINOv3",
    BLOCK=r"layers?\.\d+\.(?:attention|norm1)\.",
    INNER=("model", "encoder"),
    embedding=r"embeddings\.patch_embeddings\.weight$",
    family="Hugging Face's DINOv3",
    block="layer.{}.|model.layer.{}.|layers.{}.|encoder.layer.{}.",
    names={
        "embedding/projection": "embeddings.patch_embeddings.",
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "block/norm_attention": "norm1.",
        "block/attention/qkv": "attention.q_proj. attention.k_proj. attention.v_proj.",
        "block/attention/out": "attention.o_proj.",
        "block/scale_attention/scale": "layer_scale1.lambda1",
        "block/norm_mlp": "norm2.",
        "block/mlp/up": "mlp.up_proj.",
        "block/mlp/gate_up": "mlp.gate_proj. mlp.up_proj.",
        "block/mlp/down": "mlp.down_proj.",
        "block/scale_mlp/scale": "layer_scale2.lambda1",
        "encoder/norm": "norm.",
    },
    optional="registers",
    biasless=r"encoder/block_\d+/(attention/out|mlp/\w+)",
    fields={"position": "dinov3"},
    epsilon=1e-5,
    heads={4096: 32},
    recorded=_recorded(
        ("dinov3_vit",), {"rope_theta": 100.0}, num_attention_heads=6, hidden_act="gelu", layer_norm_eps=1e-5
    ),
)
TORCHVISION = Naming(
    LABEL="torchvision's naming",
    BLOCK=r"encoder\.layers\.encoder_layer_\d+\.",
    embedding=r"conv_proj\.",
    family="torchvision's models",
    block="encoder.layers.encoder_layer_{}.",
    names={
        "embedding/projection": "conv_proj.",
        "class_token": "class_token",
        "positions/table": "encoder.pos_embedding",
        "block/norm_attention": "ln_1.",
        "block/attention/qkv": "self_attention.in_proj_",
        "block/attention/out": "self_attention.out_proj.",
        "block/norm_mlp": "ln_2.",
        "block/mlp/up": "mlp.0.|mlp.linear_1.",
        "block/mlp/down": "mlp.3.|mlp.linear_2.",
        "encoder/norm": "encoder.ln.",
        "head/pre_logits": "heads.pre_logits.",
        "head/logits": "heads.head.",
    },
)

BEIT = Naming(
    LABEL="Hugging Face's naming of BEiT",
    BLOCK=r"(?:encoder\.layer|layers)\.\d+\.(?:attention|layernorm_before)\.",
    INNER=("beit", "data2vec_vision"),
    embedding=r"(?:encoder\.layer|layers)\.\d+\.(?:lambda_1$|.*relative_position_bias\.)",
    family="Hugging Face's BEiT",
    block="encoder.layer.{}.|layers.{}.",
    names={
        "embedding/projection": "embeddings.patch_embeddings.projection.",
        "class_token": "embeddings.cls_token",
        "positions/table": "embeddings.position_embeddings",
        "positions": f"encoder.relative_position_bias.{TABLE}|shared_position_bias.{TABLE}",
        "block/positions": f"attention.attention.relative_position_bias.{TABLE}|relative_position_bias.{TABLE}",
        "block/norm_attention": "layernorm_before.",
        "block/attention/qkv": "attention.attention.query. attention.attention.key. attention.attention.value.|"
        "attention.q_proj. attention.k_proj. attention.v_proj.",
        "block/attention/out": "attention.output.dense.|attention.o_proj.",
        "block/scale_attention/scale": "lambda_1",
        "block/norm_mlp": "layernorm_after.",
        "block/mlp/up": "intermediate.dense.|mlp.fc1.",
        "block/mlp/down": "output.dense.|mlp.fc2.",
        "block/scale_mlp/scale": "lambda_2",
        "encoder/norm": "layernorm.",
        "norm": "pooler.layernorm.",
        "head/logits": "classifier.",
    },
    optional="head/.*|positions.*|block/positions|encoder/norm|norm",
    epsilon=1e-12,
    recorded=_recorded(("beit", "data2vec-vision"), num_attention_heads=12, hidden_act="gelu", layer_norm_eps=1e-12),
)
AIMV2 = Naming(
    LABEL="Hugging Face's naming of AIMv2",
    BLOCK=r"encoder\.layers\.\d+\.(?:attention|rms_norm1)\.",
    INNER=("vision_model",),
    embedding=r"embeddings\.patch_embed\.",
    family="Hugging Face's AIMv2",
    block="encoder.layers.{}.",
    names={
        "embedding/projection": "embeddings.patch_embed.",
        "positions/table": "embeddings.position_embedding.weight",
        "norm_input": "embeddings.rms_norm.",
        "block/norm_attention": "rms_norm1.",
        "block/attention/qkv": "attention.q_proj. attention.k_proj. attention.v_proj.",
        "block/attention/out": "attention.out_proj.",
        "block/norm_mlp": "rms_norm2.",
        "block/mlp/gate_up": "ffn.gate_proj. ffn.up_proj.",
        "block/mlp/down": "ffn.down_proj.",
        "encoder/norm": "rms_norm.",
    },
    biasless=r"encoder/block_\d+/(attention/out|mlp/\w+)",
    refused={"head.": "its attention pooling does not project the query"},
    fields={"norm": "rms", "input_norm": "patches"},
    epsilon=1e-5,
    heads={1024: 8, 1536: 12, 2048: 16, 3072: 24},
    recorded=_recorded(
        ("aimv2", "aimv2_vision_model"),
        {"is_native": False},
        num_attention_heads=8,
        hidden_act="silu",
        layer_norm_eps=1e-5,
    ),
)
INTERNVL = Naming(
    LABEL="Hugging Face's naming of InternVL",
    BLOCK=r"(?:encoder\.layer|layers)\.\d+\.(?:attention|layernorm_before)\.",
    INNER=("vision_tower",),
    embedding=r"encoder\.layer\.\d+\.attention\.projection_layer\.",
    family="InternViT",
    block="encoder.layer.{}.",
    names={
        **{
            key: name
            for key, name in BEIT.names.items()
            if "positions" not in key and key not in ("norm", "head/logits")
        },
        "positions/table": "embeddings.position_embeddings",
        "block/attention/qkv": "attention.q_proj. attention.k_proj. attention.v_proj.",
        "block/attention/out": "attention.projection_layer.",
        "block/mlp/up": "mlp.fc1.",
        "block/mlp/down": "mlp.fc2.",
    },
    optional="encoder/norm",
    recorded=_recorded(
        ("internvl", "internvl_vision"),
        {"norm_type": "layer_norm", "use_qk_norm": False},
        num_attention_heads=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    ),
)
INTERNVIT = dataclasses.replace(
    INTERNVL,
    LABEL="InternViT's naming",
    BLOCK=r"encoder\.layers\.\d+\.attn\.",
    INNER=("vision_model",),
    embedding=r"embeddings\.class_embedding$",
    block="encoder.layers.{}.",
    names={
        "embedding/projection": "embeddings.patch_embedding.",
        "class_token": "embeddings.class_embedding",
        "positions/table": "embeddings.position_embedding",
        "block/norm_attention": "norm1.",
        "block/attention/qkv": "attn.qkv.",
        "block/attention/out": "attn.proj.",
        "block/scale_attention/scale": "ls1",
        "block/norm_mlp": "norm2.",
        "block/mlp/up": "mlp.fc1.",
        "block/mlp/down": "mlp.fc2.",
        "block/scale_mlp/scale": "ls2",
    },
    optional="(?!)",
    recorded=_recorded(
        ("internvl_chat", "intern_vit_6b"),
        {"norm_type": "layer_norm", "qk_normalization": False},
        num_attention_heads=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    ),
)

NAMINGS = (CLIP, SIGLIP, OPENAI, DINOV3, TORCHVISION, AIMV2, INTERNVL, INTERNVIT, BEIT)
