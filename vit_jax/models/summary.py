"""What a model costs: the layer table with output shapes, parameters and operations, and the memory of training."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.models.masked_autoencoder import MaskedAutoencoder
from vit_jax.models.masked_patches import LEVELS, MaskedPatchPrediction
from vit_jax.models.masking import hidden_count
from vit_jax.models.resnet import stem_flops, stem_output
from vit_jax.models.vit import VisionTransformer, token_grid


class Layer(NamedTuple):
    """A row of the layer table.

    Attributes:
        name: path of its parameters, as 'encoder/block_0/mlp'; layers stand behind what they are part of.
        shape: of its output, for one image.
        parameters: number of them, those of its parts included.
        flops: of one image's forward pass, those of its parts included; matrix products alone.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    flops: int


def forward_flops(
    model: VisionTransformer, image_size: tuple[int, int], channels: int, visible: int | None = None
) -> int:
    """Floating-point operations of one image's forward pass: matrix products and convolutions, a multiply-add as two.

    A training step is taken as three times this: the backward pass has two products for each of the forward pass.

    Args:
        model: the model.
        image_size: height and width, pixels.
        channels: values a pixel.
        visible: patches that are encoded; None for all. All are embedded.

    Raises:
        ValueError: the patch does not divide the image.
    """
    rows, columns = token_grid(model, image_size)
    tokens = (visible or rows * columns) + int(model.class_token) + model.registers
    stem = 0 if model.stem is None else stem_flops(model.stem, model.stem_width, image_size, channels)
    embedding = _embedding_flops(model, rows * columns, _inputs(model, image_size, channels))
    blocks = model.depth * (_attention_flops(model, tokens) + _mlp_flops(model, tokens))
    return stem + embedding + blocks + _pooling_flops(model, tokens) + sum(_head_flops(model, tokens).values())


def masked_patches_flops(module: MaskedPatchPrediction, image_size: tuple[int, int], channels: int) -> int:
    """`forward_flops` of masked patch prediction: the backbone and its layer of colours."""
    backbone = module.backbone
    rows, columns = token_grid(backbone, image_size)
    return forward_flops(backbone, image_size, channels) + 2 * rows * columns * backbone.width * LEVELS**channels


def masked_autoencoder_flops(module: MaskedAutoencoder, image_size: tuple[int, int], channels: int) -> int:
    """`forward_flops` of a masked autoencoder: the encoder on what it sees, and the decoder on all patches."""
    backbone, width, (rows, columns) = module.backbone, module.decoder_width, token_grid(module.backbone, image_size)
    patches, extra = rows * columns, int(backbone.class_token) + backbone.registers
    visible, tokens = patches - hidden_count(module.masked, patches), patches + extra
    block = 2 * tokens * width * (4 * width + 2 * module.decoder_mlp_width) + 2 * 2 * tokens * tokens * width
    ends = 2 * (visible + extra) * backbone.width * width
    ends += 2 * patches * width * channels * backbone.patch_size**2
    return forward_flops(backbone, image_size, channels, visible) + module.decoder_depth * block + ends


def _inputs(model: VisionTransformer, image_size: tuple[int, int], channels: int) -> int:
    return channels if model.stem is None else stem_output(model.stem, model.stem_width, image_size)[2]


def _embedding_flops(model: VisionTransformer, patches: int, channels: int) -> int:
    return 2 * patches * model.patch_size**2 * channels * (model.width - model.position_width)


def _attention_flops(model: VisionTransformer, tokens: int) -> int:
    # Queries, keys, values and output; then scores and mixture.
    return 2 * tokens * model.width * 4 * model.width + 2 * 2 * tokens * tokens * model.width


def _mlp_flops(model: VisionTransformer, tokens: int) -> int:
    return 2 * (3 if model.mlp == "swiglu" else 2) * tokens * model.width * model.mlp_width


def _pooling_flops(model: VisionTransformer, tokens: int) -> int:
    if model.pooling != "map":
        return 0
    width, hidden = model.width, model.mlp_width
    # The query and the output are one vector each, and the query is the same for all images: it is counted for each.
    return 2 * width * (2 * width + 2 * tokens * width + 2 * tokens + 2 * hidden)


def _head_flops(model: VisionTransformer, tokens: int) -> dict[str, int]:
    """Of every head by its name; of the only one, ''."""
    if model.classes is None:
        return {}
    heads = model.classes if isinstance(model.classes, Mapping) else {"": model.classes}
    vectors = tokens if model.pooling == "none" else 1
    before = 0 if model.pre_logits is None else model.width * model.pre_logits
    features = model.pre_logits or model.width
    return {name: 2 * vectors * (before + features * classes) for name, classes in heads.items()}


def parameter_shapes(model: VisionTransformer, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """The tree of the model's parameters as shapes, nothing computed."""
    images = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images).get("params", {})


