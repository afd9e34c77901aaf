"""Short names of published models, and their repositories on the Hugging Face hub.

A name consists of family and model, and the image size if there are several: augreg-b16-384 is B/16 for images of 384
pixels. In `augreg` and `vit`, -in21k is pre-trained on ImageNet-21k; a name with an image size only is fine-tuned from
that on ImageNet-1k; -in1k is trained on ImageNet-1k only. In `deit3`, -in21k is pre-trained on ImageNet-21k and
fine-tuned on ImageNet-1k; a name with an image size only is trained on ImageNet-1k only. `dino`, `dinov2`, `dinov3`,
`mae`, `siglip` and `siglip2` are encoders without a classifier, except -in1k. `eva02` and `beitv2` are pre-trained on
images alone and fine-tuned on ImageNet.

The files are timm's conversions of the authors' files, in the repositories timm/ID listed by timm 1.0.31.
`python docs/published.py` writes the table to docs/published.md.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator

from vit_jax.errors import UserError

# Parts of timm's tags, in the order of training: 'augreg_in21k_ft_in1k'.
_DATA = {
    "in21k": "ImageNet-21k",
    "in22k": "ImageNet-21k",
    "lvd142m": "LVD-142M",
    "lvd1689m": "LVD-1689M",
    "webli": "WebLI",
    **dict.fromkeys(("in1k", "dino", "mae"), "ImageNet-1k"),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A model on the Hugging Face hub.

    Attributes:
        hub: its repository, owner/name.
        parameters: their number, including those of the classifier.
        source: the authors and the paper.
        licence: as stated in the repository.
    """

    hub: str
    parameters: int
    source: str
    licence: str

    @property
    def image_size(self) -> int:
        """Height and width of its images in pixels."""
        found = re.search(r"_(\d{3})\.", self.hub)
        return int(found[1]) if found else 518 if "dinov2" in self.hub else 256  # DINOv3

    @property
    def classes(self) -> int | None:
        """The number of classes of its head; None if it has no head."""
        tag = self.hub.partition(".")[2]
        return 1000 if tag.endswith("in1k") else 21_843 if tag == "augreg_in21k" else None

    @property
    def data(self) -> tuple[str, ...]:
        """The datasets that it was trained on, in this order."""
        parts = self.hub.partition(".")[2].split("_")
        return tuple(name for part, name in _DATA.items() if part in parts)


