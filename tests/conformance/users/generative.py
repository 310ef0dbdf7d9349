"""Diffusion and other generators, with small random configurations."""

from __future__ import annotations

from typing import Any

import torch
from conformance.users.catalog import enter
from conformance.zoo import Field, diffusers, floats, published
from torch import Tensor, nn

FAMILY = "diffusion"
BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


class Step(nn.Module):
    """One step of a diffusion model: only the sample comes out."""

    def __init__(self, model: nn.Module, context: str = "") -> None:
        super().__init__()
        self.model = model
        self.context = context

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Returns the predicted noise."""
        named = {self.context: context} if self.context else {}
        out: Tensor = self.model(sample, timestep=timestep, return_dict=False, **named)[0]
        return out


class Plain(nn.Module):
    """A model of diffusers that takes a sample and returns one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor) -> Any:
        """Returns the first output."""
        return self.model(sample, return_dict=False)[0]


class Labelled(nn.Module):
    """One step of a diffusion model with classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Any:
        """Returns the predicted noise."""
        return self.model(sample, timestep, class_labels=labels, return_dict=False)[0]


def times(*shape: int | str) -> Field:
    """Integer time steps below 1000, as floats."""
    return Field(lambda s, g: torch.randint(0, 1000, s, generator=g).float(), shape)


def step(
    name: str, shape: tuple[int, ...], width: int = 8, context: str = "", **settings: Any
) -> None:
    make = diffusers(name, **settings)
    fields = {
        "sample": floats("batch", *shape),
        "timestep": times("batch"),
        "context": floats("batch", 6, width),
    }
    enter(f"diffusers.{name}", FAMILY, lambda: Step(make(), context), fields)


def plain(name: str, shape: tuple[int, ...], **settings: Any) -> None:
    make = diffusers(name, **settings)
    fields = {"sample": floats("batch", *shape)}
    enter(f"diffusers.{name}", "autoencoder", lambda: Plain(make()), fields)


step(
    "UNet2DModel",
    (3, 16, 16),
    sample_size=16,
    **BLOCKS,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
step(
    "UNet2DConditionModel",
    (4, 16, 16),
    16,
    "encoder_hidden_states",
    sample_size=16,
    **BLOCKS,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    attention_head_dim=4,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
)
step(
    "UNet3DConditionModel",
    (4, 3, 16, 16),
    16,
    "encoder_hidden_states",
    sample_size=16,
    **BLOCKS,
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    attention_head_dim=4,
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    cross_attention_dim=16,
)
step(
    "PixArtTransformer2DModel",
    (4, 8, 8),
    16,
    "encoder_hidden_states",
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    cross_attention_dim=16,
    sample_size=8,
    caption_channels=16,
)
step(
    "SanaTransformer2DModel",
    (4, 8, 8),
    16,
    "encoder_hidden_states",
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=16,
    sample_size=8,
)
plain(
    "AutoencoderKL",
    (3, 32, 32),
    **BLOCKS,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
plain(
    "VQModel",
    (3, 32, 32),
    **BLOCKS,
    num_vq_embeddings=32,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
plain(
    "AutoencoderTiny",
    (3, 32, 32),
    encoder_block_out_channels=(8, 8, 8, 8),
    decoder_block_out_channels=(8, 8, 8, 8),
)
plain(
    "AutoencoderDC",
    (3, 32, 32),
    encoder_block_out_channels=(16, 32),
    decoder_block_out_channels=(16, 32),
    encoder_layers_per_block=(1, 1),
    decoder_layers_per_block=(1, 1),
    latent_channels=4,
    encoder_qkv_multiscales=((), ()),
    decoder_qkv_multiscales=((), ()),
    attention_head_dim=8,
)


DIT = diffusers(
    "DiTTransformer2DModel",
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=10,
)
enter(
    "diffusers.DiTTransformer2DModel",
    FAMILY,
    lambda: Labelled(DIT()),
    {
        "sample": floats("batch", 4, 8, 8),
        "timestep": times("batch"),
        "labels": Field(lambda s, g: torch.randint(0, 10, s, generator=g), ("batch",)),
    },
)
enter(
    "facenet.InceptionResnetV1",
    "faces",
    published("facenet_pytorch", "InceptionResnetV1", pretrained=None),
    {"x": floats("batch", 3, 96, 96)},
)
enter(
    "facenet.PNet",
    "faces",
    published("facenet_pytorch", "PNet", pretrained=False),
    {"x": floats("batch", 3, 48, 48)},
)
enter(
    "facenet.RNet",
    "faces",
    published("facenet_pytorch", "RNet", pretrained=False),
    {"x": floats("batch", 3, 24, 24)},
)
enter(
    "facenet.ONet",
    "faces",
    published("facenet_pytorch", "ONet", pretrained=False),
    {"x": floats("batch", 3, 48, 48)},
)
