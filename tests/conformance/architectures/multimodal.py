"""Models of transformers that read images and text together, and their towers."""

from __future__ import annotations

from typing import Any

from conformance.zoo import add, floats, ints, padding, transformers

FAMILY = "multimodal"
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
WORDS = {"input_ids": ints("batch", "seq"), "attention_mask": padding("batch", "seq")}
PIXELS = {"pixel_values": floats("batch", 3, 32, 32)}
SEQ = ({"batch": 1, "seq": 5}, {"batch": 3, "seq": 13})

add(
    "clip_text",
    FAMILY,
    transformers(
        "CLIPTextModelWithProjection", "CLIPTextConfig", **TEXT, projection_dim=12, eos_token_id=2
    ),
    WORDS,
    *SEQ,
)
add(
    "clip_vision",
    FAMILY,
    transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig", **VISION, projection_dim=12),
    PIXELS,
)
PAIR = {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 12}
add(
    "clip",
    FAMILY,
    transformers("CLIPModel", "CLIPConfig", **PAIR),
    {
        "input_ids": ints("texts", "seq"),
        "attention_mask": padding("texts", "seq"),
        "pixel_values": floats("batch", 3, 32, 32),
    },
    {"batch": 1, "texts": 2, "seq": 5},
    {"batch": 4, "texts": 1, "seq": 9},
    base={"texts": 3},
)
add(
    "siglip",
    FAMILY,
    transformers(
        "SiglipModel",
        "SiglipConfig",
        text_config={**TEXT, "projection_size": 16},
        vision_config=VISION,
    ),
    {"input_ids": ints("texts", "seq"), "pixel_values": floats("batch", 3, 32, 32)},
    {"batch": 1, "texts": 2, "seq": 5},
    {"batch": 4, "texts": 1, "seq": 9},
    base={"texts": 3},
)
add(
    "chinese_clip_vision",
    FAMILY,
    transformers("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", **VISION),
    PIXELS,
)
add("blip_vision", FAMILY, transformers("BlipVisionModel", "BlipVisionConfig", **VISION), PIXELS)
add(
    "blip_text",
    FAMILY,
    transformers("BlipTextModel", "BlipTextConfig", **TEXT, is_decoder=False),
    WORDS,
    *SEQ,
)
add(
    "clipseg",
    FAMILY,
    transformers(
        "CLIPSegForImageSegmentation",
        "CLIPSegConfig",
        **PAIR,
        extract_layers=[0, 1],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    ),
    {**WORDS, **PIXELS},
    {"seq": 5},
    {"seq": 13},
    fixed=frozenset({"batch"}),  # its forward counts the texts with `len`
)
add(
    "owlvit",
    FAMILY,
    transformers("OwlViTForObjectDetection", "OwlViTConfig", **{**PAIR, "projection_dim": 16}),
    {
        "input_ids": ints("batch", "seq"),
        "pixel_values": floats("batch", 3, 32, 32),
        "attention_mask": padding("batch", "seq"),
    },
    *SEQ,
)
add(
    "vilt",
    FAMILY,
    transformers(
        "ViltModel", "ViltConfig", **{**TEXT, **VISION}, type_vocab_size=2, max_image_length=-1
    ),
    {**WORDS, **PIXELS},
    *SEQ,
)
add(
    "visual_bert",
    FAMILY,
    transformers("VisualBertModel", "VisualBertConfig", **TEXT, visual_embedding_dim=12),
    {**WORDS, "visual_embeds": floats("batch", "regions", 12)},
    {"batch": 1, "seq": 5, "regions": 4},
    {"batch": 3, "seq": 13, "regions": 2},
    base={"regions": 3},
)
add(
    "lxmert",
    FAMILY,
    transformers(
        "LxmertModel",
        "LxmertConfig",
        **{k: v for k, v in TEXT.items() if k != "num_hidden_layers"},
        l_layers=1,
        r_layers=1,
        x_layers=1,
        visual_feat_dim=12,
        visual_pos_dim=4,
    ),
    {
        **WORDS,
        "visual_feats": floats("batch", "regions", 12),
        "visual_pos": floats("batch", "regions", 4),
    },
    {"batch": 1, "seq": 5, "regions": 4},
    {"batch": 3, "seq": 13, "regions": 2},
    base={"regions": 3},
)
add(
    "git",
    FAMILY,
    transformers("GitModel", "GitConfig", **TEXT, vision_config=VISION),
    {**WORDS, **PIXELS},
    *SEQ,
)
add("flava_image", FAMILY, transformers("FlavaImageModel", "FlavaImageConfig", **VISION), PIXELS)
add(
    "groupvit_vision",
    FAMILY,
    transformers(
        "GroupViTVisionModel",
        "GroupViTVisionConfig",
        hidden_size=16,
        num_hidden_layers=2,
        depths=[1, 1],
        num_group_tokens=[4, 0],
        num_output_groups=[4, 0],
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    ),
    PIXELS,
)
add("perceiver", FAMILY, lambda: _perceiver(), {"inputs": ints("batch", "seq")}, *SEQ)
add(
    "trocr_decoder",
    FAMILY,
    transformers(
        "TrOCRForCausalLM",
        "TrOCRConfig",
        vocab_size=100,
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
    ),
    {"input_ids": ints("batch", "seq")},
    *SEQ,
)
add(
    "sam_vision",
    FAMILY,
    transformers(
        "SamVisionModel",
        "SamVisionConfig",
        hidden_size=16,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=32,
    ),
    PIXELS,
)
add(
    "vit_gpt2_captioner",
    FAMILY,
    lambda: _captioner(),
    {**PIXELS, "decoder_input_ids": ints("batch", "seq")},
    *SEQ,
)


def _perceiver() -> Any:
    import transformers as t

    config = t.PerceiverConfig(
        num_latents=6,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        vocab_size=100,
        max_position_embeddings=32,
    )
    from transformers.models.perceiver.modeling_perceiver import PerceiverTextPreprocessor

    return t.PerceiverModel(config, input_preprocessor=PerceiverTextPreprocessor(config))


def _captioner() -> Any:
    import transformers as t

    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        t.ViTConfig(**VISION),
        t.GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=64),
    )
    return t.VisionEncoderDecoderModel(config)
