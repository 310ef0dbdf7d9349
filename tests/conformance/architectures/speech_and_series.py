"""Speech, audio-codec and time-series models of transformers."""

from __future__ import annotations

from typing import Any

from conformance.zoo import add, floats, ints, ones, padding, transformers

WAVE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 3],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 30,
    "num_feat_extract_layers": 2,
}
SPEECH = {"input_values": floats("batch", "time")}
SPEECH_CHECKS = ({"batch": 1, "time": 400}, {"batch": 3, "time": 260})


def speech(name: str, model: str, config: str, *, time: bool = True, **settings: Any) -> None:
    """A speech encoder reading raw waveforms."""
    add(
        name,
        "speech",
        transformers(model, config, **{**WAVE, **settings}),
        SPEECH,
        *(SPEECH_CHECKS if time else ({"batch": 1}, {"batch": 3})),
        base={"time": 320},
        fixed=frozenset() if time else frozenset({"time"}),
    )


speech("wav2vec2_ctc", "Wav2Vec2ForCTC", "Wav2Vec2Config")
speech(
    "wav2vec2_stable",
    "Wav2Vec2Model",
    "Wav2Vec2Config",
    do_stable_layer_norm=True,
    feat_extract_norm="layer",
)
speech("hubert", "HubertModel", "HubertConfig")
speech("wavlm", "WavLMModel", "WavLMConfig")
speech("unispeech", "UniSpeechModel", "UniSpeechConfig")
speech(
    "data2vec_audio",
    "Data2VecAudioModel",
    "Data2VecAudioConfig",
    conv_pos_kernel_size=5,
    num_conv_pos_embeddings=2,
)
speech(
    "wav2vec2_conformer",
    "Wav2Vec2ConformerModel",
    "Wav2Vec2ConformerConfig",
    position_embeddings_type="rotary",
    conv_depthwise_kernel_size=5,
)
speech("sew", "SEWModel", "SEWConfig", squeeze_factor=2)
WHISPER: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
add(
    "whisper",
    "speech",
    transformers("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
    {"input_features": floats("batch", 8, 40), "decoder_input_ids": ints("batch", "out")},
    {"batch": 1, "out": 3},
    {"batch": 3, "out": 9},
    base={"out": 6},
)


def _whisper_encoder() -> Any:
    import transformers as t

    return t.WhisperModel(t.WhisperConfig(**WHISPER)).encoder


add("whisper_encoder", "speech", _whisper_encoder, {"input_features": floats("batch", 8, 40)})
add(
    "audio_spectrogram",
    "speech",
    transformers(
        "ASTForAudioClassification",
        "ASTConfig",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=24,
        num_mel_bins=16,
        num_labels=5,
    ),
    {"input_values": floats("batch", 24, 16)},
)
add(
    "speech_to_text",
    "speech",
    transformers(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        vocab_size=100,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        conv_channels=16,
        input_feat_per_channel=8,
        num_conv_layers=2,
        max_source_positions=64,
        max_target_positions=32,
    ),
    {"input_features": floats("batch", "time", 8), "decoder_input_ids": ints("batch", "out")},
    {"batch": 1, "time": 28, "out": 3},
    {"batch": 3, "time": 36, "out": 9},
    base={"time": 40, "out": 6},
)
add(
    "wav2vec2_bert",
    "speech",
    transformers(
        "Wav2Vec2BertModel",
        "Wav2Vec2BertConfig",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        feature_projection_input_dim=12,
        conv_depthwise_kernel_size=5,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=8,
        right_max_position_embeddings=4,
    ),
    {"input_features": floats("batch", "seq", 12)},
    {"batch": 1, "seq": 5},
    {"batch": 3, "seq": 13},
)
add(
    "univnet",
    "speech",
    transformers(
        "UnivNetModel",
        "UnivNetConfig",
        model_in_channels=8,
        model_hidden_channels=8,
        num_mel_bins=12,
        resblock_kernel_sizes=[3],
        resblock_stride_sizes=[4],
        resblock_dilation_sizes=[[1, 3]],
        kernel_predictor_hidden_channels=8,
    ),
    {"input_features": floats("batch", 6, 12), "noise_sequence": floats("batch", 6, 8)},
)
add(
    "moonshine",
    "speech",
    transformers(
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        encoder_num_key_value_heads=2,
        decoder_num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    {"input_values": floats("batch", 2000), "decoder_input_ids": ints("batch", "out")},
    {"batch": 1, "out": 3},
    {"batch": 3, "out": 9},
    base={"out": 6},
)
add(
    "dac_codec",
    "audio codec",
    transformers(
        "DacModel",
        "DacConfig",
        encoder_hidden_size=4,
        decoder_hidden_size=16,
        downsampling_ratios=[2, 4],
        upsampling_ratios=[4, 2],
        n_codebooks=2,
        codebook_size=16,
        codebook_dim=4,
        hidden_size=16,
    ),
    {"input_values": floats("batch", 1, 64)},
)
add(
    "encodec",
    "audio codec",
    transformers(
        "EncodecModel",
        "EncodecConfig",
        num_filters=4,
        hidden_size=8,
        codebook_size=16,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
        target_bandwidths=[24.0],
    ),
    {"input_values": floats("batch", 1, 64)},
)
PATCH: dict[str, Any] = {
    "num_input_channels": 3,
    "context_length": 24,
    "patch_length": 4,
    "patch_stride": 4,
    "prediction_length": 6,
    "d_model": 16,
}
SERIES = {"past_values": floats("batch", 24, 3)}
add(
    "patchtst",
    "time series",
    transformers(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        **PATCH,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
    ),
    SERIES,
)
add(
    "patchtsmixer",
    "time series",
    transformers("PatchTSMixerForPrediction", "PatchTSMixerConfig", **PATCH, num_layers=2),
    SERIES,
)
add(
    "patchtsmixer_channels",
    "time series",
    transformers(
        "PatchTSMixerModel",
        "PatchTSMixerConfig",
        **PATCH,
        num_layers=1,
        mode="mix_channel",
        gated_attn=True,
        self_attn=True,
    ),
    SERIES,
)
TS: dict[str, Any] = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
HISTORY = {
    "past_values": floats("batch", 10),
    "past_time_features": floats("batch", 10, 2),
    "past_observed_mask": ones("batch", 10),
    "future_values": floats("batch", 4),
    "future_time_features": floats("batch", 4, 2),
}
add(
    "time_series_transformer",
    "time series",
    transformers("TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", **TS),
    HISTORY,
)
add(
    "autoformer",
    "time series",
    transformers("AutoformerModel", "AutoformerConfig", **TS, label_length=4, moving_average=3),
    HISTORY,
)
add(
    "informer",
    "time series",
    transformers("InformerModel", "InformerConfig", **TS, attention_type="full"),
    HISTORY,
)
add(
    "decision_transformer",
    "time series",
    transformers(
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        state_dim=5,
        act_dim=3,
        hidden_size=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        max_ep_len=90,
    ),
    {
        "states": floats("batch", "seq", 5),
        "actions": floats("batch", "seq", 3),
        "rewards": floats("batch", "seq", 1),
        "returns_to_go": floats("batch", "seq", 1),
        "timesteps": ints("batch", "seq", high=90),
        "attention_mask": padding("batch", "seq"),
    },
    {"batch": 1, "seq": 5},
    {"batch": 3, "seq": 13},
)
