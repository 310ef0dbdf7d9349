"""Denoisers and autoencoders of diffusers."""

from __future__ import annotations

from typing import Any

from conformance.zoo import add, diffusers, floats, ints, ones

FAMILY = "diffusion"
LATENT = floats("batch", 4, 8, 8)
STEP = ints("batch", low=0, high=1000)
TEXT = floats("batch", "seq", 16)
SEQ = ({"batch": 1, "seq": 5}, {"batch": 3, "seq": 13})
UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}

add(
    "unet2d",
    FAMILY,
    diffusers(
        "UNet2DModel",
        **UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ),
    {"sample": floats("batch", 3, 16, 16), "timestep": STEP},
)
CROSS: dict[str, Any] = {
    **UNET,
    "sample_size": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
add(
    "unet2d_condition",
    FAMILY,
    diffusers("UNet2DConditionModel", **CROSS, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    {"sample": LATENT, "timestep": STEP, "encoder_hidden_states": TEXT},
    *SEQ,
)
add(
    "unet2d_condition_sdxl",
    FAMILY,
    diffusers(
        "UNet2DConditionModel",
        **{**CROSS, "attention_head_dim": (2, 4)},
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        class_embed_type="projection",
        projection_class_embeddings_input_dim=20,
    ),
    {
        "sample": LATENT,
        "timestep": STEP,
        "encoder_hidden_states": TEXT,
        "class_labels": floats("batch", 20),
    },
    *SEQ,
)
add(
    "controlnet",
    FAMILY,
    diffusers(
        "ControlNetModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
    ),
    {
        "sample": LATENT,
        "timestep": STEP,
        "encoder_hidden_states": TEXT,
        "controlnet_cond": floats("batch", 3, 16, 16),
    },
    *SEQ,
)
add(
    "unet1d",
    FAMILY,
    diffusers(
        "UNet1DModel",
        sample_size=16,
        in_channels=2,
        out_channels=2,
        block_out_channels=(32, 32, 64),
        extra_in_channels=64,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    ),
    {"sample": floats("batch", 2, 64), "timestep": STEP},
)
add(
    "unet3d_condition",
    FAMILY,
    diffusers(
        "UNet3DConditionModel",
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ),
    {"sample": floats("batch", 4, 3, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT},
    *SEQ,
)
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def _part(model: str, part: str, **settings: Any) -> Any:
    return lambda: getattr(diffusers(model, **settings)(), part)


add(
    "autoencoder_kl_encoder",
    FAMILY,
    _part("AutoencoderKL", "encoder", **VAE),
    {"sample": floats("batch", 3, 16, 16)},
)
add(
    "autoencoder_kl_decoder",
    FAMILY,
    _part("AutoencoderKL", "decoder", **VAE),
    {"sample": floats("batch", 4, 8, 8)},
)
add(
    "autoencoder_kl",
    FAMILY,
    diffusers("AutoencoderKL", **VAE),
    {"sample": floats("batch", 3, 16, 16)},
)
add(
    "autoencoder_tiny",
    FAMILY,
    diffusers(
        "AutoencoderTiny",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    {"sample": floats("batch", 3, 16, 16)},
)
add(
    "autoencoder_dc",
    FAMILY,
    _part(
        "AutoencoderDC",
        "decoder",
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
    ),
    {"hidden_states": floats("batch", 4, 8, 8)},
)
add(
    "vq_model",
    FAMILY,
    diffusers("VQModel", **{**VAE, "latent_channels": 3}, num_vq_embeddings=16, layers_per_block=1),
    {"sample": floats("batch", 3, 16, 16)},
)
DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
}
add(
    "dit",
    FAMILY,
    diffusers("DiTTransformer2DModel", **DIT, norm_num_groups=4, num_embeds_ada_norm=10),
    {"hidden_states": LATENT, "timestep": STEP, "class_labels": ints("batch", low=0, high=10)},
)
add(
    "pixart",
    FAMILY,
    diffusers(
        "PixArtTransformer2DModel",
        **DIT,
        caption_channels=16,
        cross_attention_dim=16,
        out_channels=8,
        use_additional_conditions=False,
    ),
    {"hidden_states": LATENT, "timestep": STEP, "encoder_hidden_states": TEXT},
    *SEQ,
    constants={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
)
add(
    "transformer2d",
    FAMILY,
    diffusers(
        "Transformer2DModel",
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=8,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=16,
    ),
    {"hidden_states": floats("batch", 8, 8, 8), "encoder_hidden_states": TEXT},
    *SEQ,
)
add(
    "sd3",
    FAMILY,
    diffusers(
        "SD3Transformer2DModel",
        **DIT,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=16,
    ),
    {
        "hidden_states": LATENT,
        "encoder_hidden_states": TEXT,
        "pooled_projections": floats("batch", 12),
        "timestep": STEP,
    },
    *SEQ,
)
add(
    "flux",
    FAMILY,
    diffusers(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 2, 2),
    ),
    {
        "hidden_states": floats("batch", "pixels", 8),
        "encoder_hidden_states": TEXT,
        "pooled_projections": floats("batch", 12),
        "timestep": ones("batch"),
        "img_ids": floats("pixels", 3),
        "txt_ids": floats("seq", 3),
    },
    {"batch": 1, "seq": 5, "pixels": 16},
    {"batch": 3, "seq": 13, "pixels": 9},
    base={"pixels": 12},
)
add(
    "sana",
    FAMILY,
    diffusers(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
    ),
    {"hidden_states": LATENT, "encoder_hidden_states": TEXT, "timestep": STEP},
    *SEQ,
)
add(
    "aura_flow",
    FAMILY,
    diffusers(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    ),
    {"hidden_states": LATENT, "encoder_hidden_states": TEXT, "timestep": ones("batch")},
    *SEQ,
)
add(
    "latte_video",
    FAMILY,
    diffusers(
        "LatteTransformer3DModel",
        **DIT,
        caption_channels=16,
        cross_attention_dim=16,
        out_channels=4,
        video_length=2,
        num_embeds_ada_norm=1000,
    ),
    {"hidden_states": floats("batch", 4, 2, 8, 8), "encoder_hidden_states": TEXT, "timestep": STEP},
    *SEQ,
)
add(
    "wan_video",
    FAMILY,
    diffusers(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=8,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=16,
    ),
    {"hidden_states": floats("batch", 4, 2, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT},
    *SEQ,
)
