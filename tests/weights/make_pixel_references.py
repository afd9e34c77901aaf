"""Makes references_pixels.npz: a picture, and what timm and transformers make of it for models of several kinds.

    python tests/weights/make_pixel_references.py

It takes torch, torchvision, timm and transformers; the tests read what it has written and need none of them. Written
with torch 2.13.0, torchvision 0.28.0, timm 1.0.31, transformers 5.24.0.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FILE = Path(__file__).with_name("references_pixels.npz")
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
# `pretrained_cfg` of timm; the first is augreg's, the others have each other value of each key.
TIMM = {
    "timm augreg": {"input_size": [3, 48, 48], "interpolation": "bicubic", "crop_pct": 0.9, **HALF},
    "timm squash": {"input_size": [3, 32, 32], "interpolation": "bilinear", "crop_mode": "squash", **CLIP},
    "timm border": {"input_size": [3, 40, 40], "crop_pct": 0.95, "crop_mode": "border", **IMAGENET},
    "timm wide": {"input_size": [3, 24, 40], "interpolation": "lanczos", "crop_pct": 0.8, **IMAGENET},
    "timm defaults": {"input_size": [3, 24, 24], **HALF},
    "timm nearest": {"input_size": [3, 36, 36], "interpolation": "nearest", "crop_pct": 1.0, **HALF},
    "timm padded": {"input_size": [3, 33, 33], "crop_pct": 1.25, **HALF},
}


def _processor(kind: str, size: object, resample: int, of: dict, **more: object) -> dict:
    means = {"image_mean": of["mean"], "image_std": of["std"]}
    return {"image_processor_type": kind, "do_resize": True, "size": size, "resample": resample, **means, **more}


def _cropped(side: int) -> dict:
    return {"do_center_crop": True, "crop_size": {"height": side, "width": side}}


# preprocessor_config.json of transformers.
TRANSFORMERS = {
    "ViT": _processor("ViTImageProcessor", {"height": 48, "width": 48}, 2, HALF),
    "old ViT": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "image_mean": [0.5] * 3}
    | {"image_std": [0.5] * 3},
    "DeiT": _processor("DeiTImageProcessor", {"height": 38, "width": 38}, 3, IMAGENET, **_cropped(33)),
    "DINOv2": _processor("BitImageProcessor", {"shortest_edge": 35}, 3, IMAGENET, **_cropped(32)),
    "CLIP": _processor("CLIPImageProcessor", 40, 3, CLIP, do_center_crop=True, crop_size=40),
    "SigLIP": _processor("SiglipImageProcessor", {"height": 40, "width": 40}, 3, HALF),
    "lanczos, nothing rescaled": _processor("ViTImageProcessor", 32, 1, CLIP, do_rescale=False),
    "not normalized": _processor("ViTImageProcessor", 32, 0, HALF, do_normalize=False),
    "padded": _processor("BitImageProcessor", {"shortest_edge": 30}, 3, IMAGENET, **_cropped(43)),
    "ConvNeXT": _processor("ConvNextImageProcessor", {"shortest_edge": 32}, 3, IMAGENET, crop_pct=0.875),
}


def picture() -> np.ndarray:
    """Uint8 [86, 131, 3]: gradients, edges, a fine pattern and noise; neither side is a multiple of anything."""
    rows, columns = np.mgrid[:86, :131]
    channels = [2 * columns, 255 - 2.9 * rows, 128 + 127 * np.sin(rows / 3) * np.cos(columns / 2)]
    image = np.stack(channels, -1) + np.random.default_rng(0).normal(0, 12, (86, 131, 3))
    image[20:50, 30:45] = (250, 5, 30)
    image[(rows + columns) % 2 * (rows > 60) * (columns > 70) > 0] = 255
    image[(rows - 40) ** 2 + (columns - 95) ** 2 < 300] = (0, 40, 255)
    return image.clip(0, 255).astype(np.uint8)


def by_timm(config: dict, image: Image.Image) -> np.ndarray:
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config({}, pretrained_cfg=config), is_training=False)
    return np.moveaxis(transform(image).numpy(), 0, -1)


def by_transformers(config: dict, image: Image.Image) -> np.ndarray:
    import transformers

    kind = config.get("image_processor_type", "ViTImageProcessor")
    processor = getattr(transformers, f"{kind}Pil").from_dict(dict(config))
    return np.moveaxis(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]), 0, -1)


def without_kernels() -> None:
    """Lets a torchvision be imported whose compiled operators do not load: preprocessing uses none of them."""
    import importlib.util
    import re

    import torch

    found = importlib.util.find_spec("torchvision")
    names = re.findall(
        r'register_fake\("torchvision::(\w+)"', (Path(found.origin).parent / "_meta_registrations.py").read_text()
    )
    library = torch.library.Library("torchvision", "DEF")
    for name in names:
        library.define(f"{name}(Tensor x) -> Tensor")
    sys.modules["_torchvision_operators"] = library  # kept


def main() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        without_kernels()
    image = picture()
    opened = Image.fromarray(image)
    arrays = {name: by_timm(config, opened) for name, config in TIMM.items()}
    arrays |= {name: by_transformers(config, opened) for name, config in TRANSFORMERS.items()}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    np.savez_compressed(FILE, picture=image, configs=json.dumps({**TIMM, **TRANSFORMERS}), **arrays)


if __name__ == "__main__":
    main()
