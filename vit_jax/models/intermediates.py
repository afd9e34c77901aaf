"""Intermediate arrays of a forward pass: embedded patches, outputs of blocks, attention weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from vit_jax.models.vit import VisionTransformer

Inputs = Num[Array, "batch height width channels"] | Num[Array, "batch patches pixels"]
Mask = Bool[Array, "#batch #heads #queries tokens"]


class Intermediates(NamedTuple):
    """Intermediate arrays of one forward pass. Tokens are [class token] [registers] patches, in row-major order.

    Attributes:
        embedded: input of the encoder: embedded patches, plus the position embedding if it is applied at the input.
        blocks: output of every block, before the final LayerNorm.
        weights: attention weights of each query (fourth axis) on each key (fifth axis), for every layer and head.
        pooling: weights of the query of attention pooling on each token; None with another pooling.
    """

    embedded: Float[Array, "batch tokens width"]
    blocks: Float[Array, "depth batch tokens width"] | Sequence[Float[Array, "batch tokens width"]]
    weights: Float[Array, "depth batch heads tokens tokens"] | Sequence[Float[Array, "batch heads tokens tokens"]]
    pooling: Float[Array, "batch heads tokens"] | None


def apply_with_intermediates(
    model: VisionTransformer,
    variables: dict[str, Any],
    inputs: Inputs,
    mask: Mask | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[Any, Intermediates]:
    """Returns `model.apply(variables, inputs, mask, grid=grid)` and the intermediate arrays, without dropout.

    The logits equal those of the plain call to the last bit, also in a compiled function: they come from a forward pass
    of their own, which the compiler cannot merge with the one that returns the intermediates.
    """
    logits = model.apply(variables, inputs, mask, grid=grid)
    variables, inputs = jax.lax.optimization_barrier((variables, inputs))
    _, inside = run(model, variables, inputs, mask, grid)
    return logits, inside._replace(blocks=jnp.stack(inside.blocks), weights=jnp.stack(inside.weights))


def run(
    model: VisionTransformer,
    variables: dict[str, Any],
    inputs: Inputs,
    mask: Mask | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[Any, Intermediates]:
    """Returns the outputs and the intermediate arrays of one forward pass; blocks and weights are lists of layers.

    A compiled function that reduces the arrays of each layer does not hold those of all layers at once.
    """
    outputs, state = model.apply(variables, inputs, mask, grid=grid, mutable=["intermediates"])
    sown = jax.tree.map(lambda values: values[0], state["intermediates"], is_leaf=lambda node: isinstance(node, tuple))
    blocks = [layer["output"] for layer in _layers(sown, model.depth)]
    return outputs, Intermediates(sown["embedded"], blocks, *_weights(sown, model.depth))


def weight_gradients(
    model: VisionTransformer, variables: dict[str, Any], inputs: Inputs, select: Any
) -> tuple[Any, Intermediates, Intermediates]:
    """Returns outputs, intermediate arrays, and the gradients of `select(outputs)` with respect to the weights.

    Args:
        model: with a head.
        variables: of the model.
        inputs: images or patches, normalized.
        select: function from the outputs to a scalar; for a gradient per image, the sum of a logit per image.

    The gradients are fields of `Intermediates`, where `embedded` and `blocks` are those of the forward pass.
    """
    _, shapes = jax.eval_shape(lambda v, x: model.apply(v, x, mutable=["intermediates"]), variables, inputs)
    perturbations = _zeros_of_weights(shapes["intermediates"])

    def forward(perturbations: Any) -> tuple[Any, tuple[Any, Intermediates]]:
        outputs, inside = run(model, {**variables, "perturbations": perturbations}, inputs)
        return select(outputs), (outputs, inside)

    gradients, (outputs, inside) = jax.grad(forward, has_aux=True)(perturbations)
    weights, pooling = _weights(gradients, model.depth)
    return outputs, inside, inside._replace(weights=weights, pooling=pooling)


def _layers(tree: dict[str, Any], depth: int) -> list[dict[str, Any]]:
    """Returns the part of each encoder block of a tree of arrays, also of one with an axis of layers."""
    encoder = tree["encoder"]
    if "blocks" not in encoder:
        return [encoder[f"block_{index}"] for index in range(depth)]
    return [jax.tree.map(lambda leaf, index=index: leaf[index], encoder["blocks"]) for index in range(depth)]


def _weights(tree: dict[str, Any], depth: int) -> tuple[list[jax.Array], jax.Array | None]:
    """Returns the arrays named 'weights' of all layers and of attention pooling."""
    weights = [layer["attention"]["weights"] for layer in _layers(tree, depth)]
    return weights, tree["pooling"]["weights"][:, :, 0] if "pooling" in tree else None


def _zeros_of_weights(sown: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree of perturbations: zeros where attention weights are sown."""
    zeros = {}
    for name, value in sown.items():
        if name == "weights":
            zeros[name] = jnp.zeros(value[0].shape, value[0].dtype)
        elif isinstance(value, dict) and (below := _zeros_of_weights(value)):
            zeros[name] = below
    return zeros
