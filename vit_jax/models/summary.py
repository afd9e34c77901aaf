"""What a model costs: the layer table with output shapes, parameters and FLOPs, and the memory of training.

Nothing here knows how a model is built: the model is traced, and every call of a module is recorded. A module with
matmuls or convolutions of its own has a method `matmul_flops`, which counts them for inputs of a shape.
"""

import math
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.dropout import Dropout
from vit_jax.models.encoder import Encoder, EncoderBlock
from vit_jax.models.masked_autoencoder import MaskedAutoencoder
from vit_jax.models.masked_patches import MaskedPatchPrediction
from vit_jax.models.parameters import parameter_shapes
from vit_jax.models.pooling import Heads
from vit_jax.models.positions import Position
from vit_jax.models.resnet import stem_activation_bytes
from vit_jax.models.vit import VisionTransformer, extra_tokens, token_grid

Pretraining = MaskedPatchPrediction | MaskedAutoencoder
Path = tuple[str, ...]


class Layer(NamedTuple):
    """A row of the layer table.

    Attributes:
        name: path of its parameters, such as 'encoder/block_0/mlp'; the parts of a block follow it.
        shape: shape of the output for one image.
        parameters: number of parameters, including those of its parts.
        flops: FLOPs of the forward pass for one image, matmuls and convolutions only, including those of its parts.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    flops: int


class Call(NamedTuple):
    """A call of a module: the module, the shape of its output, and the FLOPs of its own matmuls."""

    module: nn.Module
    shape: tuple[int, ...]
    flops: int


def forward_flops(model: VisionTransformer | Pretraining, image_size: tuple[int, int], channels: int) -> int:
    """FLOPs of the forward pass for one image: matmuls and convolutions, a multiply-add counted as two.

    A training step is estimated as three times this: the backward pass has two matmuls for each one of the forward
    pass.

    Args:
        model: the model, or a module for pre-training.
        image_size: height and width in pixels.
        channels: number of channels of the images.

    Raises:
        ValueError: the patch size does not divide the image.
    """
    return sum(call.flops for call in _calls(model, image_size, channels).values())


def layers(model: VisionTransformer, image_size: tuple[int, int], channels: int) -> list[Layer]:
    """The layer table: all layers in order, and the parts of blocks after their block.

    Raises:
        ValueError: the patch size does not divide the image.
    """
    calls = _calls(model, image_size, channels)
    shapes = parameter_shapes(model, token_grid(model, image_size), channels)
    sizes = {re.sub(r"/block_\d+/", "/blocks/", path): 0 for path in shapes}
    for path, shape in shapes.items():
        sizes[re.sub(r"/block_\d+/", "/blocks/", path)] += math.prod(shape)
    flops = {"/".join(path): call.flops for path, call in calls.items()}
    table = []
    for path, call in calls.items():
        name, parent = "/".join(path), calls.get(path[:-1]) if path else None
        row = Layer(name, _output_shape(call, parent), _total(sizes, name), _total(flops, name))
        if _is_row(call, parent, row.parameters):
            table.append(row)
        if path == ("embedding",):  # parameters of the model itself, not of a module
            bare = {key: shapes[key] for key in ("class_token", "registers") if key in shapes}
            table += [Layer(key, shape[1:], math.prod(shape), 0) for key, shape in bare.items()]
    return table if model.scan else _unscanned(table, model.depth)


def _calls(module: nn.Module, image_size: tuple[int, int], channels: int) -> dict[Path, Call]:
    """The call of every module by its path, in order, for one image; blocks are scanned, all in one call."""
    calls: dict[Path, Call] = {}
    depths: dict[Path, int] = {}

    def record(call, arguments: tuple, keywords: dict, context: nn.module.InterceptorContext) -> Any:
        module, path = context.module, context.module.path
        if context.method_name != "__call__":
            return call(*arguments, **keywords)
        if isinstance(module, Encoder) and module.scan:
            depths[(*path, "blocks")] = module.depth
        times = math.prod(depth for scanned, depth in depths.items() if path[: len(scanned)] == scanned)
        flops = times * module.matmul_flops(arguments[0].shape) if hasattr(module, "matmul_flops") else 0
        calls[path] = Call(module, (), flops)  # before the calls of its parts
        outputs = call(*arguments, **keywords)
        leaves = jax.tree.leaves(outputs)
        calls[path] = Call(module, leaves[0].shape if leaves else (), flops)
        return outputs

    changes = {"scan": True, "remat": False}  # one block is traced, which takes less time
    if isinstance(module, VisionTransformer):
        module = module.clone(**changes)
    else:
        module = module.clone(backbone=module.backbone.clone(**changes))
    images = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(module.init, jax.random.key(0), images)
    return calls


def _output_shape(call: Call, parent: Call | None) -> tuple[int, ...]:
    # Inside a block, arrays of one image may be [tokens, width] as well as [1, tokens, width].
    in_block = parent is not None and isinstance(parent.module, EncoderBlock)
    return call.shape[-2:] if in_block and not isinstance(call.module, Position) else call.shape[1:]


def _is_row(call: Call, parent: Call | None, parameters: int) -> bool:
    """Whether a call is a row: a layer of the model, an encoder or several heads, or a part of a block."""
    if parent is None or isinstance(call.module, Encoder | Heads | Dropout):
        return False
    if isinstance(call.module, Position) and not parameters:
        return False
    return isinstance(parent.module, VisionTransformer | Encoder | Heads | EncoderBlock)


def _total(values: dict[str, int], name: str) -> int:
    return sum(value for path, value in values.items() if path == name or path.startswith(f"{name}/"))


def _unscanned(table: list[Layer], depth: int) -> list[Layer]:
    """The rows of a model whose blocks are not scanned: those of the blocks once per block."""
    blocks = [row for row in table if row.name.startswith("encoder/blocks")]
    first = table.index(blocks[0])
    rows = [
        Layer(row.name.replace("blocks", f"block_{index}", 1), row.shape, row.parameters // depth, row.flops // depth)
        for index in range(depth)
        for row in blocks
    ]
    return table[:first] + rows + table[first + len(blocks) :]


def training_bytes(
    model: VisionTransformer, image_size: tuple[int, int], channels: int, batch_size: int
) -> dict[str, int]:
    """An estimate of the memory of training with Adam, by purpose, in bytes.

    Parameters, gradients and Adam's two moments are float32. Of the activations, only those that the backward pass
    reads are counted: in every block the inputs of matmuls and norms, the attention weights (float32) and the hidden
    layer of the MLP; with `remat`, the blocks' inputs, the matmul outputs that are kept, and the activations of one
    block (on CPU that requires `scan` too, as the compiler otherwise undoes it). Compilers save some of this memory and
    add buffers of their own: the result is a guide.
    """
    grid = token_grid(model, image_size)
    parameters = 4 * sum(map(math.prod, parameter_shapes(model, grid, channels).values()))
    tokens = grid[0] * grid[1] + extra_tokens(model)
    activations = model.encoder().activation_bytes(tokens, model.width)
    if model.stem is not None:
        activations += stem_activation_bytes(model.stem, model.stem_width, image_size, model.dtype)
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": 2 * parameters,
        "activations": batch_size * activations,
    }
