"""The arrays of timm's Vision Transformers as rules, for all parts and spellings; `timm` recognizes these in a file."""

import dataclasses

import numpy as np

from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import rules
from vit_jax.weights.rules import Arrays, Form, Parts, Rule, dense, norm

STEMS = ("patch_embed.backbone.stem.", "patch_embed.backbone.")  # with stages after it, and without
TABLE = "relative_position_bias_table"


@dataclasses.dataclass(frozen=True)
class Spelling:
    """The names that differ between files of this kind.

    Attributes:
        stem: start of the names of the first convolution and norm, if there is a stem.
        registers: name of the tokens between class token and patches.
        scale: name of a block's LayerScale; '{}' stands for 1 or 2.
        mlp: 'fc1' (GELU), or for SwiGLU 'packed' (fc1 holds gate and up), 'apart' (fc1_g, fc1_x), 'w12', or 'w1' (w1
            and w2).
        norm: start of the names of the final norm.
        rows: rows of the position embedding before those of patches: 'none', 'class' or 'all'.
        qkv: 'fused' (attn.qkv), or 'apart' (attn.q_proj, ...).
        bias: of attn.qkv: 'fused', 'masked' (with bias_mask), or 'query_value' (attn.q_bias, attn.v_bias).
        interleaved: whether a rotation turns neighbouring channels, instead of channels half a head apart.
        relative: the grid of a relative position embedding of each block, or of the one that all share; None for none.
        shared: whether all blocks share it.
        heads: 'one', or 'two' (head, head_dist), whose logits are averaged.
    """

    stem: str = "patch_embed.backbone.stem."
    registers: str = "reg_token"
    scale: str = "ls{}.gamma"
    mlp: str = "fc1"
    norm: str = "norm."
    rows: str = "class"
    qkv: str = "fused"
    bias: str = "fused"
    interleaved: bool = False
    relative: tuple[int, int] | None = None
    shared: bool = False
    heads: str = "one"


def make_rules(parts: Parts, spelling: Spelling, head_size: int) -> list[Rule]:
    """The rules of a file with these parts and names; `head_size` is the number of channels per attention head."""
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
    if spelling.relative is not None and spelling.shared:
        table += [_relative_rule("rel_pos_bias.", "", spelling.relative)]
    if parts.input_norm is not None:
        start = {"tokens": "norm_pre.", "patches": "patch_embed.norm."}[parts.input_norm]
        table += norm(start, "norm_input", kind=parts.norm)
    for index in range(parts.depth):
        table += _block_rules(f"blocks.{index}.", f"encoder/block_{index}", parts, spelling, head_size)
    if parts.final_norm:
        table += norm(spelling.norm, "norm" if parts.norm_after_pooling else "encoder/norm", kind=parts.norm)
    if parts.map:
        table += _map_rules("attn_pool.")
    return table + _head_rules(parts, spelling)


def _head_rules(parts: Parts, spelling: Spelling) -> list[Rule]:
    if not parts.head:
        return []
    if spelling.heads == "two":
        forms, names = (rules.MEAN_OF_HEADS, rules.MEAN_OF_BIASES), ("head", "head_dist")
        return dense("{}.", "head/logits", *forms, names)
    table = dense("head.", "head/logits", rules.LINEAR)
    return table + (dense("pre_logits.fc.", "head/pre_logits", rules.LINEAR) if parts.pre_logits else [])


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


