"""Causal language models of transformers, state-space and recurrent ones included."""

from __future__ import annotations

from typing import Any

from conformance.zoo import Field, add, ints, padding, transformers

LLAMA: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS: dict[str, Field] = {"input_ids": ints("batch", "seq")}
MASKED: dict[str, Field] = {**TOKENS, "attention_mask": padding("batch", "seq")}
CHECKS = ({"batch": 1, "seq": 5}, {"batch": 3, "seq": 13})


def decoder(
    name: str, stem: str, family: str = "decoder", fields: Any = MASKED, **settings: Any
) -> None:
    """A causal language model whose configuration follows Llama's names."""
    settings = {key: value for key, value in {**LLAMA, **settings}.items() if value is not ...}
    add(
        name,
        family,
        transformers(f"{stem}ForCausalLM", f"{stem}Config", **settings),
        fields,
        *CHECKS,
    )


GPT2: dict[str, Any] = {
    "vocab_size": 100,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
}


def gpt(name: str, model: str, config: str, fields: Any = MASKED, **settings: Any) -> None:
    """A causal language model whose configuration follows GPT-2's names."""
    add(name, "decoder", transformers(model, config, **{**GPT2, **settings}), fields, *CHECKS)


gpt("gpt2", "GPT2LMHeadModel", "GPT2Config")
gpt("gpt2_classifier", "GPT2Model", "GPT2Config", fields=TOKENS)
gpt("gptj", "GPTJForCausalLM", "GPTJConfig", rotary_dim=4)
gpt("codegen", "CodeGenForCausalLM", "CodeGenConfig", n_head=4, rotary_dim=4)
gpt("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", multi_query=True)
gpt("openai_gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig")
gpt("ctrl", "CTRLLMHeadModel", "CTRLConfig", dff=32)
add(
    "gpt_neo",
    "decoder",
    transformers(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        vocab_size=100,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    ),
    MASKED,
    *CHECKS,
)
decoder("gpt_neox", "GPTNeoX", num_key_value_heads=..., rotary_pct=0.5)
add(
    "opt",
    "decoder",
    transformers(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=64,
        word_embed_proj_dim=8,
    ),
    MASKED,
    *CHECKS,
)
add(
    "bloom_alibi",
    "decoder",
    transformers(
        "BloomForCausalLM", "BloomConfig", vocab_size=100, hidden_size=16, n_layer=2, n_head=2
    ),
    MASKED,
    *CHECKS,
)
add(
    "mpt_alibi",
    "decoder",
    transformers(
        "MptForCausalLM",
        "MptConfig",
        vocab_size=100,
        d_model=16,
        n_layers=2,
        n_heads=2,
        max_seq_len=64,
    ),
    MASKED,
    *CHECKS,
)
decoder("llama", "Llama")
decoder("llama_untied_mha", "Llama", num_key_value_heads=4, attention_bias=True, fields=TOKENS)
decoder(
    "llama3_rope",
    "Llama",
    rope_parameters={
        "rope_type": "llama3",
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
    fields=TOKENS,
)
decoder("mistral_sliding", "Mistral", sliding_window=4)
decoder("qwen2", "Qwen2", tie_word_embeddings=True)
decoder("qwen3", "Qwen3", head_dim=8)
decoder("gemma_tied", "Gemma", head_dim=8)
decoder("gemma2_softcap", "Gemma2", head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
add(
    "gemma3_text",
    "decoder",
    transformers(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **LLAMA,
        head_dim=8,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    MASKED,
    *CHECKS,
)
decoder("phi", "Phi", num_key_value_heads=4, partial_rotary_factor=0.5)
decoder("phi3", "Phi3")
decoder("falcon_mqa", "Falcon", multi_query=True, num_key_value_heads=..., intermediate_size=...)
decoder(
    "falcon_alibi",
    "Falcon",
    alibi=True,
    new_decoder_architecture=False,
    multi_query=False,
    num_key_value_heads=...,
    intermediate_size=...,
)
decoder("stablelm", "StableLm")
decoder("starcoder2", "Starcoder2", sliding_window=4)
decoder("olmo", "Olmo", clip_qkv=1.0)
decoder("olmo2", "Olmo2")
decoder("cohere_parallel", "Cohere", use_qk_norm=True)
decoder("granite", "Granite")
decoder("nemotron", "Nemotron")
decoder("smollm3", "SmolLM3")
decoder("glm", "Glm", head_dim=8)
decoder("glm4", "Glm4", head_dim=8)
decoder("persimmon", "Persimmon", num_key_value_heads=...)
decoder("exaone4", "Exaone4", sliding_window=4, sliding_window_pattern=2)
decoder(
    "minicpm3_mla",
    "MiniCPM3",
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    num_key_value_heads=4,
)
decoder("diffllama", "DiffLlama")
decoder("helium", "Helium", head_dim=4)
decoder("biogpt", "BioGpt", num_key_value_heads=...)
decoder("ernie4_5", "Ernie4_5")
decoder(
    "lfm2_short_conv",
    "Lfm2",
    family="hybrid decoder",
    layer_types=["conv", "full_attention"],
    conv_L_cache=3,
)
add(
    "xglm",
    "decoder",
    transformers(
        "XGLMForCausalLM",
        "XGLMConfig",
        vocab_size=100,
        d_model=16,
        num_layers=2,
        attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=64,
    ),
    MASKED,
    *CHECKS,
)

STATE = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2}
FIXED_SEQ = {"input_ids": ints("batch", 8)}
BATCHES = ({"batch": 1}, {"batch": 3})
# The reference scan of Mamba is a Python loop over time: its length is part of the graph.
add(
    "mamba",
    "state space",
    transformers("MambaForCausalLM", "MambaConfig", **STATE, state_size=4, expand=2, conv_kernel=3),
    FIXED_SEQ,
    *BATCHES,
)
add(
    "falcon_mamba",
    "state space",
    transformers(
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        **STATE,
        state_size=4,
        expand=2,
        conv_kernel=3,
    ),
    FIXED_SEQ,
    *BATCHES,
)
add(
    "mamba2",
    "state space",
    transformers(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        **STATE,
        state_size=8,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        expand=2,
        conv_kernel=3,
        chunk_size=4,
    ),
    FIXED_SEQ,
    *BATCHES,
)
add(
    "rwkv",
    "state space",
    transformers(
        "RwkvForCausalLM",
        "RwkvConfig",
        **STATE,
        attention_hidden_size=16,
        intermediate_size=32,
        context_length=32,
    ),
    FIXED_SEQ,
    *BATCHES,
)
add(
    "recurrent_gemma",
    "state space",
    transformers(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        lru_width=16,
        attention_window_size=8,
    ),
    FIXED_SEQ,
    *BATCHES,
)
add(
    "bamba",
    "hybrid decoder",
    transformers(
        "BambaForCausalLM",
        "BambaConfig",
        **LLAMA,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_expand=2,
        mamba_chunk_size=4,
    ),
    FIXED_SEQ,
    *BATCHES,
)
add(
    "qwen3_next",
    "hybrid decoder",
    transformers(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        **LLAMA,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
    FIXED_SEQ,
    *BATCHES,
)
