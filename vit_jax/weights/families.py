"""Mean and std of the images of well-known models, for files that do not record them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_jax.data import normalization
from vit_jax.data.normalization import Statistics
from vit_jax.weights.describe import config_value
from vit_jax.weights.files import Stored

OPTIONS = "--normalize or config.data.normalization"

# Where to look, a pattern, the normalization, and whose it is; the first row that matches decides. The JSON files say
# the most, arrays more than names, which anyone may have given. No word is part of another: 'dino' is not 'dinosaur'.
FAMILIES: tuple[tuple[str, str, str, str], ...] = (
    ("type", r"dino", "imagenet", "DINO, DINOv2 and DINOv3 (Meta)"),
    ("type", r"deit", "imagenet", "DeiT and DeiT III (Meta)"),
    ("type", r"mae(?![a-z])", "imagenet", "MAE (Meta)"),
    ("type", r"i-?jepa", "imagenet", "I-JEPA (Meta)"),
    ("type", r"msn", "imagenet", "MSN (Meta)"),
    ("type", r"siglip|augreg|orig_in21k|sam_in1k|google/", "half", "SigLIP, AugReg and ViT (Google)"),
    ("type", r"intern", "imagenet", "InternViT (OpenGVLab)"),
    ("type", r"clip", "clip", "CLIP (OpenAI)"),
    ("array", r"dist(illation)?_token$", "imagenet", "DeiT (Meta), with its distillation token"),
    ("array", r"(^|\.)(relative_position_bias_table|lambda_\d)$", "half", "BEiT (Microsoft) and data2vec (Meta)"),
    ("array", r"(^|\.)(ls\d\.gamma|layer_scale\d|gamma_\d$)", "imagenet", "DINOv2, DINOv3 and DeiT III (Meta)"),
    ("array", r"(^|\.)(dino_head|ibot_head|dino_loss|head\.last_layer)\.", "imagenet", "DINO and iBOT"),
    ("array", r"(^|\.)decoder(_blocks|_embed|\.decoder_)", "imagenet", "MAE (Meta), with its decoder"),
    ("array", r"(^|\.)(ijepa|vit_msn|deit)\.", "imagenet", "I-JEPA, MSN and DeiT (Meta)"),
    ("array", r"(^|\.)ls\d$", "imagenet", "InternViT (OpenGVLab)"),
    ("array", r"(^|\.)encoder_layer_\d+\.", "imagenet", "torchvision's ViT"),
    ("array", r"(^|\.)(norm_pre|ln_pre|pre_layrnorm)\.", "clip", "CLIP (OpenAI)"),
    ("array", r"(^|\.)(rms_norm1|patch_embed\.norm)\.", "clip", "AIMv2 (Apple)"),
    ("array", r"(^|\.)attn\.(q_bias$|q_proj\.)", "clip", "EVA and EVA-02 (BAAI)"),
    ("array", r"(^|\.)(attn_pool\.|vision_model\.head\.|MAPHead_0/)", "half", "SigLIP (Google)"),
    ("name", r"(?<![a-z])(dino(v\d)?|deit\d?|mae|i-?jepa|msn|ibot)(?![a-z])", "imagenet", "models of Meta"),
    ("name", r"(?<![a-z])(siglip\d?|augreg|google|big_vision)(?![a-z])|in21k", "half", "models of Google"),
    ("name", r"(?<![a-z])(open)?clip(?![a-z])", "clip", "CLIP (OpenAI)"),
)


def statistics(stored: Stored, names: tuple[str, ...], channels: int) -> tuple[Statistics, str]:
    """Returns the mean and std of the family that a file belongs to, else 0.5; and a line on what was assumed and why.

    Args:
        stored: the file.
        names: what it is called, as the user and its directories do.
        channels: number of channels of the images.
    """
    found = {"type": tuple(_types(stored.config or {})), "array": tuple(sorted(stored.shapes)), "name": names}
    for where, pattern, normalized, whose in FAMILIES:
        match = next(
            (text for text in found[where] if re.search(pattern, text, re.IGNORECASE * (where != "array"))), None
        )
        if match is not None and (normalized == "half" or channels == 3):
            why = f"{normalized}, as for {whose}, by its {where} {match!r}"
            break
    else:
        normalized, why = "half", "half, since nothing tells its family"
    line = f"mean and std of its images are not recorded; assumed: {why}; {OPTIONS} sets another"
    return normalization.constants(normalized, channels), line


def names_of(path: Path, source: str) -> tuple[str, ...]:
    """Returns what a file is called: by the user, by its directory and in the cache of the hub, without its parents."""
    cached = [part for part in path.parts if part.startswith(("models--", "timm--"))]
    own = Path(source).parts[-2:]
    return tuple(dict.fromkeys((*own, path.parent.name, path.name, *cached)))


def _types(config: dict[str, Any]) -> Iterator[str]:
    """The kinds of model that a config.json names: timm's architecture and tag, Hugging Face's model_type and classes.

    Our own exports name one of timm's architectures whatever the model is.
    """
    if "layer_norm_epsilon" in config and "architecture" in config:
        return
    inner = config_value(config, "pretrained_cfg", dict) or {}
    vision = [config.get(key) for key in ("vision_config", "encoder", "backbone_config")]
    for part in (config, inner, *(one for one in vision if isinstance(one, dict))):
        texts = [part.get(key) for key in ("architecture", "model_type", "tag", "hf_hub_id", "_name_or_path")]
        yield from (text for text in texts if isinstance(text, str))
