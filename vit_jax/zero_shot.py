"""Zero-shot classification: a model of CLIP or SigLIP whose classes are texts (arXiv 2103.00020, section 3.1)."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from vit_jax import arguments, classifier, paths, terminal
from vit_jax.classifier import Classifier
from vit_jax.data.labels import read_names
from vit_jax.errors import UserError, few
from vit_jax.models.text import ZeroShotTransformer
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights import texts, tokenizer
from vit_jax.weights.class_names import IMAGENET, imagenet1k
from vit_jax.weights.texts import TextTower

PROMPT = "a photo of a {}"
_NAME = "{}"  # what stands for the class name in a prompt


def of_file(
    file: str | bytes | os.PathLike,
    class_names: Iterable[str] | None = None,
    prompt: str | Iterable[str] | None = None,
    *,
    needs_head: bool = True,
    **options: Any,
) -> Classifier:
    """Returns the model of a weights file with its preprocessing; one that embeds texts may have any classes.

    Args:
        file: as for `classifier.of_file`.
        class_names: as there; any names for a file with a text tower.
        prompt: for such a file: a text with '{}' for the class name; of several, the mean is taken. None for
            'a photo of a {}'; classes of ImageNet-1k if `class_names` is None.
        needs_head: as there.
        **options: other arguments of `classifier.of_file`.

    Raises:
        UserError: as there; there is a prompt, but no text tower; a prompt has no '{}'; or there is no tokenizer.
    """
    file = arguments.path("file", file)
    if prompt is None and (class_names is None or not texts.has_text(file)):
        found = classifier.of_file(file, class_names, **options, needs_head=needs_head)
        if class_names is None and needs_head and texts.has_text(file):
            terminal.warn(f"{file}: its classes are channels of image embeddings; to name some: --classes=cat,dog")
        return found
    prompts = (
        (PROMPT,) if prompt is None else (prompt,) if isinstance(prompt, str) else arguments.names("prompt", prompt)
    )
    for one in prompts or ("",):
        if _NAME not in one:
            raise UserError(
                f"prompt is {one!r}\n  expected: a text with {_NAME} for the class name, such as {PROMPT!r}"
            )
    is_imagenet = class_names is None or (isinstance(class_names, str) and class_names == IMAGENET)
    names = imagenet1k() if is_imagenet else arguments.names("class_names", class_names)
    if not names:
        raise UserError("class_names is empty\n  allowed: at least one name")
    tower = texts.load_text(file)
    features = text_features(file, tower, names, prompts)
    images = classifier.of_file(file, **options, needs_head=False)
    model, parameters = _model(images, tower, features)
    inputs = dataclasses.replace(images.inputs, classes={"label": names})
    loss = "softmax" if tower.bias is None else "sigmoid"
    return dataclasses.replace(images, model=model, parameters=parameters, inputs=inputs, loss=loss)


def text_features(
    file: str, tower: TextTower, names: tuple[str, ...], prompts: tuple[str, ...]
) -> Float32[np.ndarray, "classes features"]:
    """Returns the features of each class at length 1: the mean of those of its prompts.

    Raises:
        UserError: as `tokenizer.token_ids`.
    """
    written = [prompt.replace(_NAME, name) for name in names for prompt in prompts]
    ids, cut = tokenizer.token_ids(file, tower.model, written)
    if cut:
        terminal.warn(f"longer than the {tower.model.length} tokens of the model, and cut off there: {few(cut)}")
    features = tower.embed(ids).reshape(len(names), len(prompts), -1).mean(axis=1)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _model(
    images: Classifier, tower: TextTower, features: Float32[np.ndarray, "classes features"]
) -> tuple[VisionTransformer, dict[str, Any]]:
    """The image model with a head that compares its embeddings, after the head that the file has, with the features."""
    image, parameters = images.model, dict(images.parameters)
    size = image.classes or image.width
    if size != features.shape[1]:
        raise UserError(
            f"{images.source}: it has image features of size {size}, and text features of size {features.shape[1]}\n"
            "  use a complete file of the model"
        )
    bias = np.full(len(features), tower.bias or 0.0, np.float32)
    head = {"logits": {"kernel": tower.scale * features.T, "bias": bias}}
    if image.classes is not None:
        head["projection"] = {"kernel": parameters["head"]["logits"]["kernel"]}
    fields = {one.name: getattr(image, one.name) for one in dataclasses.fields(VisionTransformer) if one.init}
    fields |= {"classes": len(features), "projection": image.classes, "parent": None, "name": None}
    return ZeroShotTransformer(**fields), {**parameters, "head": head}


def flag_values(classes: str | None, prompts: list[str] | None) -> dict[str, Any]:
    """Returns the arguments `class_names` and `prompt` of `of_file` that the flags --classes and --prompt stand for.

    Args:
        classes: a text file with a name per line, 'imagenet', names with commas between them, or a prompt.
        prompts: texts with '{}'; None if there are none.

    Raises:
        UserError: the file cannot be read, or both are prompts.
    """
    if classes is not None and _NAME in classes:
        if prompts:
            raise UserError(f"--classes={classes} and --prompt are both prompts\n  omit one of them")
        return {"class_names": None, "prompt": [classes]}
    names: Any = classes
    if classes not in (None, IMAGENET):
        path = paths.expand(classes, "--classes")
        is_list = "," in classes and not Path(path).exists()
        names = tuple(name.strip() for name in classes.split(",")) if is_list else read_names(path, "--classes")
    return {"class_names": names, "prompt": prompts}
