"""Makes the references of models that embed texts too, CLIP and SigLIP, with tokenizers of a few dozen tokens.

    python tests/weights/make_text_references.py

It takes what make_references.py takes. Written with transformers 5.24.0 and tokenizers 0.23.3.
"""

from pathlib import Path

import numpy as np
import torch
import transformers as hf
from make_references import HUGGING_FACE, images, randomise
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

FOLDER = Path(__file__).resolve().parent / "references_text"
VISION = {key: value for key, value in HUGGING_FACE.items() if key != "num_labels"}
TEXT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
LENGTH = 12
TEXTS = ["a cat", "a photo of a tiny dog", "Cats,  and DOGS!", "cat, dog, cat, dog, cat, dog, cat, dog, cat, dog, cat"]
LETTERS = "abcdefghijklmnopqrstuvwxyz,!?."


def write(name, model, ids):
    """A model's files but for the tokenizer, and the numbers for the texts of these ids."""
    with torch.no_grad():  # so that texts and images are not all alike
        model.logit_scale.fill_(2.5)
        model.text_model.embeddings.token_embedding.weight.mul_(4)
    model.save_pretrained(FOLDER / name)
    outputs = model(input_ids=ids, pixel_values=images())
    arrays = {"inputs": images().permute(0, 2, 3, 1), "ids": ids, "text_features": outputs.text_embeds}
    arrays |= {"image_features": outputs.image_embeds, "logits": outputs.logits_per_image}
    np.savez(FOLDER / name / "numbers.npz", **{key: value.detach().numpy() for key, value in arrays.items()})


def clip():
    letters = [letter + end for letter in LETTERS for end in ("", "</w>")]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("o", "f</w>"), ("p", "h")]
    tokens = [*letters, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = hf.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(FOLDER / "clip")
    ids = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt").input_ids
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = {**TEXT, "vocab_size": len(tokens), "max_position_embeddings": LENGTH, **ends}
    config = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6)
    write("clip", randomise(hf.CLIPModel(config), 400), ids)


def siglip():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in LETTERS), ("▁", -3.0), ("▁cat", -2.0)]
    backend = Tokenizer(models.Unigram([*pieces, ("▁a", -2.0), ("dog", -2.0)], unk_id=0))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_max_length": LENGTH}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(FOLDER / "siglip")
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = {**TEXT, "vocab_size": len(pieces) + 2, "max_position_embeddings": LENGTH, "projection_size": 12}
    model = randomise(hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=VISION)), 401)
    write("siglip", model, ids)


if __name__ == "__main__":
    torch.set_num_threads(1)
    clip()
    siglip()
