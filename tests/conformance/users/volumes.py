"""Medical networks of MONAI, mostly on volumes."""

from __future__ import annotations

from typing import Any

from conformance.users.catalog import enter
from conformance.zoo import floats, published

SIZE = 32


def monai(
    name: str,
    *,
    size: int = SIZE,
    inputs: int = 1,
    dims: int = 3,
    field: str = "x",
    label: str = "",
    **settings: Any,
) -> None:
    make = published("monai.networks.nets", name, **settings)
    fields = {field: floats("batch", inputs, *[size] * dims)}
    enter(f"monai.{label or name}", "medical", make, fields)


LEVELS = {"channels": (8, 16, 32), "strides": (2, 2)}
THREE = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
TWO = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}

monai("UNet", **THREE, **LEVELS, num_res_units=2)
monai("UNet", label="UNet2d", dims=2, **TWO, **LEVELS, norm="BATCH")
monai("BasicUNet", **THREE, features=(8, 8, 16, 32, 64, 8))
monai("BasicUNetPlusPlus", **THREE, features=(8, 8, 16, 32, 64, 8))
monai("AttentionUnet", **THREE, **LEVELS)
monai(
    "DynUNet",
    **THREE,
    kernel_size=[3, 3, 3],
    strides=[1, 2, 2],
    upsample_kernel_size=[2, 2],
    filters=[8, 16, 32],
)
monai("SegResNet", **THREE)
monai("SegResNetDS", **THREE, init_filters=8, blocks_down=(1, 1, 1))
monai("VNet", size=16, **THREE)
monai("HighResNet", size=16, **THREE)
monai(
    "UNETR",
    in_channels=1,
    out_channels=2,
    img_size=SIZE,
    feature_size=8,
    hidden_size=48,
    mlp_dim=96,
    num_heads=4,
    field="x_in",
)
monai(
    "SwinUNETR",
    label="SwinUNETR2d",
    in_channels=1,
    out_channels=2,
    feature_size=12,
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 2, 4),
    window_size=4,
    norm_name="batch",
    spatial_dims=2,
    dims=2,
    field="x_in",
)
monai(
    "MedNeXt",
    **THREE,
    init_filters=4,
    kernel_size=3,
    blocks_down=(1, 1, 1, 1),
    blocks_bottleneck=1,
    blocks_up=(1, 1, 1, 1),
)
monai(
    "FlexibleUNet",
    label="FlexibleUNet2d",
    dims=2,
    size=64,
    in_channels=1,
    out_channels=2,
    backbone="efficientnet-b0",
    field="inputs",
)
monai("Quicknat", dims=2, num_classes=3, num_filters=8, field="input")

monai("AutoEncoder", **THREE, channels=(8, 16, 32), strides=(2, 2, 2))
monai(
    "VQVAE",
    dims=2,
    **TWO,
    channels=(8, 16),
    num_res_layers=1,
    num_res_channels=(8, 16),
    downsample_parameters=((2, 4, 1, 1),) * 2,
    field="images",
    upsample_parameters=((2, 4, 1, 1, 0),) * 2,
    num_embeddings=8,
    embedding_dim=8,
)
monai("DenseNet121", **THREE, init_features=8, growth_rate=4, block_config=(2, 2, 2, 2))
monai(
    "ResNet",
    block="basic",
    layers=[1, 1, 1, 1],
    block_inplanes=[8, 16, 16, 32],
    n_input_channels=1,
    num_classes=3,
)
monai(
    "EfficientNetBN",
    label="EfficientNet3d",
    model_name="efficientnet-b0",
    pretrained=False,
    spatial_dims=3,
    in_channels=1,
    num_classes=3,
    field="inputs",
)
monai(
    "ViT",
    in_channels=1,
    img_size=SIZE,
    patch_size=16,
    hidden_size=48,
    mlp_dim=96,
    num_layers=2,
    num_heads=4,
    classification=True,
    spatial_dims=3,
)
monai(
    "ViTAutoEnc",
    in_channels=1,
    img_size=SIZE,
    patch_size=16,
    hidden_size=48,
    mlp_dim=96,
    num_layers=2,
    num_heads=4,
)
monai("Classifier", in_shape=(1, SIZE, SIZE, SIZE), classes=3, **LEVELS)
monai("PatchDiscriminator", dims=2, size=64, spatial_dims=2, channels=8, in_channels=1)
monai(
    "VoxelMorphUNet",
    inputs=2,
    spatial_dims=3,
    in_channels=2,
    unet_out_channels=8,
    channels=(8, 16, 16, 16),
    final_conv_channels=(8,),
    field="concatenated_pairs",
)
