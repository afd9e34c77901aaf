"""Arrays in files of weights that belong to no Vision Transformer that we read: why they are ignored, or refused.

All patterns are searched in names with dots between their parts ('teacher.head.mlp.0.weight'); a name of Google's
('params/txt/...') is written with dots for this.
"""

import difflib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from vit_jax.errors import UserError

_START, _END = r"(?:^|\.)", r"(?:\.|$)"

# Of an optimizer, whose arrays have the names of the parameters.
OPTIMIZER = (
    rf"{_START}(?:opt(?!\.target\.)|optim\w*|opt_state|exp_avg(?:_sq)?|momentum_buffer|param_states|mu|nu|"
    rf"(?:lr_)?schedulers?|\w*scaler){_END}"
)

# Other arrays that files of models may have, and why they are ignored. The first pattern that is found decides.
IGNORED = {
    OPTIMIZER: "optimizer state",
    rf"^(?:extra|state|rng|callbacks|loops){_END}|{_START}(?:steps?|global_step|epoch|iteration|iter|num_updates|updates|"
    rf"n_averaged|num_batches_tracked|decay|initted|count|lr|loss|acc|best_\w+)$|"
    rf"{_START}(?:\w+_)?rng_states?{_END}": "training state",
    rf"{_START}(?:txt|text|text_\w+|textual|language_model|token_embedding|ln_final){_END}|"
    r"^(?:params\.)?(?:transformer\.resblocks\.|positional_embedding$|attn_mask$)": "the text tower",
    rf"{_START}(?:input_resolution|context_length|vocab_size)$": "a number that OpenAI's CLIP keeps with its arrays",
    rf"{_START}(?:position_ids|relative_position_index)$": "indices of positions, which the model computes",
    rf"{_START}(?:logit_scale|logit_bias|params\.(?:t|b|temperature|bias))$": "a parameter of the contrastive loss",
    rf"{_START}(?:mask_token|masked_embed|mask_embedding)$": "only used in masked pre-training",
    rf"{_START}(?:decoder\w*|regressor|enc_to_dec_proj){_END}": "a decoder",
    rf"{_START}(?:(?:dino|ibot|projection|proj|prediction|contrastive)_?head|(?:\w+_)?projector|visual_projection|"
    rf"(?:\w+_)?predictor|prototypes|head\.(?:mlp|last_layer\w*)){_END}": "a head of pre-training",
    rf"{_START}shadow\w*{_END}|^\w*ema\.[^.]+$": "a moving average whose arrays have lost their names",
    rf"{_START}(?:\w+_loss|criterion|loss_fn|center2?|queue\w*){_END}": "a buffer of the loss",
}

# A classifier that is not part of a model, by the name of its arrays.
_CLASSIFIER = (
    r"(?:\w*heads?\d*|classifiers?\d*|cls|fc|lin|linear|linear_\w+|\w*probe)\.(?:\w+\.)?"
    r"(?:weight|bias|running_mean|running_var)"
)

# Models that are not supported, by the names of some of their arrays.
UNSUPPORTED = {
    r"layers\.\d+\.blocks\.\d+\.": "a Swin Transformer",
    r"relative_position_bias_table|rel_pos(?:_[hw]$|\.)": "a model with relative positions",
    r"(?:^|\.)rope\w*\.": "a model with rotary positions",
    r"blocks\.\d+\.attn\.[qv]_bias$": "a BEiT or EVA of timm",
    r"(?:^|\.)stages\.\d+\.blocks\.\d+\.conv_dw\.": "a ConvNeXt",
    r"(?:^|\.)attnpool\.": "a ResNet of CLIP",
    r"(?:^|\.)layer4\.\d+\.conv\d\.": "a ResNet",
    r"(?:^|\.)layer\.\d+\.attention\..*\.kernel$": "a Flax model in Hugging Face's naming",
    r"encoder\.(?:block_\d+|blocks)\.attention\.qkv\.kernel$": "a run of vit_jax, without its config",
}

_LORA = r"(?:^|\.)(?:lora_\w+|base_layer)(?:\.|$)"
_QUANTISED = r"\.(?:SCB|absmax|quant_map|quant_state\S*|qweight|qzeros|g_idx|weight_scale|weight_zero_point)$"


def dotted(name: str) -> str:
    """The name with dots between its parts."""
    return name.replace("/", ".")


def why_ignored(name: str, shape: tuple[int, ...], dtype: np.dtype) -> str | None:
    """Why an array that is not of a model is ignored; None if no reason is known."""
    for pattern, why in IGNORED.items():
        if re.search(pattern, dotted(name)):
            return why
    if 0 in shape and dotted(name).endswith("register_tokens"):
        return "empty: the model has no registers"
    # Parameters are floating-point numbers.
    return "a counter" if dtype.kind in "iub" and shape in ((), (1,)) else None


def is_classifier(name: str) -> bool:
    """Whether an array outside a model is of a classifier, by its name below what both have in common."""
    return re.fullmatch(_CLASSIFIER, dotted(name)) is not None


def refuse_parts(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype]) -> None:
    """Raises UserError if arrays are of a LoRA adapter, or quantized; names one."""
    for name, shape in shapes.items():
        if re.search(_LORA, dotted(name)):
            raise UserError(
                f"{name} is of a LoRA adapter, which changes another model\n"
                "  merge it into its base model and give that file (peft: merge_and_unload, then save_pretrained)"
            )
        integers = dtypes[name].kind in "iu" and len(shape) > 1 and name.endswith(("weight", "kernel"))
        if re.search(_QUANTISED, name) or integers or dtypes[name].name.startswith("float8"):
            raise UserError(
                f"{name} is {dtypes[name]}: parameters must be floating-point numbers, not quantized\n"
                "  give the model's file in float32, float16 or bfloat16"
            )


def kind(names: Iterable[str]) -> str | None:
    """What unsupported model has such names; None if none is known."""
    names = [dotted(name) for name in names]
    return next(
        (what for pattern, what in UNSUPPORTED.items() if any(re.search(pattern, name) for name in names)), None
    )


def hint(missing: Iterable[str], left: Iterable[str], known: Iterable[str] = ()) -> str:
    """A last line for the message about missing and unexpected names; '' if there is nothing true to say.

    Args:
        missing: names that the model needs and the file lacks.
        left: names of the file that the model has no use for.
        known: names that such a file may have, but lacks.
    """
    left = sorted(left)
    what = kind(left)
    if what is not None:
        return f"\n  the names are those of {what}, which is not supported"
    for wanted in (*missing, *known):
        for name in left:
            if _resemble(wanted, name):
                return f"\n  {name} looks like {wanted} renamed"
    return ""


def _resemble(one: str, other: str) -> bool:
    """Whether two names differ in one part only, and there by a few letters."""
    parts = list(zip(re.split("[./]", one), re.split("[./]", other), strict=False))
    different = [pair for pair in parts if pair[0] != pair[1]]
    if len(different) != 1 or len(re.split("[./]", one)) != len(re.split("[./]", other)):
        return False
    first, second = different[0]
    digits = first.isdigit() or second.isdigit()
    return not digits and difflib.SequenceMatcher(None, first, second).ratio() > 0.75
