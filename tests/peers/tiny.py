"""Tiny models of transformers with random weights, for libraries to quantize."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 64
IDS = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))


@dataclass
class Reference:
    """What a library makes of the folder it wrote.

    Attributes:
        weights: (out, in) by module name, as the library dequantizes them.
        logits: of `IDS`, where the library can run the model here.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor | None = None


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Llama of one layer: hidden size 128, 4 heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def mixtral(dtype: torch.dtype = torch.float32) -> Any:
    """A mixture of two experts."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).to(dtype).eval()


def vision_language(dtype: torch.dtype = torch.float32) -> Any:
    """A Qwen2-VL of one block on either side: transformers renames its tensors on the way in."""
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 4,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=3, vision_end_token_id=4,
        image_token_id=5, video_token_id=6,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    """A GPT-2 of one layer, whose linear layers keep their weight (in, out)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def tokenizer(folder: Path) -> None:
    """Writes a tokenizer of as many words as the models know."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w0", pad_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of `IDS`, float32."""
    found: torch.Tensor = model(IDS).logits
    return found.float()
