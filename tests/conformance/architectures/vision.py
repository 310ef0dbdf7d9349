"""Convolutional image models of transformers."""

from __future__ import annotations

from conformance.zoo import add, floats, transformers

FAMILY = "cnn"
IMAGE = {"pixel_values": floats("batch", 3, 32, 32)}
FREE = {"pixel_values": floats("batch", 3, "height", "width")}
FREE_CHECKS = ({"batch": 1, "height": 64, "width": 32}, {"batch": 3, "height": 32, "width": 96})
FREE_BASE = {"height": 64, "width": 96}

add(
    "resnet",
    FAMILY,
    transformers(
        "ResNetForImageClassification",
        "ResNetConfig",
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 2, 1],
        num_labels=5,
    ),
    FREE,
    *FREE_CHECKS,
    base=FREE_BASE,
)
add(
    "resnet_basic",
    FAMILY,
    transformers(
        "ResNetModel",
        "ResNetConfig",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[2, 2],
        layer_type="basic",
    ),
    IMAGE,
)
add(
    "convnext",
    FAMILY,
    transformers(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 2, 1],
        num_labels=5,
    ),
    IMAGE,
)
add(
    "convnextv2",
    FAMILY,
    transformers(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 2, 1],
        num_labels=5,
    ),
    IMAGE,
)
add(
    "regnet",
    FAMILY,
    transformers(
        "RegNetForImageClassification",
        "RegNetConfig",
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 2, 1],
        groups_width=4,
        num_labels=5,
    ),
    FREE,
    *FREE_CHECKS,
    base=FREE_BASE,
)
add(
    "mobilenet_v1",
    FAMILY,
    transformers(
        "MobileNetV1ForImageClassification",
        "MobileNetV1Config",
        depth_multiplier=0.25,
        min_depth=8,
        num_labels=5,
    ),
    IMAGE,
)
add(
    "mobilenet_v2",
    FAMILY,
    transformers(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        depth_multiplier=0.25,
        num_labels=5,
    ),
    IMAGE,
)
add(
    "mobilenet_v2_segmentation",
    FAMILY,
    transformers(
        "MobileNetV2ForSemanticSegmentation",
        "MobileNetV2Config",
        depth_multiplier=0.25,
        num_labels=5,
    ),
    IMAGE,
)
add(
    "efficientnet",
    FAMILY,
    transformers(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        width_coefficient=0.25,
        depth_coefficient=0.5,
        hidden_dim=320,
        num_labels=5,
    ),
    IMAGE,
)
add(
    "bit",
    FAMILY,
    transformers(
        "BitForImageClassification",
        "BitConfig",
        embedding_size=8,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 1],
        num_groups=2,
        num_labels=5,
    ),
    IMAGE,
)
add(
    "hgnet_v2",
    FAMILY,
    transformers(
        "HGNetV2ForImageClassification",
        "HGNetV2Config",
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16],
        stage_mid_channels=[8, 8],
        stage_out_channels=[16, 32],
        stage_num_blocks=[1, 1],
        stage_numb_of_layers=[2, 2],
        stage_downsample=[False, True],
        stage_light_block=[False, True],
        stage_kernel_size=[3, 5],
        hidden_sizes=[16, 32],
        depths=[1, 1],
        embedding_size=8,
        num_labels=5,
    ),
    IMAGE,
)
add(
    "textnet",
    FAMILY,
    transformers(
        "TextNetForImageClassification",
        "TextNetConfig",
        stem_out_channels=8,
        hidden_sizes=[8, 8, 16, 16, 16],
        num_labels=5,
    ),
    IMAGE,
)
add(
    "dinov3_convnext",
    FAMILY,
    transformers(
        "DINOv3ConvNextModel",
        "DINOv3ConvNextConfig",
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
    ),
    IMAGE,
)
add(
    "detr",
    "cnn + transformer",
    lambda: _detr(),
    IMAGE,
)
add(
    "upernet",
    "cnn + decoder",
    lambda: _upernet(),
    {"pixel_values": floats("batch", 3, 64, 64)},
)


def _detr():
    import transformers as t

    backbone = t.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = t.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        use_pretrained_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=4,
    )
    return t.DetrForObjectDetection(config)


def _upernet():
    import transformers as t

    backbone = t.ConvNextConfig(
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = t.UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=16,
        auxiliary_channels=8,
        num_labels=4,
    )
    return t.UperNetForSemanticSegmentation(config)