_FAMILIES: tuple[tuple[str, str, dict[str, tuple[str, int]]], ...] = (
    (
        "Google, How to train your ViT? (arXiv 2106.10270)",
        "apache-2.0",
        {
            "augreg-ti16-224": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 5_717_416),
            "augreg-ti16-384": ("vit_tiny_patch16_384.augreg_in21k_ft_in1k", 5_790_376),
            "augreg-ti16-in21k": ("vit_tiny_patch16_224.augreg_in21k", 9_740_115),
            "augreg-s32-224": ("vit_small_patch32_224.augreg_in21k_ft_in1k", 22_878_952),
            "augreg-s32-384": ("vit_small_patch32_384.augreg_in21k_ft_in1k", 22_915_432),
            "augreg-s32-in21k": ("vit_small_patch32_224.augreg_in21k", 30_903_507),
            "augreg-s16-224": ("vit_small_patch16_224.augreg_in21k_ft_in1k", 22_050_664),
            "augreg-s16-384": ("vit_small_patch16_384.augreg_in21k_ft_in1k", 22_196_584),
            "augreg-s16-in21k": ("vit_small_patch16_224.augreg_in21k", 30_075_219),
            "augreg-s16-in1k-224": ("vit_small_patch16_224.augreg_in1k", 22_050_664),
            "augreg-s16-in1k-384": ("vit_small_patch16_384.augreg_in1k", 22_196_584),
            "augreg-b32-224": ("vit_base_patch32_224.augreg_in21k_ft_in1k", 88_224_232),
            "augreg-b32-384": ("vit_base_patch32_384.augreg_in21k_ft_in1k", 88_297_192),
            "augreg-b32-in21k": ("vit_base_patch32_224.augreg_in21k", 104_252_499),
            "augreg-b32-in1k-224": ("vit_base_patch32_224.augreg_in1k", 88_224_232),
            "augreg-b32-in1k-384": ("vit_base_patch32_384.augreg_in1k", 88_297_192),
            "augreg-b16-224": ("vit_base_patch16_224.augreg_in21k_ft_in1k", 86_567_656),
            "augreg-b16-384": ("vit_base_patch16_384.augreg_in21k_ft_in1k", 86_859_496),
            "augreg-b16-in21k": ("vit_base_patch16_224.augreg_in21k", 102_595_923),
            "augreg-b16-in1k-224": ("vit_base_patch16_224.augreg_in1k", 86_567_656),
            "augreg-b16-in1k-384": ("vit_base_patch16_384.augreg_in1k", 86_859_496),
            "augreg-b8-224": ("vit_base_patch8_224.augreg_in21k_ft_in1k", 86_576_872),
            "augreg-b8-in21k": ("vit_base_patch8_224.augreg_in21k", 102_605_139),
            "augreg-l16-224": ("vit_large_patch16_224.augreg_in21k_ft_in1k", 304_326_632),
            "augreg-l16-384": ("vit_large_patch16_384.augreg_in21k_ft_in1k", 304_715_752),
            "augreg-l16-in21k": ("vit_large_patch16_224.augreg_in21k", 325_690_707),
            "augreg-r-ti16-224": ("vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k", 6_337_704),
            "augreg-r-ti16-384": ("vit_tiny_r_s16_p8_384.augreg_in21k_ft_in1k", 6_355_944),
            "augreg-r-ti16-in21k": ("vit_tiny_r_s16_p8_224.augreg_in21k", 10_360_403),
            "augreg-r26-s32-224": ("vit_small_r26_s32_224.augreg_in21k_ft_in1k", 36_431_912),
            "augreg-r26-s32-384": ("vit_small_r26_s32_384.augreg_in21k_ft_in1k", 36_468_392),
            "augreg-r26-s32-in21k": ("vit_small_r26_s32_224.augreg_in21k", 44_456_467),
            "augreg-r50-l32-224": ("vit_large_r50_s32_224.augreg_in21k_ft_in1k", 328_994_856),
            "augreg-r50-l32-384": ("vit_large_r50_s32_384.augreg_in21k_ft_in1k", 329_092_136),
            "augreg-r50-l32-in21k": ("vit_large_r50_s32_224.augreg_in21k", 350_358_931),
        },
    ),
    (
        "Google, An image is worth 16x16 words (arXiv 2010.11929)",
        "apache-2.0",
        {
            "vit-b32-in21k": ("vit_base_patch32_224.orig_in21k", 87_455_232),
            "vit-b16-224": ("vit_base_patch16_224.orig_in21k_ft_in1k", 86_567_656),
            "vit-b16-384": ("vit_base_patch16_384.orig_in21k_ft_in1k", 86_859_496),
            "vit-b16-in21k": ("vit_base_patch16_224.orig_in21k", 85_798_656),
            "vit-l32-384": ("vit_large_patch32_384.orig_in21k_ft_in1k", 306_632_680),
            "vit-l32-in21k": ("vit_large_patch32_224.orig_in21k", 305_510_400),
            "vit-l16-in21k": ("vit_large_patch16_224.orig_in21k", 303_301_632),
            "vit-h14-in21k": ("vit_huge_patch14_224.orig_in21k", 630_764_800),
            "vit-r50-b16-384": ("vit_base_r50_s16_384.orig_in21k_ft_in1k", 98_950_952),
            "vit-r50-b16-in21k": ("vit_base_r50_s16_224.orig_in21k", 97_890_112),
        },
    ),
    (
        "Google, When ViTs outperform ResNets without pre-training (arXiv 2106.01548)",
        "apache-2.0",
        {
            "sam-b32-224": ("vit_base_patch32_224.sam_in1k", 88_224_232),
            "sam-b16-224": ("vit_base_patch16_224.sam_in1k", 86_567_656),
        },
    ),
    (
        "Meta, Training data-efficient image transformers (arXiv 2012.12877)",
        "apache-2.0",
        {
            "deit-ti16-224": ("deit_tiny_patch16_224.fb_in1k", 5_717_416),
            "deit-s16-224": ("deit_small_patch16_224.fb_in1k", 22_050_664),
            "deit-b16-224": ("deit_base_patch16_224.fb_in1k", 86_567_656),
            "deit-b16-384": ("deit_base_patch16_384.fb_in1k", 86_859_496),
        },
    ),
    (
        "Meta, DeiT III: revenge of the ViT (arXiv 2204.07118)",
        "apache-2.0",
        {
            "deit3-s16-224": ("deit3_small_patch16_224.fb_in1k", 22_059_496),
            "deit3-s16-384": ("deit3_small_patch16_384.fb_in1k", 22_205_416),
            "deit3-s16-in21k-224": ("deit3_small_patch16_224.fb_in22k_ft_in1k", 22_059_496),
            "deit3-s16-in21k-384": ("deit3_small_patch16_384.fb_in22k_ft_in1k", 22_205_416),
            "deit3-m16-224": ("deit3_medium_patch16_224.fb_in1k", 38_849_512),
            "deit3-m16-in21k-224": ("deit3_medium_patch16_224.fb_in22k_ft_in1k", 38_849_512),
            "deit3-b16-224": ("deit3_base_patch16_224.fb_in1k", 86_585_320),
            "deit3-b16-384": ("deit3_base_patch16_384.fb_in1k", 86_877_160),
            "deit3-b16-in21k-224": ("deit3_base_patch16_224.fb_in22k_ft_in1k", 86_585_320),
            "deit3-b16-in21k-384": ("deit3_base_patch16_384.fb_in22k_ft_in1k", 86_877_160),
            "deit3-l16-224": ("deit3_large_patch16_224.fb_in1k", 304_374_760),
            "deit3-l16-384": ("deit3_large_patch16_384.fb_in1k", 304_763_880),
            "deit3-l16-in21k-224": ("deit3_large_patch16_224.fb_in22k_ft_in1k", 304_374_760),
            "deit3-l16-in21k-384": ("deit3_large_patch16_384.fb_in22k_ft_in1k", 304_763_880),
            "deit3-h14-224": ("deit3_huge_patch14_224.fb_in1k", 632_126_440),
            "deit3-h14-in21k-224": ("deit3_huge_patch14_224.fb_in22k_ft_in1k", 632_126_440),
        },
    ),
    (
        "Meta, Emerging properties in self-supervised ViTs (arXiv 2104.14294)",
        "apache-2.0",
        {
            "dino-s16": ("vit_small_patch16_224.dino", 21_665_664),
            "dino-s8": ("vit_small_patch8_224.dino", 21_670_272),
            "dino-b16": ("vit_base_patch16_224.dino", 85_798_656),
            "dino-b8": ("vit_base_patch8_224.dino", 85_807_872),
        },
    ),
    (
        "Meta, DINOv2 (arXiv 2304.07193); -reg: ViTs need registers (arXiv 2309.16588)",
        "apache-2.0",
        {
            "dinov2-s14": ("vit_small_patch14_dinov2.lvd142m", 22_056_192),
            "dinov2-s14-reg": ("vit_small_patch14_reg4_dinov2.lvd142m", 22_057_344),
            "dinov2-b14": ("vit_base_patch14_dinov2.lvd142m", 86_579_712),
            "dinov2-b14-reg": ("vit_base_patch14_reg4_dinov2.lvd142m", 86_582_016),
            "dinov2-l14": ("vit_large_patch14_dinov2.lvd142m", 304_367_616),
            "dinov2-l14-reg": ("vit_large_patch14_reg4_dinov2.lvd142m", 304_370_688),
            "dinov2-g14": ("vit_giant_patch14_dinov2.lvd142m", 1_136_479_232),
            "dinov2-g14-reg": ("vit_giant_patch14_reg4_dinov2.lvd142m", 1_136_483_840),
        },
    ),
    (
        "Meta, DINOv3 (arXiv 2508.10104)",
        "dinov3-license",
        {
            "dinov3-s16": ("vit_small_patch16_dinov3.lvd1689m", 21_586_944),
            "dinov3-s16-plus": ("vit_small_plus_patch16_dinov3.lvd1689m", 28_683_264),
            "dinov3-b16": ("vit_base_patch16_dinov3.lvd1689m", 85_641_216),
            "dinov3-l16": ("vit_large_patch16_dinov3.lvd1689m", 303_079_424),
            "dinov3-h16-plus": ("vit_huge_plus_patch16_dinov3.lvd1689m", 840_509_440),
            "dinov3-7b16": ("vit_7b_patch16_dinov3.lvd1689m", 6_716_030_976),
        },
    ),
    (
        "BAAI, EVA-02 (arXiv 2303.11331)",
        "mit",
        {
            "eva02-ti14-336": ("eva02_tiny_patch14_336.mim_in22k_ft_in1k", 5_756_584),
            "eva02-s14-336": ("eva02_small_patch14_336.mim_in22k_ft_in1k", 22_129_000),
            "eva02-b14-448": ("eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", 87_117_544),
            "eva02-l14-448": ("eva02_large_patch14_448.mim_in22k_ft_in22k_in1k", 305_080_232),
        },
    ),
    (
        "Microsoft, BEiT v2 (arXiv 2208.06366)",
        "apache-2.0",
        {
            "beitv2-b16-224": ("beitv2_base_patch16_224.in1k_ft_in22k_in1k", 86_530_984),
            "beitv2-l16-224": ("beitv2_large_patch16_224.in1k_ft_in22k_in1k", 304_430_568),
        },
    ),
    (
        "Meta, Masked autoencoders are scalable vision learners (arXiv 2111.06377)",
        "cc-by-nc-4.0",
        {
            "mae-b16": ("vit_base_patch16_224.mae", 85_798_656),
            "mae-l16": ("vit_large_patch16_224.mae", 303_301_632),
            "mae-h14": ("vit_huge_patch14_224.mae", 630_764_800),
        },
    ),
    (
        "Google, Sigmoid loss for language image pre-training (arXiv 2303.15343)",
        "apache-2.0",
        {
            "siglip-b16-224": ("vit_base_patch16_siglip_224.webli", 92_884_224),
            "siglip-b16-256": ("vit_base_patch16_siglip_256.webli", 92_930_304),
            "siglip-b16-384": ("vit_base_patch16_siglip_384.webli", 93_176_064),
            "siglip-b16-512": ("vit_base_patch16_siglip_512.webli", 93_520_128),
            "siglip-l16-256": ("vit_large_patch16_siglip_256.webli", 315_956_224),
            "siglip-l16-384": ("vit_large_patch16_siglip_384.webli", 316_283_904),
            "siglip-so400m14-224": ("vit_so400m_patch14_siglip_224.webli", 427_680_704),
            "siglip-so400m14-378": ("vit_so400m_patch14_siglip_378.webli", 428_225_600),
            "siglip-so400m14-378-in1k": ("vit_so400m_patch14_siglip_378.webli_ft_in1k", 429_378_600),
            "siglip-so400m14-384": ("vit_so400m_patch14_siglip_384.webli", 428_225_600),
        },
    ),
    (
        "Google, SigLIP 2 (arXiv 2502.14786)",
        "apache-2.0",
        {
            "siglip2-b32-256": ("vit_base_patch32_siglip_256.v2_webli", 94_552_320),
            "siglip2-b16-224": ("vit_base_patch16_siglip_224.v2_webli", 92_884_224),
            "siglip2-b16-256": ("vit_base_patch16_siglip_256.v2_webli", 92_930_304),
            "siglip2-b16-384": ("vit_base_patch16_siglip_384.v2_webli", 93_176_064),
            "siglip2-b16-512": ("vit_base_patch16_siglip_512.v2_webli", 93_520_128),
            "siglip2-l16-256": ("vit_large_patch16_siglip_256.v2_webli", 315_956_224),
            "siglip2-l16-384": ("vit_large_patch16_siglip_384.v2_webli", 316_283_904),
            "siglip2-l16-512": ("vit_large_patch16_siglip_512.v2_webli", 316_742_656),
            "siglip2-so400m16-256": ("vit_so400m_patch16_siglip_256.v2_webli", 427_888_064),
            "siglip2-so400m16-384": ("vit_so400m_patch16_siglip_384.v2_webli", 428_256_704),
            "siglip2-so400m16-512": ("vit_so400m_patch16_siglip_512.v2_webli", 428_772_800),
            "siglip2-so400m14-224": ("vit_so400m_patch14_siglip_224.v2_webli", 427_680_704),
            "siglip2-so400m14-378": ("vit_so400m_patch14_siglip_378.v2_webli", 428_225_600),
            "siglip2-gopt16-256": ("vit_giantopt_patch16_siglip_256.v2_webli", 1_163_168_256),
            "siglip2-gopt16-384": ("vit_giantopt_patch16_siglip_384.v2_webli", 1_163_659_776),
        },
    ),
)

