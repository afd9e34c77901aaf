"""Rules that convert a file's arrays into our parameters and back.

A naming convention (google, timm, huggingface) is a list of rules, made for the parts that a model has (`Parts`). The
same rules read and write, so that a file that is read and written again is equal bit for bit.
"""

import dataclasses
import re
from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np

from vit_jax.models.block_config import options_that_affect
from vit_jax.models.vit import VisionTransformer, position_at

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Form:
    """How the arrays of a rule are converted to our parameters, and back.

    Attributes:
        word: the action in a report: 'loaded', 'transposed', 'reshaped', 'fused' or 'split'.
        read: the file's arrays to our parameters, as views if possible.
        write: our parameters to the file's arrays; the model is needed for its patch size and heads.
    """

    word: str
    read: Callable[[Arrays], list[np.ndarray]]
    write: Callable[[Arrays, VisionTransformer], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The file's arrays `names` become, by `form`, our parameters `paths` ('encoder/block_0/mlp/up/kernel')."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    form: Form


@dataclasses.dataclass(frozen=True)
class Parts:
    """Which parameters a model has, whatever their sizes.

    Attributes:
        depth: number of blocks.
        class_token, registers, positions: whether there is a class token, registers, a learned table at the input.
        mlp: 'gelu' or 'swiglu'.
        qkv_bias, qk_norm: as in `VisionTransformer`.
        layer_scale: whether there is LayerScale.
        map: whether there is attention pooling.
        norm_after_pooling: as in `VisionTransformer`.
        head, pre_logits: whether there is a classifier, and a layer before it.
        stem, norm, input_norm, attention_norm, mlp_norm, final_norm: as in `VisionTransformer`.
    """

    depth: int
    class_token: bool = False
    registers: bool = False
    positions: bool = False
    mlp: str = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    map: bool = False
    norm_after_pooling: bool = False
    head: bool = False
    pre_logits: bool = False
    stem: tuple[int, ...] | None = None
    norm: str = "layer"
    input_norm: str | None = None
    attention_norm: bool = False
    mlp_norm: bool = False
    final_norm: bool = True

    @staticmethod
    def of(model: VisionTransformer) -> "Parts":
        """The parts of a model with a learned table of positions or none, and at most one head."""
        return Parts(
            depth=model.depth,
            class_token=model.class_token,
            registers=model.registers > 0,
            positions=model.position.startswith("learned"),
            mlp=model.mlp,
            qkv_bias=model.qkv_bias,
            qk_norm=model.qk_norm,
            layer_scale=model.layer_scale is not None,
            map=model.pooling == "map",
            norm_after_pooling=model.norm_after_pooling,
            head=model.classes is not None,
            pre_logits=model.classes is not None and model.pre_logits is not None,
            **{name: getattr(model, name) for name in ("stem", "norm", "input_norm", "attention_norm")},
            **{name: getattr(model, name) for name in ("mlp_norm", "final_norm")},
        )


def _one(word: str, read: Callable[[np.ndarray], np.ndarray], write: Callable) -> Form:
    return Form(word, lambda arrays: [read(arrays[0])], lambda ours, model: [write(ours[0], model)])


def _joined(arrays: Arrays, axis: int) -> np.ndarray:
    return np.concatenate(arrays, axis=axis)


SAME = _one("loaded", lambda array: array, lambda array, model: array)

# Vectors that other projects keep without our axis of the batch.
VECTOR = _one("reshaped", lambda array: array.reshape(1, 1, -1), lambda array, model: array.reshape(-1))
ROWS = _one("reshaped", lambda array: array.reshape(1, -1, array.shape[-1]), lambda array, model: array[0])

# torch.nn.Linear's weight is [outputs, inputs].
LINEAR = _one("transposed", lambda array: array.T, lambda array, model: array.T)

# torch.nn.Conv2d's weight is [outputs, inputs, height, width]; a patch is flattened row, column, channel.
PATCH_CONVOLUTION = _one(
    "transposed",
    lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]),
    lambda array, model: _as_patch(array, model).transpose(3, 2, 0, 1),
)
CONVOLUTION = _one(
    "transposed", lambda array: array.transpose(2, 3, 1, 0), lambda array, model: array.transpose(3, 2, 0, 1)
)
PATCH = _one("reshaped", lambda array: array.reshape(-1, array.shape[-1]), lambda array, model: _as_patch(array, model))

# In the published files, the scale of a GroupNorm is [1, 1, 1, channels].
CHANNELS = _one("reshaped", lambda array: array.reshape(-1), lambda array, model: array.reshape(1, 1, 1, -1))

# Flax's projections have an axis for the heads: [width, heads, size], and [heads, size, width] after attention.
HEADS = _one(
    "reshaped",
    lambda array: array.reshape(array.shape[0], -1),
    lambda array, model: array.reshape(array.shape[0], model.heads, -1),
)
HEADS_BIAS = _one("reshaped", lambda array: array.reshape(-1), lambda array, model: array.reshape(model.heads, -1))
HEADS_OUT = _one(
    "reshaped",
    lambda array: array.reshape(-1, array.shape[-1]),
    lambda array, model: array.reshape(model.heads, -1, array.shape[-1]),
)


