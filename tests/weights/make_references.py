"""Makes references/: tiny models of timm and transformers with random weights, what goes in and what comes out.

    python tests/weights/make_references.py

It takes torch, timm, transformers and safetensors (timm wants torchvision too; where there is none, a stub does); the
tests read what it has written and need none of them. Written with torch 2.13.0, timm 1.0.31, transformers 5.23.0.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent / "references"
SIZE = {"embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "img_size": 12, "patch_size": 4, "num_classes": 5}
SIZES = (32, 32), (48, 64), (24, 40)  # of models for images of any size
HUGGING_FACE = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 24,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 5,
}


class _Anything(type):
    """A class whose attributes are classes like it."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return torch.nn.Module if name == "FrozenBatchNorm2d" else _Anything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        ours = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def stub_torchvision():
    """Lets timm be imported where torchvision is not installed: no Vision Transformer uses it."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())


def randomise(model, seed):
    """Every parameter drawn, none left at the zeros and ones that some start at."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(channels=3):
    return torch.randn(2, channels, 12, 12, generator=torch.Generator().manual_seed(9))


def record(name, arrays, config, outputs, inputs=None):
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().clone().contiguous() for key, value in arrays.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    pictures = (images() if inputs is None else inputs).permute(0, 2, 3, 1)
    np.savez(folder / "numbers.npz", inputs=pictures.numpy(), outputs=outputs.detach().numpy())


def timm_models():
    stub_torchvision()
    import timm.models.deit as deit
    from timm.layers import HybridEmbed, StdConv2dSame, SwiGLUPacked
    from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
    from timm.models.vision_transformer import VisionTransformer

    plain = {
        "timm_vit": {},
        "timm_headless": {"num_classes": 0},
        "timm_grey": {"in_chans": 1},
        "timm_registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
        "timm_registers_with_rows": {"reg_tokens": 2},
        "timm_map": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
        "timm_fc_norm": {"global_pool": "avg"},
        "timm_gap": {"class_token": False, "global_pool": "avg", "fc_norm": False, "qkv_bias": False},
        "timm_unpooled": {"class_token": False, "global_pool": ""},
        "timm_qk_norm": {"qk_norm": True, "global_pool": "avg", "reg_tokens": 1, "pos_embed": "none"},
        "timm_swiglu": {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "init_values": 1e-5},
        "timm_wide": {"img_size": (12, 20)},
    }
    for seed, (name, fields) in enumerate(plain.items()):
        model = randomise(VisionTransformer(**{**SIZE, **fields}), seed)
        arguments = {
            key: value for key, value in {**SIZE, **fields}.items() if isinstance(value, int | str | list | tuple)
        }
        config = {
            "architecture": "vit_base_patch16_224",
            "num_features": 12,
            "global_pool": model.global_pool,
            "model_args": {key: arguments[key] for key in arguments if key not in ("num_classes", "global_pool")},
        }
        if name == "timm_swiglu":
            config["architecture"] = "vit_giant_patch14_dinov2"
        inputs = images(fields.get("in_chans", 3))
        if name == "timm_wide":
            inputs = torch.cat([inputs, inputs[..., :8].flip(-1)], dim=-1)
        record(name, model.state_dict(), config, model(inputs), inputs)
    # Stems as of Google's hybrids, but for their size.
    for seed, (name, layers) in enumerate({"timm_hybrid": (1,), "timm_hybrid_root": ()}.items(), start=60):
        same = partial(StdConv2dSame, eps=1e-8)
        if layers:
            small = {"channels": (128,), "stem_chs": 32, "num_classes": 0, "global_pool": "", "preact": False}
            backbone = ResNetV2(layers=layers, **small, stem_type="same", conv_layer=same)
        else:
            backbone = create_resnetv2_stem(3, stem_type="same", out_chs=32, preact=False, conv_layer=same)
        fields = {**SIZE, "img_size": 16, "patch_size": 2, "embed_layer": partial(HybridEmbed, backbone=backbone)}
        inputs = torch.cat([images(), images().flip(-1)], dim=-1)[..., :16]
        inputs = torch.cat([inputs, inputs.flip(-2)], dim=-2)[..., :16, :]
        model = randomise(VisionTransformer(**fields), seed)
        record(name, model.state_dict(), {**config, "model_args": {"num_heads": 3}}, model(inputs), inputs)
    model = randomise(deit.VisionTransformerDistilled(**SIZE), 50)
    record("timm_distilled", model.state_dict(), None, model(images()))


