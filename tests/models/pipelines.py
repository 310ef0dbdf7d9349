"""Folders of whole diffusers pipelines, with small random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = 8


def vae(shift: float | None = None) -> Any:
    """4 channels of 8 x 8 to images of 8 x 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8,
        layers_per_block=1, mid_block_add_attention=False, shift_factor=shift,
    )  # fmt: skip


def text_encoder() -> Any:
    """Two layers, of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    size = 2 * len(LETTERS)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size + 2, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=size,
            eos_token_id=size + 1,
        )
    )  # fmt: skip


def tokenizer() -> Any:
    """Letters."""
    from transformers import CLIPTokenizer

    letters = [*LETTERS, *(f"{each}</w>" for each in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {each: i for i, each in enumerate(letters)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def stable_diffusion(folder: Path) -> Any:
    """A StableDiffusionPipeline with DDIM, saved to the folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
    )  # fmt: skip
    scheduler = DDIMScheduler(**TABLE, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    pipe = StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return _saved(pipe, folder)


def stable_diffusion_3(folder: Path) -> Any:
    """A StableDiffusion3Pipeline with flow matching and no text encoders, saved to the folder."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8,
        pooled_projection_dim=6, out_channels=4, pos_embed_max_size=4,
    )  # fmt: skip
    kinds = ("text_encoder", "tokenizer")
    absent = [kind + number for kind in kinds for number in ("", "_2", "_3")]
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae(0.1), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(absent),
    )  # fmt: skip
    return _saved(pipe, folder)


def _saved(pipe: Any, folder: Path) -> Any:
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
