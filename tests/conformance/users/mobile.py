"""Mobile networks of timm."""

from __future__ import annotations

from conformance.users.catalog import timm

FAMILY = "mobile"

timm(FAMILY, "mobilenetv1_100")
timm(FAMILY, "mobilenetv2_050")
timm(FAMILY, "mobilenetv3_small_050")
timm(FAMILY, "mobilenetv3_large_100")
timm(FAMILY, "mobilenetv4_conv_small")
timm(FAMILY, "efficientnet_b0")
timm(FAMILY, "tf_efficientnet_b0")
timm(FAMILY, "efficientnet_b0_gn")
timm(FAMILY, "mixnet_s")
timm(FAMILY, "tinynet_e")
timm(FAMILY, "lcnet_050")
timm(FAMILY, "ghostnet_050")
timm(FAMILY, "repghostnet_050")
timm(FAMILY, "rexnet_100")
timm(FAMILY, "fasternet_t0")
timm(FAMILY, "starnet_s050")
