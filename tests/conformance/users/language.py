"""Vision transformers of vit_pytorch, and small configurations of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.users.catalog import enter
from conformance.zoo import Field, floats, ints, published, transformers

VIT = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 64,
}


def vit(module: str, name: str, *, field: str = "img", **settings: Any) -> None:
    make = published(f"vit_pytorch.{module}", name, **settings)
    enter(f"vit_pytorch.{name}", "vision transformer", make, {field: floats("batch", 3, 32, 32)})


def hub(name: str, config: str, fields: Mapping[str, Field], **settings: Any) -> None:
    enter(f"transformers.{name}", "language", transformers(name, config, **settings), fields)


vit("vit", "ViT", **VIT)
vit("simple_vit", "SimpleViT", **VIT)
vit("deepvit", "DeepViT", **VIT)
vit(
    "cct",
    "CCT",
    img_size=32,
    embedding_dim=32,
    n_conv_layers=1,
    num_layers=2,
    num_heads=4,
    mlp_ratio=2,
    num_classes=5,
    positional_embedding="learnable",
    field="x",
)
vit("levit", "LeViT", image_size=32, num_classes=5, dim=(16, 24, 32), depth=1, heads=2, mlp_mult=2)
vit("rvt", "RvT", **VIT)
vit("xcit", "XCiT", **VIT, cls_depth=1)
vit(
    "twins_svt",
    "TwinsSVT",
    num_classes=5,
    s1_emb_dim=16,
    s2_emb_dim=16,
    s3_emb_dim=16,
    s4_emb_dim=16,
    s1_local_patch_size=4,
    s2_local_patch_size=4,
    s3_local_patch_size=2,
    s4_patch_size=1,
    s4_local_patch_size=1,
    s1_patch_size=2,
    s2_patch_size=1,
    s3_patch_size=2,
    s3_depth=1,
    field="x",
)
vit(
    "normalized_vit",
    "nViT",
    image_size=32,
    patch_size=8,
    num_classes=5,
    dim=32,
    depth=2,
    heads=4,
    mlp_dim=64,
    field="images",
)

TOKENS = {"input_ids": ints("batch", 8)}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}

hub("BertForSequenceClassification", "BertConfig", TOKENS, **SMALL)
hub("RobertaModel", "RobertaConfig", TOKENS, **SMALL)
hub(
    "DistilBertModel",
    "DistilBertConfig",
    TOKENS,
    vocab_size=99,
    dim=32,
    n_layers=2,
    n_heads=4,
    hidden_dim=48,
)
hub(
    "GPT2LMHeadModel",
    "GPT2Config",
    TOKENS,
    vocab_size=99,
    n_embd=32,
    n_layer=2,
    n_head=4,
    use_cache=False,
)
hub("LlamaForCausalLM", "LlamaConfig", TOKENS, **SMALL, use_cache=False)
hub(
    "Qwen3ForCausalLM",
    "Qwen3Config",
    TOKENS,
    **SMALL,
    head_dim=8,
    num_key_value_heads=2,
    use_cache=False,
)
hub(
    "T5EncoderModel",
    "T5Config",
    TOKENS,
    vocab_size=99,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
)
hub(
    "ASTForAudioClassification",
    "ASTConfig",
    {"input_values": floats("batch", 64, 32)},
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    num_mel_bins=32,
    max_length=64,
)
hub(
    "PatchTSTForPrediction",
    "PatchTSTConfig",
    {"past_values": floats("batch", 32, 2)},
    num_input_channels=2,
    context_length=32,
    patch_length=8,
    patch_stride=8,
    d_model=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=32,
    prediction_length=8,
)