def _block_rules(name: str, path: str, parts: Parts, spelling: Spelling, head_size: int) -> list[Rule]:
    table = norm(f"{name}norm1.", f"{path}/norm_attention", kind=parts.norm)
    if spelling.relative is not None and not spelling.shared:
        table += [_relative_rule(f"{name}attn.", f"{path}/", spelling.relative)]
    table += _qkv_rules(f"{name}attn.", f"{path}/attention", parts, spelling, head_size)
    if parts.attention_norm:
        table += norm(f"{name}attn.norm.", f"{path}/attention/norm", kind=parts.norm)
    table += dense(f"{name}attn.proj.", f"{path}/attention/out", rules.LINEAR)
    table += norm(f"{name}norm2.", f"{path}/norm_mlp", kind=parts.norm)
    up = f"{path}/mlp/{'up' if parts.mlp == 'gelu' else 'gate_up'}"
    pairs = {"apart": ("fc1_g", "fc1_x"), "w1": ("w1", "w2")}
    if spelling.mlp in pairs:
        forms = rules.fused_linear(2), rules.fused_vectors(2)
        table += dense(f"{name}mlp.{{}}.", up, *forms, pairs[spelling.mlp])
    else:
        table += dense(f"{name}mlp.{'w12' if spelling.mlp == 'w12' else 'fc1'}.", up, rules.LINEAR)
    if parts.mlp_norm:
        table += norm(f"{name}mlp.norm.", f"{path}/mlp/norm", kind=parts.norm)
    table += dense(f"{name}mlp.{'w3' if spelling.mlp in ('w12', 'w1') else 'fc2'}.", f"{path}/mlp/down", rules.LINEAR)
    if parts.layer_scale:
        for number, branch in (("1", "attention"), ("2", "mlp")):
            scale = name + spelling.scale.replace("{}", number)
            table += [Rule((scale,), (f"{path}/scale_{branch}/scale",), rules.SAME)]
    return table


def _qkv_rules(name: str, path: str, parts: Parts, spelling: Spelling, head_size: int) -> list[Rule]:
    def ordered(form: Form, parts: int = 3) -> Form:
        return rules.deinterleaved(form, head_size, parts) if spelling.interleaved else form

    kernel, biases = f"{path}/qkv/kernel", (f"{path}/qkv/bias",)
    if spelling.qkv == "apart":
        names = tuple(f"{name}{part}_proj.weight" for part in "qkv")
        table = [Rule(names, (kernel,), ordered(rules.fused_linear(3)))]
        bias = (f"{name}q_proj.bias", f"{name}v_proj.bias"), rules.QUERY_VALUE_BIASES
    else:
        table = [Rule((f"{name}qkv.weight",), (kernel,), ordered(rules.LINEAR))]
        bias = {
            "fused": ((f"{name}qkv.bias",), rules.SAME),
            "masked": ((f"{name}qkv.bias", f"{name}qkv.bias_mask"), rules.MASKED_BIAS),
            "query_value": ((f"{name}q_bias", f"{name}v_bias"), rules.QUERY_VALUE_BIASES),
        }[spelling.bias]
    if parts.qkv_bias:
        table += [Rule(bias[0], biases, ordered(bias[1]))]
    if parts.qk_norm:
        form = ordered(rules.SAME, 1)
        table += norm(f"{name}q_norm.", f"{path}/norm_queries", form, parts.norm)
        table += norm(f"{name}k_norm.", f"{path}/norm_keys", form, parts.norm)
    return table


def relative_grid(rows: int, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of patches of a relative position embedding with this many biases; None if there are none.

    Args:
        rows: number of biases per head: for each offset between two patches, and three of the class token.
        size: rows and columns, if they are known; None for a square.
    """
    side = int(round((rows - 3) ** 0.5 + 1) // 2) if rows > 3 else 0
    grids = [grid for grid in (size, (side, side)) if grid is not None]
    return next((grid for grid in grids if (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 == rows), None)


def _relative_rule(name: str, path: str, grid: tuple[int, int]) -> Rule:
    paths = (f"{path}positions/offsets", f"{path}positions/class")
    return Rule((f"{name}{TABLE}",), paths, relative_table(grid))


def relative_table(grid: tuple[int, int]) -> Form:
    """BEiT's table [biases, heads] <-> the parameters of `positions.RelativeWithClass`.

    Its rows are for offsets from the key to the query, ours from the query to the key; the last three are for the class
    token as a query, as a key, and as both.
    """
    shape = 2 * grid[0] - 1, 2 * grid[1] - 1

    def read(arrays: Arrays) -> list[np.ndarray]:
        offsets, extra = arrays[0][:-3], arrays[0][-3:]
        return [offsets.T.reshape(-1, *shape)[:, ::-1, ::-1], extra.T]

    def write(ours: Arrays, model: VisionTransformer) -> list[np.ndarray]:
        offsets, extra = ours
        return [np.concatenate([offsets[:, ::-1, ::-1].reshape(len(offsets), -1).T, extra.T])]

    return Form("reshaped", read, write)


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
