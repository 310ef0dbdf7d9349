"""Networks of torchvision: classification, segmentation, video, optical flow."""

from __future__ import annotations

from typing import Any

from conformance.users.catalog import enter, image, part_of
from conformance.zoo import Field, floats, published
from torch import Tensor, nn


def classifier(name: str, size: int = 64, **settings: Any) -> None:
    make = published("torchvision.models", name, num_classes=10, **settings)
    enter(f"torchvision.{name}", "classification", make, image(size))


def heads(name: str) -> None:
    make = published(
        "torchvision.models.segmentation", name, weights=None, weights_backbone=None, num_classes=5
    )
    enter(f"torchvision.{name}", "segmentation", part_of(make, "out"), image(64))


def video(name: str, frames: int, size: int, **settings: Any) -> None:
    make = published("torchvision.models.video", name, num_classes=10, **settings)
    clip = {"x": floats("batch", 3, frames, size, size)}
    enter(f"torchvision.{name}", "video", make, clip)


class LastFlow(nn.Module):
    """Optical flow after a few updates, as a user reads it."""

    def __init__(self, model: nn.Module, updates: int) -> None:
        super().__init__()
        self.model = model
        self.updates = updates

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Returns the last flow, (batch, 2, height, width)."""
        flows = self.model(first, second, num_flow_updates=self.updates)
        last: Tensor = flows[-1]
        return last


def flow(name: str) -> None:
    make = published("torchvision.models.optical_flow", name)
    frames: dict[str, Field] = {
        "first": floats("batch", 3, 128, 128),
        "second": floats("batch", 3, 128, 128),
    }
    enter(f"torchvision.{name}", "optical flow", lambda: LastFlow(make(), 2), frames)


def features() -> nn.Module:
    """Returns a resnet with a feature pyramid, as detectors have it."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    built: nn.Module = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return built


def grid_encoder() -> nn.Module:
    """Returns a vision transformer of two layers."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=64,
        patch_size=16,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=10,
    )


classifier("alexnet")
classifier("vgg11_bn", 32)
classifier("resnext50_32x4d")
classifier("squeezenet1_1")
classifier("googlenet", init_weights=False, aux_logits=False)
classifier("shufflenet_v2_x0_5")
classifier("mobilenet_v2")
classifier("mobilenet_v3_small")
classifier("efficientnet_b0")
classifier("convnext_tiny")
classifier("swin_t")
classifier("swin_v2_t")
enter("torchvision.vit", "classification", grid_encoder, image())
enter("torchvision.resnet18_fpn", "detection backbone", features, image())

heads("fcn_resnet50")
heads("deeplabv3_resnet50")
heads("deeplabv3_mobilenet_v3_large")
heads("lraspp_mobilenet_v3_large")

video("r3d_18", 4, 32)
video("mc3_18", 4, 32)
video("r2plus1d_18", 4, 32)
video("swin3d_t", 4, 64)

flow("raft_small")
