"""What stands between a file's arrays and ours: a rule each, which goes both ways.

A family of files (google, timm, huggingface) is a table of rules made of what a model consists of (`Parts`): the same
table reads and writes, and so what is written is what was read, bit for bit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vit_jax.models.vit import VisionTransformer

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Form:
    """How the arrays of a rule become ours, and back.

    Attributes:
        word: for the report: 'taken', 'transposed', 'reshaped', 'fused' or 'split'.
        read: the file's arrays to ours, views where they can be.
        write: ours to the file's, for a model (which knows patch size and heads).
    """

    word: str
    read: Callable[[Arrays], list[np.ndarray]]
    write: Callable[[Arrays, VisionTransformer], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The file's arrays `names`, as `form` has it, are our parameters `paths` ('encoder/block_0/mlp/up/kernel')."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    form: Form


@dataclasses.dataclass(frozen=True)
class Parts:
    """Which parameters a model has, whatever their sizes.

    Attributes:
        depth: blocks.
        class_token, registers, positions: whether there is such a token, such tokens, a learned table at the input.
        mlp: 'gelu' or 'swiglu'.
        qkv_bias, qk_norm, layer_scale: as in `VisionTransformer`; the last, whether there is one.
        map: whether attention pools.
        norm_after_pooling: as in `VisionTransformer`.
        head, pre_logits: whether there is a classifier, and a layer before it.
        stem: as in `VisionTransformer`.
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

    @staticmethod
    def of(model: VisionTransformer) -> "Parts":
        """Those of a model with a plain table of positions, or none, and one head at most."""
        return Parts(
            depth=model.depth,
            class_token=model.class_token,
            registers=model.registers > 0,
            positions=model.position == "learned",
            mlp=model.mlp,
            qkv_bias=model.qkv_bias,
            qk_norm=model.qk_norm,
            layer_scale=model.layer_scale is not None,
            map=model.pooling == "map",
            norm_after_pooling=model.norm_after_pooling,
            head=model.classes is not None,
            pre_logits=model.classes is not None and model.pre_logits is not None,
            stem=model.stem,
        )


def _one(word: str, read: Callable[[np.ndarray], np.ndarray], write: Callable) -> Form:
    return Form(word, lambda arrays: [read(arrays[0])], lambda ours, model: [write(ours[0], model)])


def _joined(arrays: Arrays, axis: int) -> np.ndarray:
    return np.concatenate(arrays, axis=axis)


SAME = _one("taken", lambda array: array, lambda array, model: array)

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

# The published files have the scale of a GroupNorm as [1, 1, 1, channels].
CHANNELS = _one("reshaped", lambda array: array.reshape(-1), lambda array, model: array.reshape(1, 1, 1, -1))

# Flax has a product's heads as axes of their own: [width, heads, size], and [heads, size, width] behind the mixture.
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
    """`parts` kernels [width, heads, size] side by side: [width, parts * width]."""
    return Form(
        "fused",
        lambda arrays: [_joined([array.reshape(array.shape[0], -1) for array in arrays], 1)],
        lambda ours, model: [part.reshape(part.shape[0], model.heads, -1) for part in np.split(ours[0], parts, axis=1)],
    )


def fused_heads_bias(parts: int) -> Form:
    """`parts` biases [heads, size] behind each other."""
    return Form(
        "fused",
        lambda arrays: [_joined([array.reshape(-1) for array in arrays], 0)],
        lambda ours, model: [part.reshape(model.heads, -1) for part in np.split(ours[0], parts)],
    )


def fused_linear(parts: int) -> Form:
    """`parts` weights of torch.nn.Linear side by side, transposed."""
    return Form(
        "fused",
        # Joined as they lie in the file and only then seen the other way round: the fastest copy there is.
        lambda arrays: [_joined(arrays, 0).T],
        lambda ours, model: [part.T for part in np.split(ours[0], parts, axis=1)],
    )


def fused_vectors(parts: int) -> Form:
    """`parts` vectors behind each other."""
    return Form("fused", lambda arrays: [_joined(arrays, 0)], lambda ours, model: np.split(ours[0], parts))


# A table without a row for the class token is one with a row of zeros.
CLASS_ROW = Form(
    "taken",
    lambda arrays: [np.concatenate([np.zeros_like(arrays[0][:, :1]), arrays[0]], axis=1)],
    lambda ours, model: [ours[0][:, 1:]],
)


def with_register_rows(class_row: bool) -> Form:
    """(registers, table with a row for each of them too) <-> (registers that their rows were added to, table without).

    The registers of our models have no position; added once and for all, their rows do the same. Written, those rows
    are zeros, so that a file whose rows are not zeros comes back as another one of the same model.
    """
    first = int(class_row)

    def read(arrays: Arrays) -> list[np.ndarray]:
        tokens, table = arrays
        end = first + tokens.shape[1]
        return [tokens + table[:, first:end], np.concatenate([table[:, :first], table[:, end:]], axis=1)]

    def write(ours: Arrays, model: VisionTransformer) -> list[np.ndarray]:
        tokens, table = ours
        return [tokens, np.concatenate([table[:, :first], np.zeros_like(tokens), table[:, first:]], axis=1)]

    return Form("taken", read, write)


def scanned(rule: Rule, depth: int) -> Rule:
    """Of a rule for block 0, that of arrays which hold all blocks along a first axis."""

    def read(arrays: Arrays) -> list[np.ndarray]:
        return [one for index in range(depth) for one in rule.form.read([array[index] for array in arrays])]

    def write(ours: Arrays, model: VisionTransformer) -> list[np.ndarray]:
        blocks = [rule.form.write([one], model) for one in ours]
        return [np.stack(arrays) for arrays in zip(*blocks, strict=True)]

    paths = tuple(path.replace("/block_0/", f"/block_{index}/") for index in range(depth) for path in rule.paths)
    return Rule(rule.names, paths, Form("split" if rule.form.word == "taken" else rule.form.word, read, write))


def written(rules: Sequence[Rule], ours: Mapping[str, np.ndarray], model: VisionTransformer) -> dict[str, np.ndarray]:
    """The file's arrays, by name, of all our parameters by path."""
    arrays = {}
    for rule in rules:
        arrays.update(zip(rule.names, rule.form.write([ours[path] for path in rule.paths], model), strict=True))
    return arrays


def dense(names: str, path: str, kernel: Form, bias: Form = SAME, parts: Sequence[str] = ("",)) -> list[Rule]:
    """The rules of a dense layer: `names` has a place '{}' for each of `parts` and ends where kernel or bias begins.

    A name that ends in '/' is Flax's (kernel, bias), one that ends in '.' is PyTorch's (weight, bias).
    """
    first = "kernel" if names.endswith("/") else "weight"
    return [
        Rule(tuple(names.replace("{}", part) + first for part in parts), (f"{path}/kernel",), kernel),
        Rule(tuple(names.replace("{}", part) + "bias" for part in parts), (f"{path}/bias",), bias),
    ]


def norm(name: str, path: str, form: Form = SAME) -> list[Rule]:
    """The rules of a normalisation: scale (PyTorch: weight) and bias."""
    first = "scale" if name.endswith("/") else "weight"
    return [Rule((f"{name}{first}",), (f"{path}/scale",), form), Rule((f"{name}bias",), (f"{path}/bias",), form)]