def layers(model: VisionTransformer, image_size: tuple[int, int], channels: int) -> list[Layer]:
    """The layer table: the whole model in order, and the parts of blocks behind their block.

    Raises:
        ValueError: the patch does not divide the image.
    """
    tree = parameter_shapes(model, image_size, channels)
    rows, columns = token_grid(model, image_size)
    extra, width = int(model.class_token) + model.registers, model.width
    tokens = rows * columns + extra
    table = []

    def add(name: str, shape: tuple[int, ...], flops: int = 0) -> None:
        table.append(Layer(name, shape, _count(tree, name), flops))

    if model.stem is not None:
        stem = stem_output(model.stem, model.stem_width, image_size)
        add("stem", stem, stem_flops(model.stem, model.stem_width, image_size, channels))
    inputs = _inputs(model, image_size, channels)
    embedding = _embedding_flops(model, rows * columns, inputs)
    add("embedding", (rows * columns, width - model.position_width), embedding)
    for name, shape in (
        ("class_token", (1, width)),
        ("registers", (model.registers, width)),
        ("positions", (tokens, width)),
    ):
        if name in tree:
            add(name, shape)
    _add_blocks(add, model, tree, tokens)
    if not model.norm_after_pooling:
        add("encoder/norm", (tokens, width))
    features = (tokens, width) if model.pooling == "none" else (width,)
    add("pooling", features, _pooling_flops(model, tokens))
    if model.norm_after_pooling:
        add("norm", features)
    for name, flops in _head_flops(model, tokens).items():
        classes = model.classes[name] if name else model.classes
        add(f"head/{name}".rstrip("/"), (*features[:-1], classes), flops)
    return table


def _add_blocks(add, model: VisionTransformer, tree: dict[str, Any], tokens: int) -> None:
    """A row for each block; of a scanned model, one for all of them."""
    shape, attention, mlp = (tokens, model.width), _attention_flops(model, tokens), _mlp_flops(model, tokens)
    for name in ["blocks"] if model.scan else [f"block_{index}" for index in range(model.depth)]:
        block, times = tree["encoder"][name], model.depth if model.scan else 1
        add(f"encoder/{name}", shape, times * (attention + mlp))
        for part in _in_order(block):
            flops = {"attention": attention, "mlp": mlp}.get(part, 0)
            add(f"encoder/{name}/{part}", shape, times * flops)


def _in_order(block: dict[str, Any]) -> list[str]:
    order = (
        "positions",
        "norm",
        "norm_attention",
        "attention",
        "scale_attention",
        "norm_mlp",
        "mlp",
        "scale_mlp",
        "scale",
    )
    return [part for part in order if part in block]


def _count(tree: dict[str, Any], path: str) -> int:
    for name in path.split("/"):
        tree = tree.get(name, {})
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def training_bytes(
    model: VisionTransformer, image_size: tuple[int, int], channels: int, batch_size: int
) -> dict[str, int]:
    """An estimate of what training with Adam keeps in memory, part by part.

    Parameters, their gradients and Adam's two moments are float32. Of the forward pass, what the backward pass reads
    again is counted: of every block the inputs of its products and norms, the attention weights (float32) and the
    MLP's hidden layer with what its derivative takes; with `remat`, the blocks' inputs, the results of products that
    it keeps, and one block's inside (on CPU that needs `scan` too: there the compiler undoes it otherwise). The stem of
    a hybrid is counted by its outputs. Compilers save some of it and add buffers of their own: take it as a guide.
    """
    parameters = 4 * _count({"all": parameter_shapes(model, image_size, channels)}, "all")
    rows, columns = token_grid(model, image_size)
    tokens = rows * columns + int(model.class_token) + model.registers
    item = jnp.dtype(model.dtype).itemsize
    # Normed, queries, keys, values, mixture, middle, normed; the hidden layer before and after, and its derivative's.
    hidden = (5 if model.mlp == "swiglu" else 4) * model.mlp_width
    inside = tokens * item * (7 * model.width + hidden) + 2 * 4 * model.heads * tokens**2
    input_ = tokens * item * model.width
    blocks = inside + model.depth * _saved(model, tokens) if model.remat else model.depth * inside
    kept = model.depth * input_ + blocks
    stem = 0
    if model.stem is not None:
        height, across, _ = stem_output((), model.stem_width, image_size)
        # Each unit keeps some seven maps of its inner width (its norms' inputs and outputs among them).
        stem = item * height * across * model.stem_width * (8 + 14 * sum(n / 2**s for s, n in enumerate(model.stem)))
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": 2 * parameters,
        "activations": batch_size * int(kept + stem),
    }


def _saved(model: VisionTransformer, tokens: int) -> int:
    """Bytes that one rematerialised block keeps of one image besides its input."""
    if model.remat is True:
        return 0
    item = jnp.dtype(model.dtype).itemsize
    hidden = (2 if model.mlp == "swiglu" else 1) * model.mlp_width
    # Queries, keys, values, output and the MLP's two; then scores (float32) and mixture.
    dense = tokens * item * (5 * model.width + hidden)
    attention = 4 * model.heads * tokens**2 + tokens * item * model.width
    return dense + (attention if model.remat == "dots" else 0)
