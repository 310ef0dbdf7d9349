"""Speech and music: recognition, separation, speakers, codecs, vocoders."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from conformance.users.catalog import enter, part_of
from conformance.zoo import Field, floats, published
from torch import Tensor, nn

FAMILY = "audio"


def sound(
    name: str, make: Callable[[], nn.Module], *shape: int, field: str = "x", key: Any = None
) -> None:
    """Puts a network on the list whose input is (batch, *shape); `key` picks one output."""
    made, field = (make, field) if key is None else (part_of(make, key), "x")
    enter(name, FAMILY, made, {field: floats("batch", *shape)})


def torchaudio(name: str, *shape: int, field: str = "x", key: Any = None, **settings: Any) -> None:
    make = published("torchaudio.models", name, **settings)
    sound(f"torchaudio.{name}", make, *shape, field=field, key=key)


def asteroid(name: str, length: int, *arguments: Any, **settings: Any) -> None:
    make = published("asteroid.models", name, *arguments, **settings)
    sound(f"asteroid.{name}", make, length, field="wav")


def speechbrain(
    module: str, name: str, *shape: int, field: str = "x", key: Any = None, **settings: Any
) -> None:
    make = published(f"speechbrain.lobes.models.{module}", name, **settings)
    sound(f"speechbrain.{name}", make, *shape, field=field, key=key)


class WithLengths(nn.Module):
    """A network that also wants the length of each sound: here all are full."""

    def __init__(self, model: nn.Module, key: Any) -> None:
        super().__init__()
        self.model = model
        self.key = key

    def forward(self, x: Tensor) -> Any:
        """Returns one output of the model."""
        lengths = x.new_full((x.shape[0],), x.shape[1], dtype=int)  # type: ignore[call-overload]
        return self.model(x, lengths)[self.key]


def with_lengths(name: str, **settings: Any) -> None:
    make = published("torchaudio.models", name, **settings)
    fields: dict[str, Field] = {"x": floats("batch", 32, 16)}
    enter(f"torchaudio.{name}", FAMILY, lambda: WithLengths(make(), 0), fields)


class SpeakerEncoder(nn.Module):
    """The usual speaker encoder: three LSTMs and a projection, on mel frames."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 64, 3, batch_first=True)
        self.linear = nn.Linear(64, 64)

    def forward(self, mels: Tensor) -> Tensor:
        """Returns an embedding of length 1 for each sound."""
        _, (hidden, _) = self.lstm(mels)
        raw = self.linear(hidden[-1]).relu()
        embedding: Tensor = raw / raw.norm(dim=1, keepdim=True)
        return embedding


def codec(part: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = importlib.import_module("encodec.modules")
        built: nn.Module = getattr(library, part)(dimension=16, n_filters=4, ratios=[4, 2], lstm=1)
        return built

    return make


WAV2VEC = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2), (16, 3, 2)],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 32,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2,
    "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 64,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
    "aux_num_out": 12,
}

torchaudio(
    "ConvTasNet",
    1,
    800,
    field="input",
    enc_num_feats=32,
    msk_num_feats=16,
    msk_num_hidden_feats=32,
    msk_num_layers=2,
    msk_num_stacks=2,
)
torchaudio("DeepSpeech", 1, 20, 16, n_feature=16, n_hidden=32, n_class=12)
torchaudio("Wav2Letter", 16, 100, num_classes=12, input_type="mfcc", num_features=16)
torchaudio("wav2vec2_model", 1600, field="waveforms", key=0, **WAV2VEC)
torchaudio("HDemucs", 2, 16384, field="input", sources=["a", "b"], channels=4)
torchaudio(
    "squim_objective_model",
    1600,
    key=0,
    feat_dim=16,
    win_len=32,
    d_model=16,
    nhead=2,
    hidden_dim=16,
    num_blocks=1,
    rnn_type="LSTM",
    chunk_size=11,
)
with_lengths(
    "Conformer", input_dim=16, num_heads=4, ffn_dim=32, num_layers=2, depthwise_conv_kernel_size=7
)
with_lengths("Emformer", input_dim=16, num_heads=4, ffn_dim=32, num_layers=2, segment_length=8)

