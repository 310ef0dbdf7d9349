"""Segmentation networks of segmentation_models_pytorch, with several encoders."""

from __future__ import annotations

from typing import Any

from conformance.users.catalog import enter, image
from conformance.zoo import published


def smp(name: str, encoder: str, size: int = 64, **settings: Any) -> None:
    make = published(
        "segmentation_models_pytorch",
        name,
        encoder_name=encoder,
        encoder_weights=None,
        classes=3,
        **settings,
    )
    enter(f"smp.{name.lower()}.{encoder}", "segmentation", make, image(size))


smp("Unet", "resnet18")
smp("Unet", "mobilenet_v2")
smp("Unet", "efficientnet-b0")
smp("Unet", "timm-regnetx_002")
smp("Unet", "mit_b0")
smp("Unet", "resnet34", decoder_attention_type="scse")
smp("UnetPlusPlus", "resnet18")
smp("MAnet", "resnet18")
smp("Linknet", "resnet18")
smp("Linknet", "mobilenet_v2")
smp("FPN", "resnet18")
smp("FPN", "mobilenet_v2")
smp("PSPNet", "resnet18")
smp("PSPNet", "mobilenet_v2")
smp("PAN", "resnet18", 128)
smp("DeepLabV3", "resnet18")
smp("DeepLabV3Plus", "resnet18")
smp("DeepLabV3Plus", "mobilenet_v2")
smp("UPerNet", "resnet18")
smp("UPerNet", "tu-convnext_atto")
smp("Segformer", "mit_b0")
smp("Segformer", "resnet18")
