"""What the names of timm's architectures and arrays say of a model and its shapes do not (timm 1.0.31)."""

# Architectures of timm 1.0.31 whose number of heads does not follow from the width, or whose GELU is the tanh form.
HEADS = {r"test_vit2?$": 2, r"test_vit[34]$": 3, "vit_giantopt_": 16, "vit_base_patch16_gap_": 16}
TANH = r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip|vit_large_patch16_siglip_(gap_)?512"
# Those whose GELU is the quick one, and tags of others whose weights were trained with it, as timm's notes say.
QUICK = r".*quickgelu|.*_clip_\d+\.(openai|metaclip_400m|metaclip_2pt5b|dfn5b)$"
QUICK += r"|vit_base_patch32_clip_224\.laion400m_e32$|vit_large_patch14_clip_224\.dfn2b$"
QUICK += r"|vit_huge_patch14_clip_224\.metaclip2_worldwide$"
REFUSED = {
    r".*_rpn_|eva02_enormous": "its blocks have LayerNorms after attention and MLP",
    r".*rope_mixed": "the frequencies of its rotary positions are learned",
    r".*sapiens2": "several of its heads share keys and values",
    r".*relpos": "its positions are relative",
    r"test_vit3$": "its mean includes class token and registers",
}

# Arrays that our models have no parameters for, by the start of their names.
FOREIGN = {
    r"attn_pool\.q_norm\.": "normalized queries in attention pooling",
    r"rope\.freqs$": "rotary positions with learned frequencies",
    r"blocks\.\d+\.attn\.gate\.": "gated attention",
    r"blocks\.\d+\.attn\.lambda_": "differential attention",
    r"(blocks\.\d+\.attn\.)?rel_pos\.": "relative positions that a network computes",
}
IGNORED = {
    r"rope_embed\.periods$": "periods of the rotary positions, which the model computes",
    r"(.*\.)?relative_position_index$": "indices into the relative positions, which the model computes",
}

# Architectures whose LayerNorms have an epsilon of 1e-5, and those without a norm after the blocks.
LARGE_EPSILON = r"vit_(\w+_clip_|pe_)|.*(dinov3|lingbot)|aimv2|beit3"
NO_NORM = r"vit_(pe_(lang|spatial)|intern|\w+_radio)"
POST_NORM_WIDTH = 1792  # EVA-02 E; its arrays have the names of EVA's, whose norms are before attention and MLP
