"""Networks of timm that mix convolutions and attention."""

from __future__ import annotations

from conformance.users.catalog import timm

FAMILY = "hybrid"

timm(FAMILY, "botnet26t_256", img_size=128, size=128)
timm(FAMILY, "lambda_resnet26t", 128)
timm(FAMILY, "coat_lite_tiny", 64, img_size=64)
timm(FAMILY, "coatnet_nano_rw_224", 64, img_size=64)
timm(FAMILY, "edgenext_xx_small")
timm(FAMILY, "efficientformerv2_s0", 224)
timm(FAMILY, "efficientvit_b0")
timm(FAMILY, "efficientvit_m0", 128)
timm(FAMILY, "efficientvim_m1", 128)
timm(FAMILY, "fastvit_t8")
timm(FAMILY, "levit_128s", 64, img_size=64)
timm(FAMILY, "mobilevit_xxs")
timm(FAMILY, "mobilevitv2_050")
timm(FAMILY, "repvit_m1")
timm(FAMILY, "shvit_s1", 128)
timm(FAMILY, "swiftformer_xs")
timm(FAMILY, "tiny_vit_5m_224", 224)
timm(FAMILY, "visformer_tiny", 64, img_size=64)
timm(FAMILY, "vit_small_r26_s32_224", 64, img_size=64, depth=2)
timm(FAMILY, "vit_base_resnet26d_224", 64, img_size=64, depth=2, embed_dim=64, num_heads=4)
timm(FAMILY, "iformer_t")
timm(FAMILY, "lowformer_b0")
timm(FAMILY, "cpubone_b0_bfrobust")
