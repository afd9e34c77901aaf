"""Makes the references of image towers of transformers, open_clip and torchvision, as make_references.py the others.

    python tests/weights/make_tower_references.py

It takes what make_references.py takes, and torchvision 0.28 and open_clip_torch 3.3, whose compiled operators and
tokenizer no image tower needs. OpenAI's CLIP is open_clip's model of the same names, with OpenAI's three numbers.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from make_references import FOLDER, HUGGING_FACE, images, randomise
from safetensors.torch import load_file, save_file

VISION = {key: value for key, value in HUGGING_FACE.items() if key != "num_labels"}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
TEXT |= {"max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1}
SIZES = (32, 32), (48, 64), (24, 40)  # of models for images of any size


def write(name, arrays, config, recorded, config_name="config.json"):
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().clone().contiguous() for key, value in arrays.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / config_name).write_text(json.dumps(config, indent=1) + "\n")
    recorded = {"inputs": images().permute(0, 2, 3, 1), **recorded}
    np.savez(folder / "numbers.npz", **{key: value.detach().numpy() for key, value in recorded.items()})


def save(model, name):
    """The arrays of a model by the names that transformers writes, and its config without what is not read."""
    model.save_pretrained(FOLDER / name)
    arrays = load_file(FOLDER / name / "model.safetensors")
    config = json.loads((FOLDER / name / "config.json").read_text())
    config.pop("text_config", None)
    return arrays, config


def hugging_face():
    import transformers as hf

    both = {"text_config": TEXT, "vision_config": VISION}
    pictures = images()

    clip = randomise(hf.CLIPModel(hf.CLIPConfig(**both, projection_dim=6)), 300)
    outputs = clip.vision_model(pictures)
    tokens = clip.vision_model.post_layernorm(outputs.last_hidden_state)
    recorded = {"outputs": clip.visual_projection(outputs.pooler_output), "pooled": outputs.pooler_output}
    arrays, config = save(clip, "clip")
    # As in files of old, with the buffer of positions; keys with transformers' default values are not there.
    arrays["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    config["vision_config"] = {key: config["vision_config"][key] for key in (*VISION, "projection_dim")}
    write("clip", arrays, config, {**recorded, "tokens": tokens})

    tower = randomise(hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION, hidden_act="gelu")), 301)
    outputs = tower(pictures)
    tokens = tower.post_layernorm(outputs.last_hidden_state)
    write("clip_vision", *save(tower, "clip_vision"), {"outputs": outputs.pooler_output, "tokens": tokens})

    model = randomise(hf.CLIPForImageClassification(hf.CLIPConfig(**both, num_labels=5)), 302)
    write("clip_classifier", *save(model, "clip_classifier"), {"outputs": model(pictures).logits})

    siglip = randomise(hf.SiglipModel(hf.SiglipConfig(**both)), 303)
    outputs = siglip.vision_model(pictures)
    recorded = {"outputs": outputs.pooler_output, "tokens": outputs.last_hidden_state}
    write("siglip", *save(siglip, "siglip"), recorded)

    model = randomise(hf.SiglipForImageClassification(hf.SiglipConfig(**both, num_labels=5)), 304)
    write("siglip_classifier", *save(model, "siglip_classifier"), {"outputs": model(pictures).logits})

    flexible = {key: value for key, value in VISION.items() if key != "image_size"}
    tower = randomise(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**flexible, num_patches=9)), 305)
    patches = pictures.permute(0, 2, 3, 1).reshape(2, 3, 4, 3, 4, 3).transpose(2, 3).reshape(2, 9, 48)
    outputs = tower(patches, torch.ones(2, 9, dtype=torch.long), torch.tensor([[3, 3]] * 2))
    recorded = {"outputs": outputs.pooler_output, "tokens": outputs.last_hidden_state}
    write("siglip2_naflex", *save(tower, "siglip2_naflex"), recorded)

    kinds = {"dinov3": {}, "dinov3_swiglu": {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 4}}
    for seed, (name, fields) in enumerate(kinds.items(), start=306):
        fields = {**VISION, "image_size": 32, "patch_size": 8, "num_register_tokens": 2, **fields}
        tower = randomise(hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**fields)), seed)
        generator, recorded = torch.Generator().manual_seed(seed), {}
        for height, width in SIZES if name == "dinov3" else SIZES[:1]:
            pictures = torch.randn(2, 3, height, width, generator=generator)
            recorded |= {f"inputs_{height}x{width}": pictures.permute(0, 2, 3, 1)}
            recorded |= {f"tokens_{height}x{width}": tower(pictures).last_hidden_state}
        first = f"{SIZES[0][0]}x{SIZES[0][1]}"
        recorded |= {"inputs": recorded[f"inputs_{first}"], "outputs": recorded[f"tokens_{first}"][:, 0]}
        arrays, config = save(tower, name)
        write(name, arrays, config, recorded)
    # The names that the modules of transformers 5 have themselves, without a config.json.
    write("dinov3_swiglu_state_dict", tower.state_dict(), None, recorded)


def hugging_face_kin():
    import transformers as hf

    relative = {**HUGGING_FACE, "use_relative_position_bias": True, "use_mean_pooling": True}
    shared = {**VISION, "use_shared_relative_position_bias": True, "use_mean_pooling": False}
    kinds = {
        "beit": (hf.BeitForImageClassification, hf.BeitConfig(**relative)),
        "beit_shared": (hf.BeitModel, hf.BeitConfig(**shared)),
        "data2vec": (hf.Data2VecVisionForImageClassification, hf.Data2VecVisionConfig(**relative)),
        "aimv2": (hf.Aimv2VisionModel, hf.Aimv2VisionConfig(**VISION, use_head=False)),
        "internvl": (hf.InternVLVisionModel, hf.InternVLVisionConfig(**VISION, attention_bias=True)),
    }
    for seed, (name, (kind, config)) in enumerate(kinds.items(), start=330):
        model = randomise(kind(config), seed)
        outputs = model(images())
        if "logits" in outputs:
            recorded = {"outputs": outputs.logits}
        else:
            tokens = outputs.last_hidden_state
            pooled = {"beit_shared": tokens[:, 0], "aimv2": tokens.mean(1), "internvl": tokens[:, 1:].mean(1)}[name]
            recorded = {"outputs": pooled, "tokens": tokens}
        write(name, *save(model, name), recorded)
        if name == "beit":
            write(f"{name}_state_dict", model.state_dict(), None, recorded)


def heads_on_two_features():
    """The logits of models whose recordings have only features."""
    import transformers as hf

    kinds = {
        "hf_deit_teacher": (hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig(**HUGGING_FACE)),
        "hf_dinov2_classifier": (hf.Dinov2ForImageClassification, hf.Dinov2Config(**HUGGING_FACE, mlp_ratio=2)),
    }
    for name, (kind, config) in kinds.items():
        model = kind.from_pretrained(FOLDER / name, config=config).eval()
        np.savez(FOLDER / name / "logits.npz", logits=model(images()).logits.detach().numpy())


def torchvision():
    from torchvision.models.vision_transformer import VisionTransformer

    size = {"image_size": 12, "patch_size": 4, "num_layers": 2, "num_heads": 3, "hidden_dim": 12, "mlp_dim": 24}
    for seed, (name, fields) in enumerate(
        {"torchvision": {}, "torchvision_pre_logits": {"representation_size": 7}}.items()
    ):
        model = randomise(VisionTransformer(**size, num_classes=5, **fields), 310 + seed)
        tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(images())], dim=1)
        recorded = {"outputs": model(images()), "tokens": model.encoder(tokens)}
        write(name, model.state_dict(), None, recorded)


def open_clip():
    package = types.ModuleType("open_clip")  # without its tokenizer, and what that needs
    package.__path__ = [str(Path(importlib.util.find_spec("open_clip").origin).parent)]
    sys.modules["open_clip"] = package
    from open_clip.transformer import QuickGELU, VisionTransformer

    size = {"image_size": 12, "patch_size": 4, "layers": 2, "heads": 3, "width": 12, "mlp_ratio": 2, "output_dim": 6}
    config = {
        "embed_dim": 6,
        "vision_cfg": {"image_size": 12, "layers": 2, "width": 12, "patch_size": 4, "head_width": 4},
    }
    config = {"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    quick = {**config, "model_cfg": {**config["model_cfg"], "quick_gelu": True}}
    kinds = {
        "openai": ({"act_layer": QuickGELU}, None),
        "openclip": ({"ls_init_value": 1e-5}, config),
        "openclip_quickgelu": ({"act_layer": QuickGELU}, quick),
    }
    for seed, (name, (fields, config)) in enumerate(kinds.items(), start=320):
        model = randomise(VisionTransformer(**size, **fields, output_tokens=True), seed)
        embeddings, patches = model(images())
        arrays = {f"visual.{key}": value for key, value in model.state_dict().items()}
        arrays |= {"logit_scale": torch.tensor(3.0), "text_projection": torch.ones(8, 6)}
        arrays |= {"transformer.resblocks.0.attn.in_proj_weight": torch.ones(24, 8), "ln_final.weight": torch.ones(8)}
        arrays |= {"positional_embedding": torch.ones(6, 8), "token_embedding.weight": torch.ones(20, 8)}
        if name == "openai":
            recorded = {"input_resolution": 12, "context_length": 6, "vocab_size": 20}
            arrays |= {key: torch.tensor(value) for key, value in recorded.items()}
        write(name, arrays, config, {"outputs": embeddings, "patches": patches}, "open_clip_config.json")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("no compiled operators")
    hugging_face()
    hugging_face_kin()
    heads_on_two_features()
    torchvision()
    open_clip()
