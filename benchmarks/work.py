"""The input of all sides of a comparison: the same sizes, images, labels and parameters. Needs only NumPy."""

import dataclasses
import json
from typing import Any

import numpy as np

MEAN, STD = 0.5, 0.25
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON = 1e-3, 0.05, (0.9, 0.999), 1e-8


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one side.

    Attributes:
        side: its name.
        mode: 'train' (whole steps with AdamW) or 'infer' (logits).
        width, depth, heads, mlp_width, patch_size: of the model.
        image_size: height and width in pixels.
        classes: number of logits.
        batch_size: images per step.
        dtype: compute dtype, 'float32' or 'bfloat16'; parameters are always float32.
        device: 'auto' or 'cpu'.
        images: path of an .npz with `images` (uint8) and `labels`; None for noise.
        batches: number of different batches, used in turn.
        fields: options of `config.model`, for a model that the baselines do not have; it is initialized at random.
        channels: of the images; the baselines take three.
    """

    side: str
    mode: str
    width: int
    depth: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    classes: int
    batch_size: int
    dtype: str
    device: str = "auto"
    images: str | None = None
    batches: int = 1
    fields: dict[str, Any] | None = None
    channels: int = 3

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def model(self) -> dict[str, int]:
        """The fields that set the size of a model."""
        return {name: getattr(self, name) for name in ("width", "depth", "heads", "mlp_width", "patch_size")}

    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


def examples(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [batches, batch, height, width, 3] and int32 labels [batches, batch]."""
    count, side = work.batches * work.batch_size, work.image_size
    if work.images is None:
        generator = np.random.default_rng(1)
        images = generator.integers(0, 256, (count, side, side, work.channels), np.uint8)
        labels = generator.integers(0, work.classes, count)
    else:
        with np.load(work.images) as file:
            images, labels = file["images"][:count], file["labels"][:count]
    shape = (work.batches, work.batch_size)
    return images.reshape(*shape, *images.shape[1:]), labels.reshape(shape).astype(np.int32)


def normalized(images: np.ndarray) -> np.ndarray:
    """Images as float32, the input of every model."""
    return (images.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)


def parameters(work: Work) -> dict[str, np.ndarray]:
    """Random parameters, by their names in `VisionTransformer`; kernels are [inputs, outputs]."""
    generator, width = np.random.default_rng(2), work.width

    def normal(*shape: int) -> np.ndarray:
        return np.float32(0.02) * generator.standard_normal(shape, np.float32)

    def dense(name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {f"{name}/kernel": normal(inputs, outputs), f"{name}/bias": np.zeros(outputs, np.float32)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}/scale": np.ones(width, np.float32), f"{name}/bias": np.zeros(width, np.float32)}

    tree = dense("embedding/projection", work.patch_size**2 * 3, width)
    tree |= {"class_token": normal(1, 1, width), "positions/table": normal(1, work.tokens(), width)}
    for index in range(work.depth):
        block = f"encoder/block_{index}"
        tree |= norm(f"{block}/norm_attention") | norm(f"{block}/norm_mlp")
        tree |= dense(f"{block}/attention/qkv", width, 3 * width) | dense(f"{block}/attention/out", width, width)
        tree |= dense(f"{block}/mlp/up", width, work.mlp_width) | dense(f"{block}/mlp/down", work.mlp_width, width)
    return tree | norm("encoder/norm") | dense("head/logits", width, work.classes)
