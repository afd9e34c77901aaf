"""Output tokens of a Vision Transformer and of its blocks, in one pass over the model."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vit_jax import arguments
from vit_jax.errors import UserError
from vit_jax.models import resampling, stacking
from vit_jax.models.encoder import EncoderBlock
from vit_jax.models.vit import VisionTransformer, extra_tokens, token_grid

# Indices of blocks, negative ones from the end; None for the last block, without an axis of layers.
Layers = Sequence[int | np.integer] | Int[Array | np.ndarray, " layers"] | None


def apply(
    model: VisionTransformer,
    parameters: Any,
    images: Float[Array, "batch height width channels"],
    layers: Layers = None,
    dense: bool = True,
    grid: tuple[int, int] | None = None,
    method: str = "bilinear",
) -> dict[str, Float[Array, "..."]]:
    """Returns the output tokens of the last block, or of those in `layers`, in float32, by kind.

    * 'patches' [batch, rows, columns, width]: the patches, without class token and registers.
    * 'class' [batch, width]: the class token; missing if the model has none.
    * 'pooled' [batch, width]: what a head reads (class token, mean or attention pooling); missing without pooling.

    With `layers` all of them have a leading axis of layers. The final LayerNorm is applied to the tokens of every
    layer, as `get_intermediate_layers(norm=True)` of DINOv2 does; where the model normalizes after pooling, to 'pooled'
    alone.
    Compiled, blocks after the last one in `layers` are not computed, and attention weights are never kept.

    Args:
        model: with or without a head, which is not applied.
        parameters: of the model.
        images: normalized.
        layers: see `Layers`.
        dense: whether to return 'patches'.
        grid: rows and columns of patches that the position embeddings are for, which are resampled if the images have
            others; None if they are for these images.
        method: of resampling, one of `resampling.METHODS`.

    Raises:
        UserError: `layers` has no block of the model.
        ValueError: the patch size does not divide the images.
    """
    chosen = check_layers(layers, model.depth)
    model = model.clone(classes=None, scan=False, remat=False)
    parameters, new_grid = stacking.unstack_blocks(parameters), token_grid(model, images.shape[1:3])
    if grid is not None and new_grid != grid:
        parameters = resampling.resample_positions(parameters, grid, new_grid, method)
    found: dict[str, jax.Array] = {}
    with nn.intercept_methods(_capture(model.depth, chosen, found)):
        model.apply({"params": parameters}, images)
    batch, extra = len(images), extra_tokens(model)
    tokens = found["tokens"].reshape(len(chosen), batch, *found["tokens"].shape[1:])
    outputs = {"patches": tokens[:, :, extra:].reshape(*tokens.shape[:2], *new_grid, model.width)} if dense else {}
    if model.class_token:
        outputs["class"] = tokens[:, :, 0]
    if model.pooling != "none":
        outputs["pooled"] = found["pooled"].reshape(len(chosen), batch, found["pooled"].shape[-1])
    outputs = {name: array.astype(jnp.float32) for name, array in outputs.items()}
    return {name: array[0] for name, array in outputs.items()} if layers is None else outputs


def check_layers(layers: Any, depth: int) -> tuple[int, ...]:
    """Returns the indices of blocks, from 0; None stands for the last one.

    Raises:
        UserError: there is no such block, or none at all.
    """
    allowed = f"allowed: a list of indices from 0 to {depth - 1}, or from -1 (the last block) to -{depth}"
    layers = arguments.plain((-1,) if layers is None else layers)
    if not isinstance(layers, list | tuple) or not layers:
        raise UserError(f"layers is {arguments.shown(layers)}\n  {allowed}")
    layers = [arguments.integer(f"layers[{position}]", layer, None) for position, layer in enumerate(layers)]
    for layer in layers:
        if not -depth <= layer < depth:
            raise UserError(f"layers has {layer}, but the model has {depth} blocks\n  {allowed}")
    return tuple(layer % depth for layer in layers)


def _capture(depth: int, layers: tuple[int, ...], found: dict[str, jax.Array]) -> Callable:
    """Returns an interceptor of Flax's methods that keeps the tokens of some blocks, normalized and pooled, in `found`.

    What follows the last block is applied to the tokens of all these blocks at once, as if they were one batch.
    """
    blocks: list[jax.Array] = []
    after = {("encoder", "norm"): "tokens", ("pooling",): "pooled", ("norm",): "pooled"}

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(context.module, EncoderBlock):
            blocks.append(call(*args, **kwargs))
            if len(blocks) == depth:
                found["tokens"] = jnp.concatenate([blocks[layer] for layer in layers])
            return blocks[-1]
        name = after.get(context.module.path)
        if name is None:
            return call(*args, **kwargs)
        found[name] = call(found.get(name, found["tokens"]))
        return found[name][: len(args[0])]  # has the shape that the model expects; its value is not used

    return intercept
