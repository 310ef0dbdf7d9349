"""Transformer and hybrid image models of transformers."""

from __future__ import annotations

from typing import Any

from conformance.zoo import add, floats, transformers

IMAGE = {"pixel_values": floats("batch", 3, 32, 32)}
LARGE = {"pixel_values": floats("batch", 3, 64, 64)}
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
STAGES: dict[str, Any] = {"num_labels": 5}


def plain(name: str, model: str, config: str, **settings: Any) -> None:
    """A vision transformer without stages."""
    add(name, "vision transformer", transformers(model, config, **{**VIT, **settings}), IMAGE)


def staged(name: str, model: str, config: str, fields: Any = IMAGE, **settings: Any) -> None:
    """A hierarchical or hybrid vision model."""
    add(name, "hybrid vision", transformers(model, config, **settings), fields)


plain("vit", "ViTForImageClassification", "ViTConfig", num_labels=5)
plain("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", num_labels=5)
plain(
    "beit",
    "BeitForImageClassification",
    "BeitConfig",
    use_relative_position_bias=True,
    num_labels=5,
)
plain(
    "data2vec_vision",
    "Data2VecVisionModel",
    "Data2VecVisionConfig",
    use_shared_relative_position_bias=True,
)
plain("dinov2", "Dinov2ForImageClassification", "Dinov2Config", num_labels=5)
plain("dinov2_registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig")
plain("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig")
plain("vit_msn", "ViTMSNModel", "ViTMSNConfig")
plain("ijepa", "IJepaModel", "IJepaConfig")
plain("vitdet", "VitDetModel", "VitDetConfig", window_size=2, window_block_indices=[0])
plain(
    "yolos",
    "YolosForObjectDetection",
    "YolosConfig",
    image_size=[32, 32],
    num_detection_tokens=4,
    num_labels=3,
)
plain(
    "dpt",
    "DPTForDepthEstimation",
    "DPTConfig",
    num_hidden_layers=4,
    backbone_out_indices=[0, 1, 2, 3],
    neck_hidden_sizes=[8, 8, 16, 16],
    fusion_hidden_size=8,
)
staged(
    "swin",
    "SwinForImageClassification",
    "SwinConfig",
    image_size=32,
    patch_size=2,
    embed_dim=8,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
    num_labels=5,
)
staged(
    "swinv2",
    "Swinv2ForImageClassification",
    "Swinv2Config",
    image_size=32,
    patch_size=2,
    embed_dim=8,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
    num_labels=5,
)
staged(
    "swin2sr",
    "Swin2SRForImageSuperResolution",
    "Swin2SRConfig",
    image_size=16,
    patch_size=1,
    embed_dim=8,
    depths=[2],
    num_heads=[2],
    window_size=4,
    upscale=2,
    fields={"pixel_values": floats("batch", 3, 16, 16)},
)
staged(
    "segformer",
    "SegformerForSemanticSegmentation",
    "SegformerConfig",
    fields=LARGE,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 1, 2, 2],
    decoder_hidden_size=16,
    num_labels=5,
)
staged(
    "glpn",
    "GLPNForDepthEstimation",
    "GLPNConfig",
    fields=LARGE,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 1, 2, 2],
    decoder_hidden_size=8,
)
staged(
    "mobilevit",
    "MobileViTForImageClassification",
    "MobileViTConfig",
    fields=LARGE,
    image_size=64,
    hidden_sizes=[8, 12, 16],
    neck_hidden_sizes=[8, 8, 8, 12, 12, 16, 16],
    num_attention_heads=2,
    num_labels=5,
)
staged(
    "mobilevitv2",
    "MobileViTV2ForImageClassification",
    "MobileViTV2Config",
    fields=LARGE,
    image_size=64,
    width_multiplier=0.25,
    base_attn_unit_dims=[32, 48, 64],
    n_attn_blocks=[1, 1, 1],
    num_labels=5,
)
staged(
    "levit",
    "LevitForImageClassification",
    "LevitConfig",
    fields=LARGE,
    image_size=64,
    hidden_sizes=[16, 24, 32],
    num_attention_heads=[2, 2, 2],
    depths=[1, 1, 1],
    key_dim=[4, 4, 4],
    num_labels=5,
)
staged(
    "poolformer",
    "PoolFormerForImageClassification",
    "PoolFormerConfig",
    fields=LARGE,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    num_labels=5,
)
staged(
    "pvt",
    "PvtForImageClassification",
    "PvtConfig",
    fields=LARGE,
    image_size=64,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 1, 2, 2],
    num_labels=5,
)
staged(
    "pvt_v2",
    "PvtV2ForImageClassification",
    "PvtV2Config",
    fields=LARGE,
    image_size=64,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 1, 2, 2],
    num_labels=5,
)
staged(
    "cvt",
    "CvtForImageClassification",
    "CvtConfig",
    fields=LARGE,
    embed_dim=[8, 16, 16],
    num_heads=[1, 2, 2],
    depth=[1, 2, 3],
    num_labels=5,
)
staged(
    "focalnet",
    "FocalNetForImageClassification",
    "FocalNetConfig",
    image_size=32,
    patch_size=2,
    embed_dim=8,
    hidden_sizes=[8, 16],
    depths=[1, 1],
    focal_levels=[2, 2],
    focal_windows=[3, 3],
    num_labels=5,
)
staged(
    "hiera",
    "HieraForImageClassification",
    "HieraConfig",
    embed_dim=8,
    image_size=[32, 32],
    patch_size=[3, 3],
    patch_stride=[2, 2],
    patch_padding=[1, 1],
    depths=[1, 1],
    num_heads=[1, 2],
    masked_unit_size=[4, 4],
    masked_unit_attention=[True, False],
    query_stride=[2, 2],
    num_query_pool=1,
    num_labels=5,
)
staged(
    "swiftformer",
    "SwiftFormerForImageClassification",
    "SwiftFormerConfig",
    fields=LARGE,
    depths=[1, 1, 1, 1],
    embed_dims=[8, 8, 16, 16],
    num_labels=5,
)
add(
    "timesformer",
    "video",
    transformers(
        "TimesformerModel",
        "TimesformerConfig",
        **VIT,
        num_frames=2,
        attention_type="divided_space_time",
    ),
    {"pixel_values": floats("batch", 2, 3, 32, 32)},
)
add(
    "videomae",
    "video",
    transformers("VideoMAEForVideoClassification", "VideoMAEConfig", **VIT, num_frames=4),
    {"pixel_values": floats("batch", 4, 3, 32, 32)},
)
add(
    "vivit",
    "video",
    transformers("VivitModel", "VivitConfig", **VIT, num_frames=4, tubelet_size=[2, 8, 8]),
    {"pixel_values": floats("batch", 4, 3, 32, 32)},
)