def _as_patch(kernel: np.ndarray, model: VisionTransformer) -> np.ndarray:
    return kernel.reshape(model.patch_size, model.patch_size, -1, kernel.shape[-1])


def fused_heads(parts: int) -> Form:
    """Concatenates `parts` kernels [width, heads, size] to [width, parts * width]."""
    return Form(
        "fused",
        lambda arrays: [_joined([array.reshape(array.shape[0], -1) for array in arrays], 1)],
        lambda ours, model: [part.reshape(part.shape[0], model.heads, -1) for part in np.split(ours[0], parts, axis=1)],
    )


def fused_heads_bias(parts: int) -> Form:
    """Concatenates `parts` biases [heads, size]."""
    return Form(
        "fused",
        lambda arrays: [_joined([array.reshape(-1) for array in arrays], 0)],
        lambda ours, model: [part.reshape(model.heads, -1) for part in np.split(ours[0], parts)],
    )


def fused_linear(parts: int) -> Form:
    """Concatenates `parts` weights of torch.nn.Linear, transposed."""
    return Form(
        "fused",
        # Concatenated in the file's layout and then transposed as a view, which is the fastest copy.
        lambda arrays: [_joined(arrays, 0).T],
        lambda ours, model: [part.T for part in np.split(ours[0], parts, axis=1)],
    )


def fused_vectors(parts: int) -> Form:
    """Concatenates `parts` vectors."""
    return Form("fused", lambda arrays: [_joined(arrays, 0)], lambda ours, model: np.split(ours[0], parts))


def _without_keys(ours: Arrays, model: VisionTransformer) -> list[np.ndarray]:
    queries, _, values = np.split(ours[0], 3)
    return [queries, values]


# Biases of queries and values; a bias of keys changes no attention weight, so that these models have none.
QUERY_VALUE_BIASES = Form(
    "fused", lambda arrays: [np.concatenate([arrays[0], np.zeros_like(arrays[0]), arrays[1]])], _without_keys
)

# A bias and a mask of ones and zeros, which removes that of the keys.
MASKED_BIAS = Form(
    "fused", lambda arrays: [arrays[0] * arrays[1]], lambda ours, model: [ours[0], (ours[0] != 0).astype(np.float32)]
)

# Two linear heads, on two tokens, whose logits are averaged: one head on both tokens.
MEAN_OF_HEADS = Form(
    "fused",
    lambda arrays: [np.concatenate([array.T for array in arrays], axis=0) / 2],
    lambda ours, model: [2 * part.T for part in np.split(ours[0], 2, axis=0)],
)
MEAN_OF_BIASES = Form("fused", lambda arrays: [(arrays[0] + arrays[1]) / 2], lambda ours, model: [ours[0], ours[0]])

