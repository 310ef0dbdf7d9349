"""Mobile networks of timm."""

from __future__ import annotations

from conformance.users.catalog import timm

FAMILY = "mobile"

timm(FAMILY, "mobilenetv1_100")
timm(FAMILY, "mobilenetv2_050")
timm(FAMILY, "mobilenetv3_small_050")
timm(FAMILY, "mobilenetv3_large_100")
timm(FAMILY, "mobilenetv4_conv_small")
timm(FAMILY, "mobilenetv4_hybrid_medium")
timm(FAMILY, "mobilenetv5_300m_enc")
timm(FAMILY, "efficientnet_b0")
timm(FAMILY, "tf_efficientnet_b0")
timm(FAMILY, "tf_efficientnetv2_b0")
timm(FAMILY, "efficientnet_lite0")
timm(FAMILY, "efficientnet_b0_gn")
timm(FAMILY, "efficientnet_es")
timm(FAMILY, "mixnet_s")
timm(FAMILY, "tf_mixnet_s")
timm(FAMILY, "fbnetc_100")
timm(FAMILY, "fbnetv3_b")
timm(FAMILY, "spnasnet_100")
timm(FAMILY, "mnasnet_small")
timm(FAMILY, "semnasnet_075")
timm(FAMILY, "tinynet_e")
timm(FAMILY, "lcnet_050")
timm(FAMILY, "lcnetv2_small")
timm(FAMILY, "hardcorenas_a")
timm(FAMILY, "ghostnet_050")
timm(FAMILY, "ghostnetv2_100")
timm(FAMILY, "ghostnetv3_050")
timm(FAMILY, "repghostnet_050")
timm(FAMILY, "rexnet_100")
timm(FAMILY, "rexnetr_100")
timm(FAMILY, "fasternet_t0")
timm(FAMILY, "starnet_s050")
timm(FAMILY, "repvit_m0_9")