sound("torchcrepe.tiny", published("torchcrepe.model", "Crepe", "tiny"), 1024)
sound("speakers.lstm_encoder", SpeakerEncoder, 40, 40, field="mels")
sound("openunmix", published("openunmix.model", "OpenUnmix", nb_bins=64, hidden_size=32), 2, 64, 20)
sound(
    "demucs.Demucs",
    published("demucs.demucs", "Demucs", ["a", "b"], channels=8, depth=3),
    2,
    2048,
    field="mix",
)
sound(
    "demucs.HTDemucs",
    published(
        "demucs.htdemucs",
        "HTDemucs",
        ["a", "b"],
        channels=8,
        nfft=1024,
        segment=0.1,
        samplerate=22050,
        t_layers=2,
        t_heads=2,
    ),
    2,
    2205,
    field="mix",
)
sound("encodec.encoder", codec("SEANetEncoder"), 1, 256)
sound("encodec.decoder", codec("SEANetDecoder"), 16, 32, field="z")
sound("vocos.backbone", published("vocos.models", "VocosBackbone", 16, 32, 64, 2), 16, 24)
sound("vocos.istft_head", published("vocos.heads", "ISTFTHead", 32, 64, 16), 24, 32)
asteroid(
    "ConvTasNet",
    800,
    2,
    n_blocks=2,
    n_repeats=1,
    bn_chan=16,
    hid_chan=32,
    skip_chan=16,
    n_filters=32,
)
asteroid("DPRNNTasNet", 400, 2, bn_chan=16, hid_size=16, chunk_size=20, n_repeats=1)
asteroid("DPTNet", 400, 2, ff_hid=16, chunk_size=20, n_repeats=1)
asteroid("SuDORMRFNet", 840, 2, bn_chan=16, num_blocks=2, n_filters=32)
asteroid("LSTMTasNet", 400, 2, n_layers=1, hid_size=16)
asteroid(
    "DCUNet",
    4096,
    "DCUNet-10",
    stft_n_filters=128,
    stft_kernel_size=128,
    stft_stride=32,
    fix_length_mode="pad",
)
asteroid("DeMask", 1024, hidden_dims=(32,), n_filters=64, stride=32, kernel_size=64)

speechbrain(
    "ECAPA_TDNN",
    "ECAPA_TDNN",
    32,
    16,
    input_size=16,
    channels=[32, 32, 32, 32, 96],
    attention_channels=16,
    lin_neurons=24,
)
speechbrain(
    "Xvector", "Xvector", 32, 16, in_channels=16, tdnn_channels=[32, 32, 32, 32, 48], lin_neurons=24
)
speechbrain(
    "ResNet",
    "ResNet",
    32,
    16,
    input_size=16,
    channels=[8, 8, 16, 16],
    block_sizes=[1, 1, 1, 1],
    lin_neurons=24,
)
speechbrain(
    "CRDNN",
    "CRDNN",
    16,
    16,
    input_shape=(None, None, 16),
    cnn_channels=[8, 16],
    rnn_layers=1,
    rnn_neurons=16,
    dnn_neurons=16,
)
speechbrain(
    "conv_tasnet", "MaskNet", 32, 40, field="mixture_w", N=32, B=16, H=32, P=3, X=2, R=1, C=2
)
speechbrain(
    "HifiGAN",
    "HifiganGenerator",
    16,
    16,
    in_channels=16,
    out_channels=1,
    resblock_type="1",
    resblock_dilation_sizes=[[1, 3, 5]],
    resblock_kernel_sizes=[3],
    upsample_kernel_sizes=[8, 4],
    upsample_initial_channel=32,
    upsample_factors=[4, 2],
)
speechbrain(
    "convolution",
    "ConvolutionFrontEnd",
    32,
    16,
    input_shape=(None, None, 16),
    num_layers_per_block=1,
    out_channels=[8, 8, 16],
)
speechbrain("Cnn14", "Cnn14", 64, 64, mel_bins=64, emb_dim=32)
