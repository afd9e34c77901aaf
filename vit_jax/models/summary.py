"""What a model costs, counted from its fields."""

from vit_jax.models.patches import grid_of
from vit_jax.models.vit import VisionTransformer


def forward_flops(model: VisionTransformer, image_size: tuple[int, int], channels: int) -> int:
    """Floating-point operations of one image's forward pass: matrix products alone, a multiply-add counted as two.

    A training step is three times this: each product has two more behind it in the backward pass.

    Args:
        model: the model.
        image_size: height and width, pixels.
        channels: of an image.

    Raises:
        ValueError: the patch does not divide the image.
    """
    rows, columns = grid_of(image_size, model.patch_size)
    patches, width = rows * columns, model.width
    tokens = patches + int(model.class_token)
    embedding = patches * model.patch_size**2 * channels * width
    products = 4 * width * width + 2 * width * model.mlp_width  # q, k, v and out; up and down
    attention = 2 * tokens * width  # a token's scores, and its mixture of values
    head = width * model.classes if model.pre_logits is None else model.pre_logits * (width + model.classes)
    return 2 * (embedding + model.depth * tokens * (products + attention) + head)
