"""Vision transformers and mixers of timm."""

from __future__ import annotations

from conformance.users.catalog import timm

FAMILY = "transformer"
SMALL = {"img_size": 64, "depth": 2}

timm(FAMILY, "vit_tiny_patch16_224", **SMALL)
timm(FAMILY, "vit_small_patch16_18x2_224", **SMALL)
timm(FAMILY, "vit_relpos_small_patch16_224", **SMALL)
timm(FAMILY, "vit_wee_patch16_reg1_gap_256", **SMALL)
timm(
    FAMILY,
    "samvit_base_patch16",
    img_size=64,
    depth=3,
    global_attn_indexes=(2,),
    embed_dim=64,
    num_heads=4,
)
timm(FAMILY, "deit_tiny_distilled_patch16_224", **SMALL)
timm(FAMILY, "deit3_small_patch16_224", **SMALL)
timm(FAMILY, "beit_base_patch16_224", embed_dim=64, num_heads=4, **SMALL)
timm(FAMILY, "eva02_tiny_patch14_224", img_size=56, depth=2, size=56)
timm(FAMILY, "vit_small_patch16_dinov3", **SMALL)
timm(FAMILY, "vit_small_patch16_rope_224", **SMALL)
timm(FAMILY, "naflexvit_base_patch16_gap", depth=2, embed_dim=64, num_heads=4)
timm(FAMILY, "cait_xxs24_224", img_size=64, depth=2)
timm(FAMILY, "convit_tiny", **SMALL)
timm(FAMILY, "xcit_nano_12_p16_224", **SMALL)
timm(FAMILY, "tnt_s_patch16_224", **SMALL)
timm(FAMILY, "pit_ti_224", 64, img_size=64)
timm(FAMILY, "nest_tiny", 64, img_size=64)
timm(FAMILY, "swin_tiny_patch4_window7_224", 64, img_size=64, depths=(2, 2, 1, 1), window_size=4)
timm(FAMILY, "swinv2_tiny_window8_256", 64, img_size=64, depths=(2, 1, 1, 1), window_size=4)
timm(FAMILY, "swinv2_cr_tiny_224", 64, img_size=64, depths=(2, 1, 1, 1), window_size=2)
timm(FAMILY, "twins_pcpvt_small", 64, img_size=64, depths=(1, 1, 1, 1))
timm(FAMILY, "twins_svt_small", 64, img_size=64, depths=(1, 1, 2, 1))
timm(FAMILY, "pvt_v2_b0", depths=(1, 1, 1, 1))
timm(FAMILY, "pvt_v2_b2_li", depths=(1, 1, 1, 1))
timm(FAMILY, "mvitv2_tiny", 64, img_size=64)
timm(FAMILY, "hiera_tiny_224", 64, img_size=64, stages=(1, 2, 2, 1))
timm(FAMILY, "davit_tiny", depths=(1, 1, 1, 1))
timm(FAMILY, "mixer_s32_224", img_size=64)
timm(FAMILY, "gmlp_ti16_224", img_size=64)
timm(FAMILY, "resmlp_12_224", img_size=64)
timm(FAMILY, "sequencer2d_s", 64, img_size=64, layers=(1, 1, 1, 1))
timm(FAMILY, "poolformer_s12")
timm(FAMILY, "caformer_s18")
timm(FAMILY, "aimv2_large_patch14_224", 56, img_size=56, depth=2, embed_dim=64, num_heads=4)
timm(FAMILY, "gemma4_vit_167m_enc", 96, depth=2)
timm(FAMILY, "qwen3_vit_88m_enc", depth=2)