# torch.nn.MultiheadAttention's in_proj_weight (or in_proj_bias): queries apart from keys and values.
QUERY_APART = Form(
    "split",
    lambda arrays: [part.T for part in np.split(arrays[0], [len(arrays[0]) // 3])],
    lambda ours, model: [_joined([part.T for part in ours], 0)],
)


def deinterleaved(form: Form, size: int, parts: int = 3) -> Form:
    """The form followed by a permutation of each head's channels, of queries and keys alike.

    A rotary position embedding turns pairs of channels: neighbouring ones (2i, 2i + 1) in some projects, i and
    i + size / 2 here. Attention weights do not depend on the order of the channels.

    Args:
        form: whose result has the channels of `parts` x heads x `size` in its last axis: queries, keys, values.
        size: channels per head.
        parts: 3, or 1 for an array of queries or keys alone.
    """
    halves = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])

    def order(count: int) -> np.ndarray:
        channels = np.arange(count).reshape(parts, -1, size)
        channels[:2] = channels[:2, :, halves]
        return channels.reshape(-1)

    def read(arrays: Arrays) -> list[np.ndarray]:
        return [value[..., order(value.shape[-1])] for value in form.read(arrays)]

    def write(ours: Arrays, model: VisionTransformer) -> list[np.ndarray]:
        return form.write([value[..., np.argsort(order(value.shape[-1]))] for value in ours], model)

    return Form(form.word, read, write)


# A table without a row for the class token equals one with a row of zeros.
CLASS_ROW = Form(
    "loaded",
    lambda arrays: [np.concatenate([np.zeros_like(arrays[0][:, :1]), arrays[0]], axis=1)],
    lambda ours, model: [ours[0][:, 1:]],
)


def with_register_rows(class_row: bool) -> Form:
    """Registers and a table with rows for them <-> registers with their rows added, and a table without these rows.

    Registers of our models have no position embedding, so the rows are added to the registers themselves, which gives
    the same model. When written, these rows are zeros: a file with other rows does not come back bit for bit.
    """
    first = int(class_row)

    def read(arrays: Arrays) -> list[np.ndarray]:
        tokens, table = arrays
        end = first + tokens.shape[1]
        return [tokens + table[:, first:end], np.concatenate([table[:, :first], table[:, end:]], axis=1)]

    def write(ours: Arrays, model: VisionTransformer) -> list[np.ndarray]:
        tokens, table = ours
        return [tokens, np.concatenate([table[:, :first], np.zeros_like(tokens), table[:, first:]], axis=1)]

    return Form("loaded", read, write)


def scanned(rule: Rule, depth: int) -> Rule:
    """The rule for arrays that hold all blocks along a first axis, from the rule for block 0."""

    def read(arrays: Arrays) -> list[np.ndarray]:
        return [one for index in range(depth) for one in rule.form.read([array[index] for array in arrays])]

    def write(ours: Arrays, model: VisionTransformer) -> list[np.ndarray]:
        blocks = [rule.form.write([one], model) for one in ours]
        return [np.stack(arrays) for arrays in zip(*blocks, strict=True)]

    paths = tuple(path.replace("/block_0/", f"/block_{index}/") for index in range(depth) for path in rule.paths)
    return Rule(rule.names, paths, Form("split" if rule.form.word == "loaded" else rule.form.word, read, write))


def unsupported(model: VisionTransformer, supported: Mapping[str, tuple | None]) -> list[str]:
    """What a model uses that a naming convention cannot express, as 'option=value'.

    Any option that affects parameters or function and is not listed has to have its default value, so that a new
    option is refused until a convention supports it.

    Args:
        model: the model.
        supported: for each option the values that can be written; None for all values.
    """
    found = []
    for name in options_that_affect(model, "parameters", "function"):
        value = position_at(model) if name == "position_at" else getattr(model, name)
        allowed = supported.get(name, ("input" if name == "position_at" else getattr(type(model), name, None),))
        if allowed is not None and value not in allowed:
            found.append(f"{name}={value!r}")
    return found + (["several heads"] if isinstance(model.classes, Mapping) else [])


# Options whose every value is in the shapes of a file's arrays, whatever the convention.
SIZES = dict.fromkeys(("patch_size", "width", "depth", "heads", "mlp_width", "class_token"))


def written(rules: Sequence[Rule], ours: Mapping[str, np.ndarray], model: VisionTransformer) -> dict[str, np.ndarray]:
    """All arrays of a file by name, from all our parameters by path."""
    arrays = {}
    for rule in rules:
        arrays.update(zip(rule.names, rule.form.write([ours[path] for path in rule.paths], model), strict=True))
    return arrays


def dense(names: str, path: str, kernel: Form, bias: Form = SAME, parts: Sequence[str] = ("",)) -> list[Rule]:
    """The rules of a dense layer.

    Args:
        names: the start of the arrays' names, up to 'kernel' or 'bias' if it ends in '/' (Flax), up to 'weight' or
            'bias' if it ends in '.' (PyTorch); '{}' is replaced by each of `parts`.
        path: of our layer.
        kernel: conversion of the kernel.
        bias: conversion of the bias.
        parts: names of the parts that are fused into our layer.
    """
    first = "kernel" if names.endswith("/") else "weight"
    return [
        Rule(tuple(names.replace("{}", part) + first for part in parts), (f"{path}/kernel",), kernel),
        Rule(tuple(names.replace("{}", part) + "bias" for part in parts), (f"{path}/bias",), bias),
    ]


def norm(name: str, path: str, form: Form = SAME, kind: str = "layer") -> list[Rule]:
    """The rules of a LayerNorm or GroupNorm, scale (PyTorch: weight) and bias; of kind 'rms', the scale alone."""
    first = "scale" if name.endswith("/") else "weight"
    scale, bias = Rule((f"{name}{first}",), (f"{path}/scale",), form), Rule((f"{name}bias",), (f"{path}/bias",), form)
    return [scale] if kind == "rms" else [scale, bias]


def without_absent(table: Sequence[Rule], names: Container[str], optional: str) -> tuple[list[Rule], dict[str, str]]:
    """The rules without those of biases that the file's layers do not have, and the paths of these, with the reason.

    A layer without a bias equals one whose bias is zero. A bias that only some blocks have is missing, not absent.

    Args:
        table: rules, each of one bias or of no bias.
        names: of the file's arrays.
        optional: pattern of the paths, up to '/bias', of layers that may have none.
    """
    biases = [rule for rule in table if re.fullmatch(f"(?:{optional})/bias", rule.paths[0])]
    kinds = {_kind(rule) for rule in biases if any(name in names for name in rule.names)}
    absent = [rule for rule in biases if _kind(rule) not in kinds]
    zeros = {rule.paths[0]: "the file's layers have no such bias" for rule in absent}
    return [rule for rule in table if rule.paths[0] not in zeros], zeros


def _kind(rule: Rule) -> str:
    """The path of a rule's parameter, whatever the block."""
    return re.sub(r"\d+", "N", rule.paths[0])
