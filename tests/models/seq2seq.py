"""Tiny encoder-decoders of transformers with random weights that tell positions apart."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 64
_BART: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "forced_eos_token_id": None,
}  # fmt: skip
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART | {"max_position_embeddings": 64}),
    "marian": ("MarianMTModel", "MarianConfig", _BART | {
        "max_position_embeddings": 64, "pad_token_id": 63, "decoder_start_token_id": 63,
        "eos_token_id": 0,
    }),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _BART | {
        "max_source_positions": 30, "max_target_positions": 32, "num_mel_bins": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
        "begin_suppress_tokens": None, "suppress_tokens": None,
    }),
}  # fmt: skip


@cache
def model(family: str) -> Any:
    """A network in eval mode."""
    import transformers

    torch.manual_seed(0)
    name, config, settings = _CONFIGS[family]
    net = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def sources(family: str, rows: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch of sources of different lengths, and their mask; of Whisper, features."""
    generator = torch.Generator().manual_seed(1)
    if family == "whisper":
        return torch.randn(rows, 8, 60, generator=generator), {}
    ids = torch.randint(2, WORDS - 2, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, 4 * row :] = 0
    return ids, {"attention_mask": mask}


def own_tokens(family: str, **options: Any) -> list[list[int]]:
    """What transformers generates behind the start token, no token twice in a row's text."""
    ids, mask = sources(family)
    net = model(family)
    settings = {"do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 1} | options
    found = net.generate(ids, **mask, **settings)
    start = net.config.decoder_start_token_id
    rows = [row.tolist() for row in found]
    return [row[1:] if row[0] == start else row for row in rows]
