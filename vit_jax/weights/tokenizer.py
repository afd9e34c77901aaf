"""Token ids of texts, by the tokenizer.json beside a file of weights; it takes the tokenizers library."""

import os
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from vit_jax.errors import UserError, one_line
from vit_jax.models.text import TextTransformer
from vit_jax.weights import files, hub

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_ids(
    path_or_name: str | os.PathLike, model: TextTransformer, texts: Sequence[str]
) -> tuple[Int32[np.ndarray, "texts tokens"], list[str]]:
    """Returns the token ids of texts, padded as the model was trained, and the texts that are cut off at its length.

    Args:
        path_or_name: of the weights, as for `weights.load`.
        model: the text encoder.
        texts: at least one.

    Raises:
        UserError: tokenizers is not installed, or there is no tokenizer.json, or one of another model.
    """
    file = hub.fetch(path_or_name)
    directory = file if file.is_dir() else file.parent
    library = _library()
    path = hub.sibling(directory, TOKENIZER)
    if path is None:
        raise UserError(
            f"{path_or_name}: {directory} has no {TOKENIZER}, which makes tokens of texts\n"
            "  put that of the model there, as the Hugging Face hub has it"
        )
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(model.length)
    except Exception as error:  # of no narrower class
        raise UserError(f"{path} cannot be read: {one_line(error)}\n  download it again") from error
    padding = None
    if not model.causal:
        config_path = hub.sibling(directory, TOKENIZER_CONFIG)
        config = files.read_json(config_path) if config_path else {}
        texts = [_simplified(text, config) for text in texts]
        padding = tokenizer.token_to_id(_pad_token(config))
    encodings = tokenizer.encode_batch(list(texts))
    rows = [one.ids for one in encodings]
    if not all(rows) or max(map(max, rows)) >= model.vocabulary or (padding is None and not model.causal):
        raise UserError(f"{path} is of another model: its ids are not those of the weights\n  use that of the model")
    # What follows the end token affects nothing in a causal model: one more end token will do.
    width = model.length if padding is not None else max(map(len, rows))
    ids = [row + [row[-1] if padding is None else padding] * (width - len(row)) for row in rows]
    return np.array(ids, np.int32), [text for text, one in zip(texts, encodings, strict=True) if one.overflowing]


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "tokenizers is not installed: texts need this library\n  to install it: pip install tokenizers"
        ) from error
    return tokenizers


def _simplified(text: str, config: dict[str, Any]) -> str:
    """A text as SigLIP was trained: in lower case, and without punctuation but for SigLIP 2."""
    text = text.lower()
    if config.get("tokenizer_class") in ("SiglipTokenizer", "SiglipTokenizerFast"):
        text = re.sub(r"\s+", " ", text.translate(_PUNCTUATION)).strip()
    return text


def _pad_token(config: dict[str, Any]) -> str:
    token = config.get("pad_token", "<pad>")
    return str(token.get("content") if isinstance(token, dict) else token)