def timm_kin():
    """Models of eva.py and beit.py, and those of vision_transformer.py that other projects have trained."""
    from timm.layers import LayerNorm, QuickGELU, RmsNorm, SwiGLU
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    five = partial(LayerNorm, eps=1e-5)
    clip = {"pre_norm": True, "norm_layer": five}
    dinov3 = {"num_classes": 0, "img_size": 32, "patch_size": 8, "dynamic_img_size": True, "global_pool": "token"}
    dinov3 |= {"qkv_bias": False, "init_values": 1e-5, "rope_type": "dinov3", "rope_temperature": 100}
    dinov3 |= {"rope_rotate_half": True, "use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_reg_tokens": 4}
    dinov3 |= {"use_fc_norm": False, "norm_layer": five}
    eva02 = {"swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}
    rope = {"attn_type": "rope", "init_values": 1e-5, "global_pool": "token", "use_rot_pos_emb": True}
    rope |= {"rope_grid_indexing": "xy", "rope_temperature": 100.0}
    pe = {"embed_dim": 24, "attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True}
    pe |= {"ref_feat_shape": (3, 3), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy", "norm_layer": five}
    models = {
        "timm_dinov3": (Eva, "vit_small_patch16_dinov3", dinov3),
        "timm_dinov3_qkvb": (Eva, "vit_small_patch16_dinov3_qkvb", {**dinov3, "qkv_bias": True}),
        "timm_dinov3_swiglu": (
            Eva,
            "vit_small_plus_patch16_dinov3",
            {**dinov3, "swiglu_mlp": True, "swiglu_align_to": 8},
        ),
        "timm_eva": (Eva, "eva_giant_patch14_224", {}),
        "timm_eva02": (
            Eva,
            "eva02_large_patch14_clip_224",
            {**eva02, "qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token"},
        ),
        "timm_eva02_small": (Eva, "eva02_small_patch14_224", eva02),
        "timm_rope": (Eva, "vit_small_patch16_rope_224", {**rope, "use_abs_pos_emb": False}),
        "timm_rope_ape": (Eva, "vit_small_patch16_rope_ape_224", {**rope, "no_embed_class": True}),
        "timm_rope_registers": (
            Eva,
            "vit_base_patch16_rope_reg1_gap_256",
            {"init_values": 1e-5, "class_token": False, "num_reg_tokens": 1, "use_rot_pos_emb": True}
            | {"use_abs_pos_emb": False, "ref_feat_shape": (16, 16)},
        ),
        "timm_pe": (Eva, "vit_pe_core_base_patch16_224", {**pe, "global_pool": "map", "attn_pool_num_heads": 8}),
        "timm_pe_spatial": (
            Eva,
            "vit_pe_spatial_base_patch16_512",
            {**pe, "use_post_transformer_norm": False, "use_fc_norm": False, "num_classes": 0, "global_pool": "token"},
        ),
        "timm_beit": (
            Beit,
            "beit_base_patch16_224",
            {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1},
        ),
        "timm_beit_shared": (
            Beit,
            "beit_base_patch16_224",
            {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "init_values": 0.1, "global_pool": "token"},
        ),
        "timm_beit3": (
            VisionTransformer,
            "beit3_base_patch16_224",
            {"scale_attn_norm": True, "scale_mlp_norm": True, "norm_layer": five, "global_pool": "avg"},
        ),
        "timm_clip": (VisionTransformer, "vit_base_patch16_clip_224", clip),
        "timm_clip_quickgelu": (
            VisionTransformer,
            "vit_base_patch16_clip_quickgelu_224",
            {**clip, "act_layer": QuickGELU},
        ),
        "timm_aimv2": (
            VisionTransformer,
            "aimv2_large_patch14_224",
            {"class_token": False, "fc_norm": False, "qkv_bias": False, "proj_bias": False, "global_pool": "avg"}
            | {"norm_layer": partial(RmsNorm, eps=1e-5), "embed_norm_layer": partial(RmsNorm, eps=1e-5)}
            | {"act_layer": "silu", "mlp_layer": SwiGLU, "num_classes": 0},
        ),
        "timm_radio": (
            VisionTransformer,
            "vit_base_patch16_radio_v3",
            {"reg_tokens": 7, "no_embed_class": True, "init_values": 1e-5, "final_norm": False, "num_classes": 0},
        ),
    }
    for seed, (name, (kind, architecture, fields)) in enumerate(models.items(), start=200):
        fields = {**SIZE, "mlp_ratio": 2, **fields}
        if name.startswith("timm_rope") and "class_token" not in fields:
            fields["use_fc_norm"] = False
        model = randomise(kind(**fields), seed)
        if name.startswith("timm_pe"):  # wider, with larger numbers
            for parameter in model.parameters():
                parameter.data /= 2
        config = {"architecture": architecture, "num_features": fields["embed_dim"], "global_pool": model.global_pool}
        recorded = ("img_size", "ref_feat_shape", "attn_pool_num_heads")
        config["model_args"] = {"num_heads": 3} | {key: fields[key] for key in recorded if key in fields}
        if not name.startswith("timm_dinov3"):
            inputs = images()
            record(name, model.state_dict(), config, model(inputs), inputs)
            continue
        # All tokens, at three sizes.
        generator = torch.Generator().manual_seed(seed)
        pictures = {
            f"{height}x{width}": torch.randn(2, 3, height, width, generator=generator) for height, width in SIZES
        }
        record(name, model.state_dict(), config, model.forward_features(pictures["32x32"]), pictures["32x32"])
        recorded = {f"inputs_{key}": value.permute(0, 2, 3, 1).numpy() for key, value in pictures.items()}
        recorded |= {
            f"outputs_{key}": model.forward_features(value).detach().numpy() for key, value in pictures.items()
        }
        np.savez(FOLDER / name / "sizes.npz", **recorded)


def hugging_face_models():
    import transformers as hf

    small = {**HUGGING_FACE, "mlp_ratio": 2}
    made = {
        "hf_vit": (hf.ViTModel, hf.ViTConfig(**HUGGING_FACE)),
        "hf_vit_classifier": (hf.ViTForImageClassification, hf.ViTConfig(**HUGGING_FACE, qkv_bias=False)),
        "hf_vit_tanh": (hf.ViTForImageClassification, hf.ViTConfig(**HUGGING_FACE, hidden_act="gelu_new")),
        "hf_deit": (hf.DeiTForImageClassification, hf.DeiTConfig(**HUGGING_FACE)),
        "hf_deit_teacher": (hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig(**HUGGING_FACE)),
        "hf_dinov2": (hf.Dinov2Model, hf.Dinov2Config(**small)),
        "hf_dinov2_classifier": (hf.Dinov2ForImageClassification, hf.Dinov2Config(**small)),
        "hf_dinov2_registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**small)),
        "hf_dinov2_registers_swiglu": (
            hf.Dinov2WithRegistersModel,
            hf.Dinov2WithRegistersConfig(**small, use_swiglu_ffn=True),
        ),
        "hf_mae": (hf.ViTMAEModel, hf.ViTMAEConfig(**HUGGING_FACE, mask_ratio=0.0)),
        "hf_mae_pretraining": (
            hf.ViTMAEForPreTraining,
            hf.ViTMAEConfig(
                **HUGGING_FACE,
                mask_ratio=0.0,
                decoder_hidden_size=8,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=8,
            ),
        ),
    }
    for seed, (name, (kind, config)) in enumerate(made.items(), start=100):
        model = randomise(kind(config), seed)
        model.save_pretrained(FOLDER / name)
        arrays, config = read(FOLDER / name)
        record(name, arrays, config, output(model, name))
        if name in ("hf_vit_classifier", "hf_dinov2_registers_swiglu"):
            # The names that the modules of transformers 5 have themselves; no config.json says how many heads.
            record(f"{name}_state_dict", model.state_dict(), None, output(model, name))


def read(folder):
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    keys = ("model_type", "hidden_act", "layer_norm_eps", "image_size", "hidden_size", "num_attention_heads")
    keys += ("num_hidden_layers", "num_register_tokens")
    return load_file(folder / "model.safetensors"), {key: config[key] for key in keys if key in config}


def output(model, name):
    if "mae" in name:
        encoder = getattr(model, "vit", model)
        # Nothing is masked, but tokens are shuffled by this: in order.
        noise = torch.arange(9.0).expand(2, 9)
        return encoder(images(), noise=noise).last_hidden_state
    outputs = getattr(model, "dinov2", model)(images()) if "dinov2" in name else model(images())
    if name == "hf_deit_teacher":
        return model.deit(images()).last_hidden_state[:, 0]
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state


if __name__ == "__main__":
    torch.set_num_threads(1)
    hugging_face_models()  # first: transformers would take the stub for torchvision itself
    timm_models()
    timm_kin()
