"""Encoder-decoder language models of transformers."""

from __future__ import annotations

from typing import Any

from conformance.zoo import add, ints, padding, transformers

FAMILY = "encoder-decoder"
FIELDS = {
    "input_ids": ints("batch", "seq"),
    "attention_mask": padding("batch", "seq"),
    "decoder_input_ids": ints("batch", "out"),
}
CHECKS = ({"batch": 1, "seq": 5, "out": 3}, {"batch": 3, "seq": 13, "out": 9})
BART: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
T5: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


def seq2seq(name: str, model: str, config: str, fields: Any = FIELDS, **settings: Any) -> None:
    """An encoder-decoder called with both sequences."""
    add(name, FAMILY, transformers(model, config, **settings), fields, *CHECKS, base={"out": 6})


seq2seq("t5", "T5ForConditionalGeneration", "T5Config", **T5)
seq2seq(
    "t5_gated",
    "T5ForConditionalGeneration",
    "T5Config",
    **T5,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
seq2seq("mt5", "MT5Model", "MT5Config", **T5)
seq2seq("umt5", "UMT5Model", "UMT5Config", **T5)
seq2seq("bart", "BartForConditionalGeneration", "BartConfig", **BART)
seq2seq("mbart", "MBartForConditionalGeneration", "MBartConfig", **BART)
seq2seq("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", **BART)
seq2seq("marian", "MarianMTModel", "MarianConfig", **BART, pad_token_id=0, decoder_start_token_id=0)
seq2seq("m2m_100", "M2M100ForConditionalGeneration", "M2M100Config", **BART)
seq2seq("blenderbot", "BlenderbotForConditionalGeneration", "BlenderbotConfig", **BART)
seq2seq("plbart", "PLBartModel", "PLBartConfig", **BART)
seq2seq(
    "prophetnet",
    "ProphetNetModel",
    "ProphetNetConfig",
    vocab_size=100,
    hidden_size=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_encoder_attention_heads=2,
    num_decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=64,
)
add(
    "t5_encoder",
    "text encoder",
    transformers("T5EncoderModel", "T5Config", **T5),
    {k: FIELDS[k] for k in ("input_ids", "attention_mask")},
    {"batch": 1, "seq": 5},
    {"batch": 3, "seq": 13},
)
