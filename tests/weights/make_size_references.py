"""Makes sizes.npz of some references: what timm and transformers compute for images of other sizes than trained on.

    python tests/weights/make_size_references.py

It takes what make_references.py takes, and the directories that it and make_tower_references.py have written. Both
libraries resample learned positions, each in its own way.
"""

import json

import numpy as np
import torch
from make_references import FOLDER, HUGGING_FACE, stub_torchvision
from make_tower_references import TEXT, VISION
from safetensors.torch import load_file

SIZES = (8, 12), (20, 16), (24, 24)


def record(name, apply):
    """Writes the outputs of a function of images [batch, channels, height, width], for each size."""
    generator, recorded = torch.Generator().manual_seed(7), {}
    for height, width in SIZES:
        pictures = torch.randn(2, 3, height, width, generator=generator)
        recorded[f"inputs_{height}x{width}"] = pictures.permute(0, 2, 3, 1).numpy()
        recorded[f"outputs_{height}x{width}"] = apply(pictures).detach().numpy()
    np.savez(FOLDER / name / "sizes.npz", **recorded)


def hugging_face():
    import transformers as hf

    both = {"text_config": TEXT, "vision_config": VISION}
    small = {**HUGGING_FACE, "mlp_ratio": 2}
    kinds = {
        "hf_vit_classifier": (hf.ViTForImageClassification, hf.ViTConfig(**HUGGING_FACE, qkv_bias=False)),
        "hf_deit": (hf.DeiTForImageClassification, hf.DeiTConfig(**HUGGING_FACE)),
        "hf_dinov2_classifier": (hf.Dinov2ForImageClassification, hf.Dinov2Config(**small)),
        "hf_dinov2_registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**small)),
        "clip_classifier": (hf.CLIPForImageClassification, hf.CLIPConfig(**both, num_labels=5)),
        "siglip": (hf.SiglipModel, hf.SiglipConfig(**both)),
    }
    for name, (kind, config) in kinds.items():
        model = kind.from_pretrained(FOLDER / name, config=config).eval()
        if "dinov2" in name:  # always
            apply = model
        else:
            tower = {"clip_classifier": "vision_model", "siglip": "vision_model"}.get(name)
            model = getattr(model, tower) if tower else model

            def apply(pictures, model=model):
                return model(pictures, interpolate_pos_encoding=True)

        def result(pictures, apply=apply, name=name):
            outputs = apply(pictures)
            if name == "siglip":
                return outputs.pooler_output
            return outputs.logits if "logits" in outputs else outputs.last_hidden_state

        record(name, result)


def timm():
    from timm.layers import LayerNorm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    names = ("timm_vit", "timm_registers", "timm_map", "timm_clip", "timm_eva02")
    for name in names:
        config = json.loads((FOLDER / name / "config.json").read_text())
        arrays = load_file(FOLDER / name / "model.safetensors")
        fields = {"embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "img_size": 12, "patch_size": 4}
        fields |= {"num_classes": 5, "global_pool": config["global_pool"], "dynamic_img_size": True}
        kept = ("class_token", "reg_tokens", "no_embed_class", "act_layer")
        fields |= {key: value for key, value in config["model_args"].items() if key in kept}
        fields |= {"init_values": 1e-5} if "blocks.0.ls1.gamma" in arrays else {}
        kind = VisionTransformer
        if name == "timm_clip":
            fields |= {"pre_norm": True, "norm_layer": lambda width, **kw: LayerNorm(width, eps=1e-5, **kw)}
        if name == "timm_eva02":
            kind = Eva
            fields |= {"swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16), "qkv_fused": False}
            fields |= {"scale_mlp": True, "scale_attn_inner": True}
        model = kind(**fields)
        model.load_state_dict(arrays)
        record(name, model.eval())


if __name__ == "__main__":
    torch.set_num_threads(1)
    hugging_face()  # first: transformers would take the stub for torchvision itself
    stub_torchvision()
    timm()
