"""Short names of published models, and their repositories on the Hugging Face hub.

A name consists of family and model, and the image size if there are several: augreg-b16-384 is B/16 for images of 384
pixels. In `augreg` and `vit`, -in21k is pre-trained on ImageNet-21k; a name with an image size only is fine-tuned from
that on ImageNet-1k; -in1k is trained on ImageNet-1k only. In `deit3`, -in21k is pre-trained on ImageNet-21k and
fine-tuned on ImageNet-1k; a name with an image size only is trained on ImageNet-1k only. `dino`, `dinov2`, `mae`,
`siglip` and `siglip2` are encoders without a classifier, except -in1k.

The files are timm's conversions of the authors' files, in the repositories timm/ID listed by timm 1.0.31.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
    """A model on the Hugging Face hub.

    Attributes:
        hub: its repository, owner/name.
        source: the authors and the paper.
        licence: as stated in the repository.
    """

    hub: str
    source: str
    licence: str


_FAMILIES: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "Google, How to train your ViT? (arXiv 2106.10270)",
        "apache-2.0",
        {
            "augreg-ti16-224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            "augreg-ti16-384": "vit_tiny_patch16_384.augreg_in21k_ft_in1k",
            "augreg-ti16-in21k": "vit_tiny_patch16_224.augreg_in21k",
            "augreg-s32-224": "vit_small_patch32_224.augreg_in21k_ft_in1k",
            "augreg-s32-384": "vit_small_patch32_384.augreg_in21k_ft_in1k",
            "augreg-s32-in21k": "vit_small_patch32_224.augreg_in21k",
            "augreg-s16-224": "vit_small_patch16_224.augreg_in21k_ft_in1k",
            "augreg-s16-384": "vit_small_patch16_384.augreg_in21k_ft_in1k",
            "augreg-s16-in21k": "vit_small_patch16_224.augreg_in21k",
            "augreg-s16-in1k-224": "vit_small_patch16_224.augreg_in1k",
            "augreg-s16-in1k-384": "vit_small_patch16_384.augreg_in1k",
            "augreg-b32-224": "vit_base_patch32_224.augreg_in21k_ft_in1k",
            "augreg-b32-384": "vit_base_patch32_384.augreg_in21k_ft_in1k",
            "augreg-b32-in21k": "vit_base_patch32_224.augreg_in21k",
            "augreg-b32-in1k-224": "vit_base_patch32_224.augreg_in1k",
            "augreg-b32-in1k-384": "vit_base_patch32_384.augreg_in1k",
            "augreg-b16-224": "vit_base_patch16_224.augreg_in21k_ft_in1k",
            "augreg-b16-384": "vit_base_patch16_384.augreg_in21k_ft_in1k",
            "augreg-b16-in21k": "vit_base_patch16_224.augreg_in21k",
            "augreg-b16-in1k-224": "vit_base_patch16_224.augreg_in1k",
            "augreg-b16-in1k-384": "vit_base_patch16_384.augreg_in1k",
            "augreg-b8-224": "vit_base_patch8_224.augreg_in21k_ft_in1k",
            "augreg-b8-in21k": "vit_base_patch8_224.augreg_in21k",
            "augreg-l16-224": "vit_large_patch16_224.augreg_in21k_ft_in1k",
            "augreg-l16-384": "vit_large_patch16_384.augreg_in21k_ft_in1k",
            "augreg-l16-in21k": "vit_large_patch16_224.augreg_in21k",
            "augreg-r-ti16-224": "vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k",
            "augreg-r-ti16-384": "vit_tiny_r_s16_p8_384.augreg_in21k_ft_in1k",
            "augreg-r-ti16-in21k": "vit_tiny_r_s16_p8_224.augreg_in21k",
            "augreg-r26-s32-224": "vit_small_r26_s32_224.augreg_in21k_ft_in1k",
            "augreg-r26-s32-384": "vit_small_r26_s32_384.augreg_in21k_ft_in1k",
            "augreg-r26-s32-in21k": "vit_small_r26_s32_224.augreg_in21k",
            "augreg-r50-l32-224": "vit_large_r50_s32_224.augreg_in21k_ft_in1k",
            "augreg-r50-l32-384": "vit_large_r50_s32_384.augreg_in21k_ft_in1k",
            "augreg-r50-l32-in21k": "vit_large_r50_s32_224.augreg_in21k",
        },
    ),
    (
        "Google, An image is worth 16x16 words (arXiv 2010.11929)",
        "apache-2.0",
        {
            "vit-b32-in21k": "vit_base_patch32_224.orig_in21k",
            "vit-b16-224": "vit_base_patch16_224.orig_in21k_ft_in1k",
            "vit-b16-384": "vit_base_patch16_384.orig_in21k_ft_in1k",
            "vit-b16-in21k": "vit_base_patch16_224.orig_in21k",
            "vit-l32-384": "vit_large_patch32_384.orig_in21k_ft_in1k",
            "vit-l32-in21k": "vit_large_patch32_224.orig_in21k",
            "vit-l16-in21k": "vit_large_patch16_224.orig_in21k",
            "vit-h14-in21k": "vit_huge_patch14_224.orig_in21k",
            "vit-r50-b16-384": "vit_base_r50_s16_384.orig_in21k_ft_in1k",
            "vit-r50-b16-in21k": "vit_base_r50_s16_224.orig_in21k",
        },
    ),
    (
        "Google, When ViTs outperform ResNets without pre-training (arXiv 2106.01548)",
        "apache-2.0",
        {
            "sam-b32-224": "vit_base_patch32_224.sam_in1k",
            "sam-b16-224": "vit_base_patch16_224.sam_in1k",
        },
    ),
    (
        "Meta, Training data-efficient image transformers (arXiv 2012.12877)",
        "apache-2.0",
        {
            "deit-ti16-224": "deit_tiny_patch16_224.fb_in1k",
            "deit-s16-224": "deit_small_patch16_224.fb_in1k",
            "deit-b16-224": "deit_base_patch16_224.fb_in1k",
            "deit-b16-384": "deit_base_patch16_384.fb_in1k",
        },
    ),
    (
        "Meta, DeiT III: revenge of the ViT (arXiv 2204.07118)",
        "apache-2.0",
        {
            "deit3-s16-224": "deit3_small_patch16_224.fb_in1k",
            "deit3-s16-384": "deit3_small_patch16_384.fb_in1k",
            "deit3-s16-in21k-224": "deit3_small_patch16_224.fb_in22k_ft_in1k",
            "deit3-s16-in21k-384": "deit3_small_patch16_384.fb_in22k_ft_in1k",
            "deit3-m16-224": "deit3_medium_patch16_224.fb_in1k",
            "deit3-m16-in21k-224": "deit3_medium_patch16_224.fb_in22k_ft_in1k",
            "deit3-b16-224": "deit3_base_patch16_224.fb_in1k",
            "deit3-b16-384": "deit3_base_patch16_384.fb_in1k",
            "deit3-b16-in21k-224": "deit3_base_patch16_224.fb_in22k_ft_in1k",
            "deit3-b16-in21k-384": "deit3_base_patch16_384.fb_in22k_ft_in1k",
            "deit3-l16-224": "deit3_large_patch16_224.fb_in1k",
            "deit3-l16-384": "deit3_large_patch16_384.fb_in1k",
            "deit3-l16-in21k-224": "deit3_large_patch16_224.fb_in22k_ft_in1k",
            "deit3-l16-in21k-384": "deit3_large_patch16_384.fb_in22k_ft_in1k",
            "deit3-h14-224": "deit3_huge_patch14_224.fb_in1k",
            "deit3-h14-in21k-224": "deit3_huge_patch14_224.fb_in22k_ft_in1k",
        },
    ),
    (
        "Meta, Emerging properties in self-supervised ViTs (arXiv 2104.14294)",
        "apache-2.0",
        {
            "dino-s16": "vit_small_patch16_224.dino",
            "dino-s8": "vit_small_patch8_224.dino",
            "dino-b16": "vit_base_patch16_224.dino",
            "dino-b8": "vit_base_patch8_224.dino",
        },
    ),
    (
        "Meta, DINOv2 (arXiv 2304.07193); -reg: ViTs need registers (arXiv 2309.16588)",
        "apache-2.0",
        {
            "dinov2-s14": "vit_small_patch14_dinov2.lvd142m",
            "dinov2-s14-reg": "vit_small_patch14_reg4_dinov2.lvd142m",
            "dinov2-b14": "vit_base_patch14_dinov2.lvd142m",
            "dinov2-b14-reg": "vit_base_patch14_reg4_dinov2.lvd142m",
            "dinov2-l14": "vit_large_patch14_dinov2.lvd142m",
            "dinov2-l14-reg": "vit_large_patch14_reg4_dinov2.lvd142m",
            "dinov2-g14": "vit_giant_patch14_dinov2.lvd142m",
            "dinov2-g14-reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
        },
    ),
    (
        "Meta, Masked autoencoders are scalable vision learners (arXiv 2111.06377)",
        "cc-by-nc-4.0",
        {
            "mae-b16": "vit_base_patch16_224.mae",
            "mae-l16": "vit_large_patch16_224.mae",
            "mae-h14": "vit_huge_patch14_224.mae",
        },
    ),
    (
        "Google, Sigmoid loss for language image pre-training (arXiv 2303.15343)",
        "apache-2.0",
        {
            "siglip-b16-224": "vit_base_patch16_siglip_224.webli",
            "siglip-b16-256": "vit_base_patch16_siglip_256.webli",
            "siglip-b16-384": "vit_base_patch16_siglip_384.webli",
            "siglip-b16-512": "vit_base_patch16_siglip_512.webli",
            "siglip-l16-256": "vit_large_patch16_siglip_256.webli",
            "siglip-l16-384": "vit_large_patch16_siglip_384.webli",
            "siglip-so400m14-224": "vit_so400m_patch14_siglip_224.webli",
            "siglip-so400m14-378": "vit_so400m_patch14_siglip_378.webli",
            "siglip-so400m14-378-in1k": "vit_so400m_patch14_siglip_378.webli_ft_in1k",
            "siglip-so400m14-384": "vit_so400m_patch14_siglip_384.webli",
        },
    ),
    (
        "Google, SigLIP 2 (arXiv 2502.14786)",
        "apache-2.0",
        {
            "siglip2-b32-256": "vit_base_patch32_siglip_256.v2_webli",
            "siglip2-b16-224": "vit_base_patch16_siglip_224.v2_webli",
            "siglip2-b16-256": "vit_base_patch16_siglip_256.v2_webli",
            "siglip2-b16-384": "vit_base_patch16_siglip_384.v2_webli",
            "siglip2-b16-512": "vit_base_patch16_siglip_512.v2_webli",
            "siglip2-l16-256": "vit_large_patch16_siglip_256.v2_webli",
            "siglip2-l16-384": "vit_large_patch16_siglip_384.v2_webli",
            "siglip2-l16-512": "vit_large_patch16_siglip_512.v2_webli",
            "siglip2-so400m16-256": "vit_so400m_patch16_siglip_256.v2_webli",
            "siglip2-so400m16-384": "vit_so400m_patch16_siglip_384.v2_webli",
            "siglip2-so400m16-512": "vit_so400m_patch16_siglip_512.v2_webli",
            "siglip2-so400m14-224": "vit_so400m_patch14_siglip_224.v2_webli",
            "siglip2-so400m14-378": "vit_so400m_patch14_siglip_378.v2_webli",
            "siglip2-gopt16-256": "vit_giantopt_patch16_siglip_256.v2_webli",
            "siglip2-gopt16-384": "vit_giantopt_patch16_siglip_384.v2_webli",
        },
    ),
)

PUBLISHED: dict[str, Published] = {
    name: Published(f"timm/{identifier}", source, licence)
    for source, licence, models in _FAMILIES
    for name, identifier in models.items()
}
