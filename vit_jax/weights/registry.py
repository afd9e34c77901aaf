"""The families of models whose files are read: whose names, examples, and what each is checked against.

docs/weights.md has the table; a test checks that every recording exists and is that of one row.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """Models with the same names of arrays and the same architecture.

    Attributes:
        models: which ones they are.
        naming: whose names of arrays.
        examples: names of published files, as `weights.load` takes them or as their authors call them.
        recordings: directories of tests/weights/references, with what another library computes for random weights.
        checked_against: that library.
        licence: of published weights.
        tolerance: absolute, of logits, pooled features and tokens in float32.
        notes: what a user should know.
    """

    models: str
    naming: str
    examples: tuple[str, ...]
    recordings: tuple[str, ...]
    checked_against: str
    licence: str
    tolerance: float = 1e-5
    notes: str = ""


TRANSFORMERS, TIMM = "transformers", "timm"

FAMILIES = (
    Family(
        "ViT, DeiT, DINO, MSN, MAE",
        "Hugging Face",
        ("google/vit-base-patch16-224", "facebook/deit-base-distilled-patch16-224", "facebook/vit-mae-base"),
        ("hf_vit", "hf_vit_classifier", "hf_vit_classifier_state_dict", "hf_vit_tanh", "hf_deit", "hf_deit_teacher")
        + ("hf_mae", "hf_mae_pretraining"),
        TRANSFORMERS,
        "Apache 2.0; MAE: CC BY-NC 4.0",
        notes="the logits of a distilled DeiT are the mean of its two heads",
    ),
    Family(
        "DINOv2, with and without registers",
        "Hugging Face",
        ("facebook/dinov2-base", "facebook/dinov2-with-registers-giant", "facebook/dinov2-base-imagenet1k-1-layer"),
        ("hf_dinov2", "hf_dinov2_classifier", "hf_dinov2_registers", "hf_dinov2_registers_swiglu")
        + ("hf_dinov2_registers_swiglu_state_dict",),
        TRANSFORMERS,
        "Apache 2.0",
    ),
    Family(
        "CLIP, MetaCLIP",
        "Hugging Face",
        ("openai/clip-vit-base-patch32", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "facebook/metaclip-b16-fullcc2.5b"),
        ("clip", "clip_vision", "clip_classifier"),
        TRANSFORMERS,
        "MIT; MetaCLIP: CC BY-NC 4.0",
        notes="the head is the projection to image embeddings; all tokens (pooling 'none') have passed the last norm",
    ),
    Family(
        "SigLIP, SigLIP 2",
        "Hugging Face",
        ("google/siglip-base-patch16-224", "google/siglip2-base-patch16-224", "google/siglip2-base-patch16-naflex"),
        ("siglip", "siglip_classifier", "siglip2_naflex"),
        TRANSFORMERS,
        "Apache 2.0",
        notes="NaFlex: for images of the grid that its positions are for, 256x256 pixels with patches of 16",
    ),
    Family(
        "DINOv3",
        "Hugging Face",
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", "facebook/dinov3-vit7b16-pretrain-lvd1689m"),
        ("dinov3", "dinov3_swiglu", "dinov3_swiglu_state_dict"),
        TRANSFORMERS,
        "DINOv3 License",
        notes="for images of any size and shape",
    ),
    Family(
        "BEiT, data2vec",
        "Hugging Face",
        ("microsoft/beit-base-patch16-224", "facebook/data2vec-vision-base-ft1k"),
        ("beit", "beit_state_dict", "beit_shared", "data2vec"),
        TRANSFORMERS,
        "Apache 2.0",
    ),
    Family(
        "AIMv2",
        "Hugging Face",
        ("apple/aimv2-large-patch14-224-lit",),
        ("aimv2",),
        TRANSFORMERS,
        "Apple's, as each repository says",
        notes="without the attention pooling of some of them, whose query is not projected: classes=None",
    ),
    Family(
        "InternViT",
        "Hugging Face (InternVL), and its own",
        ("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternViT-300M-448px"),
        ("internvl",),
        TRANSFORMERS,
        "MIT",
        notes="without a norm after the blocks; InternViT-6B, which normalizes queries and keys, is refused",
    ),
    Family(
        "CLIP",
        "OpenAI, OpenCLIP",
        ("ViT-B-32.pt of OpenAI", "open_clip_model.safetensors of laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("openai", "openclip", "openclip_quickgelu"),
        "open_clip",
        "MIT",
        notes="quick GELU in OpenAI's files and where open_clip_config.json says so; towers of timm (visual.trunk) too",
    ),
    Family(
        "ViT, SWAG",
        "torchvision",
        ("vit_b_16-c867db91.pth", "vit_l_16_swag-4f3808c9.pth"),
        ("torchvision", "torchvision_pre_logits"),
        "torchvision",
        "BSD 3-Clause; SWAG: CC BY-NC 4.0",
    ),
    Family(
        "ViT, AugReg, DeiT, DeiT III, DINO, DINOv2, MAE, SigLIP, hybrids",
        "timm",
        ("augreg-b16-in21k", "dinov2-b14", "siglip2-b16-224"),
        ("timm_vit", "timm_headless", "timm_grey", "timm_registers", "timm_registers_with_rows", "timm_map")
        + ("timm_fc_norm", "timm_gap", "timm_unpooled", "timm_qk_norm", "timm_swiglu", "timm_wide", "timm_distilled")
        + ("timm_hybrid", "timm_hybrid_root"),
        TIMM,
        "as published.md says",
    ),
    Family(
        "CLIP, AIMv2, BEiT-3, RADIO",
        "timm",
        ("timm/vit_base_patch16_clip_224.openai", "timm/aimv2_large_patch14_224.apple_pt"),
        ("timm_clip", "timm_clip_quickgelu", "timm_aimv2", "timm_beit3", "timm_radio"),
        TIMM,
        "as each repository says",
    ),
    Family(
        "EVA, EVA-02, RoPE-ViT, Perception Encoder",
        "timm",
        ("timm/eva02_large_patch14_224.mim_in22k", "timm/vit_pe_core_base_patch16_224.fb"),
        ("timm_eva", "timm_eva02", "timm_eva02_small", "timm_rope", "timm_rope_ape", "timm_rope_registers")
        + ("timm_pe", "timm_pe_spatial"),
        TIMM,
        "as each repository says",
    ),
    Family(
        "DINOv3",
        "timm, and Meta's own",
        ("timm/vit_base_patch16_dinov3.lvd1689m", "dinov3_vitb16_pretrain_lvd1689m.pth"),
        ("timm_dinov3", "timm_dinov3_qkvb", "timm_dinov3_swiglu"),
        TIMM,
        "DINOv3 License",
        notes="for images of any size and shape",
    ),
    Family(
        "BEiT",
        "timm",
        ("timm/beit_base_patch16_224.in22k_ft_in22k_in1k",),
        ("timm_beit", "timm_beit_shared"),
        TIMM,
        "as each repository says",
    ),
)