PUBLISHED: dict[str, Published] = {
    name: Published(f"timm/{identifier}", parameters, source, licence)
    for source, licence, models in _FAMILIES
    for name, (identifier, parameters) in models.items()
}


LIST = "python -m vit_jax.convert --list"


def table(words: str = "") -> str:
    """Returns the published models as text, at most 100 columns wide.

    Args:
        words: only models with this text in the name or in the name of the repository.

    Raises:
        UserError: there is none.
    """
    lines, number = [], 0
    for source, models in by_source():
        found = {name: one for name, one in models.items() if words.lower() in f"{name} {one.hub}".lower()}
        if found:
            lines += ["", f"{source}; licence {next(iter(found.values())).licence}"]
            lines += [_line(name, one) for name, one in found.items()]
            number += len(found)
    if not number:
        near = f" (nearest: {', '.join(nearest_models(words))})" if nearest_models(words) else ""
        raise UserError(f"--list={words}: no published model has this in its name{near}\n  use --list to see all")
    return "\n".join(
        [
            f"{number} published models. Give a name wherever weights are read: it is downloaded at the first use.",
            "px: image size; head: number of classes; data 21k, 1k: ImageNet-21k, then fine-tuned on ImageNet-1k.",
            "",
            f"{'name':<24} {'params':>6}  {'px':>3} {'head':>5} {'data':<9} repository: https://huggingface.co/timm/...",
            *lines[1:],
        ]
    )


