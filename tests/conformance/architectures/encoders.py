"""Text encoders of transformers."""

from __future__ import annotations

from typing import Any

from conformance.zoo import Field, add, boxes, ints, padding, transformers

FAMILY = "text encoder"
BERT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
TOKENS: dict[str, Field] = {
    "input_ids": ints("batch", "seq"),
    "attention_mask": padding("batch", "seq"),
}
CHECKS = ({"batch": 1, "seq": 5}, {"batch": 3, "seq": 13})


def encoder(
    name: str,
    model: str,
    config: str,
    *checks: Any,
    fields: Any = TOKENS,
    base: Any = None,
    **settings: Any,
) -> None:
    """An encoder whose configuration follows BERT's names."""
    make = transformers(model, config, **{**BERT, **settings})
    add(name, FAMILY, make, fields, *(checks or CHECKS), base=base or {})


encoder(
    "bert",
    "BertModel",
    "BertConfig",
    fields={**TOKENS, "token_type_ids": ints("batch", "seq", low=0, high=2)},
)
encoder("bert_masked_lm", "BertForMaskedLM", "BertConfig")
encoder("roberta", "RobertaForSequenceClassification", "RobertaConfig", num_labels=4)
encoder("xlm_roberta", "XLMRobertaForTokenClassification", "XLMRobertaConfig", num_labels=4)
encoder("roberta_prelayernorm", "RobertaPreLayerNormModel", "RobertaPreLayerNormConfig")
encoder(
    "distilbert",
    "DistilBertForSequenceClassification",
    "DistilBertConfig",
    dim=16,
    n_layers=2,
    n_heads=2,
    hidden_dim=32,
)
encoder("albert", "AlbertForSequenceClassification", "AlbertConfig", embedding_size=8, num_labels=4)
encoder(
    "deberta", "DebertaModel", "DebertaConfig", relative_attention=True, pos_att_type=["c2p", "p2c"]
)
encoder(
    "deberta_v2",
    "DebertaV2ForSequenceClassification",
    "DebertaV2Config",
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
    position_buckets=8,
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    num_labels=4,
)
encoder("electra", "ElectraForPreTraining", "ElectraConfig", embedding_size=8)
encoder("mpnet", "MPNetModel", "MPNetConfig")
encoder(
    "modernbert",
    "ModernBertForMaskedLM",
    "ModernBertConfig",
    global_attn_every_n_layers=2,
    local_attention=6,
    pad_token_id=0,
)
encoder("megatron_bert", "MegatronBertModel", "MegatronBertConfig")
encoder("roformer", "RoFormerModel", "RoFormerConfig")
encoder(
    "squeezebert",
    "SqueezeBertModel",
    "SqueezeBertConfig",
    embedding_size=16,
    q_groups=2,
    k_groups=2,
    v_groups=2,
    post_attention_groups=1,
    intermediate_groups=2,
    output_groups=2,
)
encoder(
    "convbert",
    "ConvBertModel",
    "ConvBertConfig",
    embedding_size=16,
    conv_kernel_size=3,
    head_ratio=2,
    num_attention_heads=4,
)
encoder(
    "mobilebert",
    "MobileBertModel",
    "MobileBertConfig",
    embedding_size=16,
    intra_bottleneck_size=16,
    true_hidden_size=16,
)
encoder("rembert", "RemBertModel", "RemBertConfig", input_embedding_size=8, output_embedding_size=8)
encoder(
    "esm",
    "EsmModel",
    "EsmConfig",
    pad_token_id=0,
    mask_token_id=99,
    position_embedding_type="rotary",
)
encoder("ernie", "ErnieModel", "ErnieConfig")
encoder("nomic_bert", "NomicBertModel", "NomicBertConfig")
encoder(
    "eurobert",
    "EuroBertModel",
    "EuroBertConfig",
    num_key_value_heads=1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
encoder(
    "layoutlm",
    "LayoutLMModel",
    "LayoutLMConfig",
    fields={**TOKENS, "bbox": boxes("batch", "seq", 4)},
    max_2d_position_embeddings=128,
)
encoder("ibert", "IBertModel", "IBertConfig")
encoder(
    "nystromformer",
    "NystromformerModel",
    "NystromformerConfig",
    {"batch": 1, "seq": 8},
    {"batch": 3, "seq": 8},
    num_landmarks=8,
    segment_means_seq_len=8,
)
encoder(
    "canine",
    "CanineModel",
    "CanineConfig",
    {"batch": 1},
    {"batch": 3},
    fields={"input_ids": ints("batch", 16)},
    max_position_embeddings=64,
    local_transformer_stride=8,
    num_hash_buckets=64,
    num_hash_functions=2,
)
add(
    "fnet",
    FAMILY,
    transformers(
        "FNetModel", "FNetConfig", **{k: v for k, v in BERT.items() if k != "num_attention_heads"}
    ),
    {"input_ids": ints("batch", "seq")},
    *CHECKS,
)
add(
    "xlnet",
    FAMILY,
    transformers(
        "XLNetModel", "XLNetConfig", vocab_size=100, d_model=16, n_layer=2, n_head=2, d_inner=32
    ),
    TOKENS,
    *CHECKS,
)
add(
    "xlm",
    FAMILY,
    transformers(
        "XLMModel",
        "XLMConfig",
        vocab_size=100,
        emb_dim=16,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=64,
    ),
    TOKENS,
    *CHECKS,
)
add(
    "flaubert",
    FAMILY,
    transformers(
        "FlaubertModel",
        "FlaubertConfig",
        vocab_size=100,
        emb_dim=16,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=64,
    ),
    TOKENS,
    *CHECKS,
)
add(
    "funnel",
    FAMILY,
    transformers(
        "FunnelModel",
        "FunnelConfig",
        vocab_size=100,
        block_sizes=[1, 1],
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=32,
    ),
    {"input_ids": ints("batch", 8)},
    {"batch": 1},
    {"batch": 3},
)
