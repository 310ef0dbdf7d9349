"""Mixture-of-experts language models of transformers."""

from __future__ import annotations

from typing import Any

from conformance.architectures.decoders import CHECKS, LLAMA, MASKED, decoder
from conformance.zoo import add, ints, transformers

FAMILY = "mixture of experts"
MLA: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}


def mixture(name: str, stem: str, **settings: Any) -> None:
    """A causal language model with routed experts."""
    decoder(name, stem, family=FAMILY, **settings)


mixture("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2)
mixture(
    "qwen2_moe", "Qwen2Moe", **EXPERTS, moe_intermediate_size=8, shared_expert_intermediate_size=16
)
mixture("qwen3_moe", "Qwen3Moe", **EXPERTS, moe_intermediate_size=8, head_dim=8)
mixture("olmoe", "Olmoe", **EXPERTS)
mixture("phimoe", "Phimoe", num_local_experts=4, num_experts_per_tok=2)
mixture("granitemoe", "GraniteMoe", num_local_experts=4, num_experts_per_tok=2)
mixture(
    "gpt_oss", "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=4
)
mixture(
    "deepseek_v2",
    "DeepseekV2",
    **MLA,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    head_dim=4,
)
mixture(
    "deepseek_v3",
    "DeepseekV3",
    **MLA,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
)
mixture(
    "glm4_moe",
    "Glm4Moe",
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    head_dim=8,
)
mixture(
    "ernie4_5_moe",
    "Ernie4_5_Moe",
    moe_num_experts=4,
    moe_k=2,
    moe_intermediate_size=8,
    moe_layer_start_index=1,
)
add(
    "jamba",
    FAMILY,
    transformers(
        "JambaForCausalLM",
        "JambaConfig",
        **LLAMA,
        **EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_d_conv=3,
        mamba_expand=2,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    {"input_ids": ints("batch", 8)},
    {"batch": 1},
    {"batch": 3},
)
add(
    "switch_transformers",
    FAMILY,
    transformers(
        "SwitchTransformersEncoderModel",
        "SwitchTransformersConfig",
        vocab_size=100,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        expert_capacity=8,
    ),
    MASKED,
    *CHECKS,
)