def _line(name: str, one: Published) -> str:
    data = ", ".join(one.data).replace("ImageNet-", "")
    repository = one.hub.removeprefix("timm/")
    return (
        f"{name:<24} {millions(one.parameters):>6}  {one.image_size:>3} {one.classes or '-':>5} {data:<9} {repository}"
    )


def millions(number: int) -> str:
    """Returns a number of parameters as text: '5.7 M', '304 M'."""
    return f"{number / 1e6:.{0 if number >= 1e8 else 1}f} M"


def by_source() -> Iterator[tuple[str, dict[str, Published]]]:
    """Yields the authors and the paper of each family, and its models by name."""
    for source, _, models in _FAMILIES:
        yield source, {name: PUBLISHED[name] for name in models}


_SIZES = {"tiny": "ti", "small": "s", "medium": "m", "base": "b", "large": "l", "huge": "h", "giant": "g"}
_SIZE = re.compile(
    rf"(?<![a-z])(?:vit-?)?(?:({'|'.join(_SIZES)})|(ti|so400m|gopt|[smblhg])(?=.*\d))"
    r"(?:[-_/ ]*(?:patch|p)?(8|14|16|32))?(?![a-z0-9]*[a-z])"
)


def nearest_models(name: str, count: int = 3) -> list[str]:
    """Returns the published names that a name may mean, the likeliest first; [] if it resembles none.

    Args:
        name: as a user wrote it: misspelled, or as other projects name a model: 'ViT-B_16.npz', 'vit_base_patch16_224'.
        count: their maximum number.
    """
    plain = re.sub(r"\.(npz|safetensors|json|pth?|bin)$", "", name.lower()).replace("_", "-")
    timm = {known.hub.partition("/")[2]: short for short, known in PUBLISHED.items()}
    theirs = difflib.get_close_matches(name.rpartition("/")[2].lower(), timm, n=count, cutoff=0.93)
    found = [
        *difflib.get_close_matches(plain, PUBLISHED, n=count, cutoff=0.85),
        *(timm[one] for one in theirs),
        *_same_model(plain),
        *difflib.get_close_matches(plain, PUBLISHED, n=count, cutoff=0.6),
    ]
    return list(dict.fromkeys(found))[:count]


def _same_model(name: str) -> list[str]:
    """The published names with the size and patch size in a name, those of its family, data and image size first."""
    match = _SIZE.search(name)
    if match is None:
        return []
    size, patch, rest = _SIZES.get(match[1], match[2]), match[3] or r"\d+", name[match.end() :]
    family = re.search(r"augreg|dinov3|dinov2|dino|eva02|beitv2|deit3|deit|mae|sam|siglip2|siglip", name)
    families = (family[0],) if family else ("augreg", "vit")
    pixels = re.search(r"224|256|378|384|512", rest)
    is_hybrid = re.search(r"(?<![a-z])r\d*[-+_]", name) is not None

    def differences(one: str) -> tuple[bool, ...]:
        return (
            one.partition("-")[0] not in families,
            (re.search(r"-r\d*-", one) is not None) != is_hybrid,
            "in21k" in name and "in21k" not in one,
            not one.endswith(f"-{pixels[0]}" if pixels else "-in21k"),
            ("in1k" in one) != ("in1k" in name),
        )

    return sorted((one for one in PUBLISHED if re.search(rf"-{size}{patch}(?!\d)", one)), key=differences)
