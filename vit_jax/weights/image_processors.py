"""Reads preprocessor_config.json, in which Hugging Face's image processors record how images are prepared.

The steps are those of transformers' processors on Pillow's images (`ViTImageProcessorPil`, formerly
`ViTImageProcessor`): resize, crop at the center, rescale, normalize. Keys that old files lack have the defaults of the
processor that the file names.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from vit_jax.data.preparation import FILTERS
from vit_jax.errors import UserError
from vit_jax.weights.describe import pair
from vit_jax.weights.files import PREPROCESSOR

_FILTERS = {int(resampling): name for name, (resampling, _) in FILTERS.items()}
_WARPED_FROM = 384  # ConvNeXT's processor does not crop from this size on


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a processor does where its file says nothing.

    Attributes:
        resample: filter, as Pillow numbers them.
        size: side that images are resized to.
        is_square: whether a size that is one number means both sides, else the shorter one.
        crop: side of the crop at the center; None for no crop.
        warps: whether it resizes as ConvNeXT's: to both sides from 384 pixels on, else to more than the size, with a
            crop of `crop_pct`.
    """

    resample: Image.Resampling
    size: int = 224
    is_square: bool = True
    crop: int | None = None
    warps: bool = False


VIT = Defaults(Image.Resampling.BILINEAR)
PROCESSORS = {
    "ViT": VIT,
    "DINOv3ViT": VIT,
    "DeiT": Defaults(Image.Resampling.BICUBIC, size=256, crop=224),
    "Beit": Defaults(Image.Resampling.BICUBIC),
    "Bit": Defaults(Image.Resampling.BICUBIC, is_square=False, crop=224),
    "CLIP": Defaults(Image.Resampling.BICUBIC, is_square=False, crop=224),
    "Siglip": Defaults(Image.Resampling.BICUBIC, is_square=False),
    "ConvNext": Defaults(Image.Resampling.BICUBIC, size=384, is_square=False, warps=True),
}
# The processors of models whose files do not name one; of others, ViT's.
OF_MODEL_TYPE = {
    "deit": "DeiT",
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), "Bit"),
    **dict.fromkeys(("clip", "clip_vision_model"), "CLIP"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "Siglip"),
}


def pixel_scale(config: Mapping[str, Any]) -> float:
    """Returns what the value of a pixel in [0, 1] is multiplied by before mean and std: 1 for a factor of 1/255."""
    if config.get("do_rescale") is False:
        return 255.0
    factor = _number(config, "rescale_factor", 1 / 255)
    scale = 255 * factor
    return 1.0 if math.isclose(scale, 1) else scale


def evaluation(
    config: Mapping[str, Any], model_type: str | None, image_size: tuple[int, int] | None
) -> tuple[dict[str, Any], str | None]:
    """Returns the entries of `preprocessing.EVALUATION`, and a note if the file asks for what is not supported.

    Args:
        config: the content of preprocessor_config.json.
        model_type: of the config.json next to it.
        image_size: height and width of the model's images, if known.

    Raises:
        UserError: a value is not valid.
    """
    defaults = PROCESSORS.get(_name(config, model_type), VIT)
    resample = config.get("resample")
    resample = int(defaults.resample) if resample is None else resample
    if resample not in _FILTERS:
        raise UserError(f"{PREPROCESSOR} has resample {resample!r}\n  allowed: a filter as Pillow numbers them, 0 to 5")
    square, short, crop = _sizes(config, defaults)
    found = {"interpolation": _FILTERS[resample], "resize_rules": "transformers"}
    if config.get("do_resize") is False:
        # Without a crop, images must have the size of the model; others are resized as in training.
        return ({**found, "crop_pct": 1.0, "crop_mode": "none", "input_size": list(crop)} if crop else {}), None
    target = crop or square or image_size
    fractions = [1.0] if target is None else [_fraction(min(target), short)] if short else []
    if square is not None:
        fractions = sorted(_fraction(kept, side) for kept, side in zip(target, square, strict=True))
    if not fractions or not math.isclose(fractions[0], fractions[-1], rel_tol=1e-3):
        what = {key: config.get(key) for key in ("size", "crop_size")}
        return {}, f"{PREPROCESSOR} has {str(what)[:120]}, which is not supported: images are resized as in training"
    found |= {"crop_pct": fractions[0], "crop_mode": "center" if short else "squash"}
    if (crop or square) and not config.keys().isdisjoint(("size", "crop_size")):
        found["input_size"] = list(crop or square)
    return found, None


def _name(config: Mapping[str, Any], model_type: str | None) -> str:
    """The processor's name without its ending: 'ViT' of 'ViTImageProcessorFast' and of 'ViTFeatureExtractor'."""
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    if not isinstance(named, str):
        return OF_MODEL_TYPE.get(model_type, "ViT")
    return re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", named)


def _sizes(
    config: Mapping[str, Any], defaults: Defaults
) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """Height and width that images are resized to, or the length of their shorter side; and those of the crop."""
    size, crop, short = config.get("size"), config.get("crop_size"), None
    size = defaults.size if size is None else size
    if isinstance(size, dict):
        square = pair([size.get("height"), size.get("width")])
        short = size.get("shortest_edge") if set(size) == {"shortest_edge"} else None
    else:
        square = pair(size) if defaults.is_square or not isinstance(size, int) else None
        short = size if square is None else None
    is_cropped = config.get("do_center_crop")
    if not (defaults.crop is not None if is_cropped is None else is_cropped):
        crop = None
    else:
        crop = defaults.crop if crop is None else crop
        crop = pair([crop.get("height"), crop.get("width")] if isinstance(crop, dict) else crop)
    if any(side < 1 for side in (*(square or ()), *(crop or ()))) or not (
        short is None or (type(short) is int and short > 0)
    ):
        raise UserError(f"{PREPROCESSOR} has size {size!r} and crop_size {crop!r}\n  allowed: numbers of pixels")
    if short is not None and defaults.warps:  # before the crop of other processors, of which it has none
        if short >= _WARPED_FROM:
            return (short, short), None, crop
        return None, int(short / _number(config, "crop_pct", 224 / 256)), crop or (short, short)
    return square, short, crop


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{PREPROCESSOR} has {key} {value!r}\n  allowed: a number above 0")
    return value


def _fraction(kept: int, resized: int) -> float:
    """The `crop_pct` with which timm, which rounds down, resizes to `resized` pixels for a crop of `kept` pixels."""
    fraction = kept / resized
    while math.floor(kept / fraction) < resized:
        fraction = math.nextafter(fraction, 0)
    return fraction
