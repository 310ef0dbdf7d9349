"""Networks that need nothing but torch: the forms found in people's own repositories."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conformance.zoo import add, floats, ints
from torch import Tensor, nn

FAMILY = "torch"


def conv_bn(i: int, o: int, k: int = 3, **kw: int) -> nn.Sequential:
    conv = nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 8), nn.MaxPool2d(2), conv_bn(8, 16), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * 16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class LstmClassifier(nn.Module):
    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 16)
        self.rnn = cell(16, 12, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.embedding(tokens))
        return self.head(states[:, -1])


class Seq2Seq(nn.Module):
    """torch's own encoder-decoder, causal mask made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 16)
        self.body = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 90, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = torch.triu(torch.full((target.shape[1],) * 2, float("-inf")), diagonal=1)
        states = self.body(self.embedding(source), self.embedding(target), tgt_mask=mask)
        return self.head(states)


class EncoderClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.embedding = nn.Embedding(90, 16, padding_idx=0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        padded = tokens.eq(0)
        states = self.encoder(self.embedding(tokens), src_key_padding_mask=padded)
        kept = (~padded).unsqueeze(-1).to(states.dtype)
        return self.head((states * kept).sum(1) / kept.sum(1).clamp(min=1e-9))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.deep = conv_bn(3, 8), conv_bn(8, 16), conv_bn(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.mix2 = conv_bn(32, 16)
        self.mix1 = conv_bn(24, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.down(F.max_pool2d(a, 2))
        c = self.up2(self.deep(F.max_pool2d(b, 2)))
        b = self.mix2(torch.cat([c, b], 1))
        b = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.mix1(torch.cat([b, a], 1)))


class DenseBlock(nn.Module):
    def __init__(self, width: int, layers: int, growth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + i * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(width + i * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.shrink, self.two = (
            DenseBlock(8, 3),
            nn.Sequential(
                nn.BatchNorm2d(26), nn.ReLU(inplace=True), nn.Conv2d(26, 12, 1), nn.AvgPool2d(2)
            ),
            DenseBlock(12, 2),
        )
        self.norm = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.two(self.shrink(self.one(self.stem(x))))), inplace=True)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class ShuffleUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            conv_bn(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.branch(right)), dim=1)
        b, c, h, w = x.size()
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = conv_bn(8, 4, 1), nn.Sequential(conv_bn(8, 4, 1), conv_bn(4, 6, 3))
        self.five = nn.Sequential(conv_bn(8, 4, 1), conv_bn(4, 6, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_bn(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(gate)


class SuperResolution(nn.Module):
    """ESPCN with a long skip: pixel shuffle, PReLU, bicubic-free."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 5, padding=2, padding_mode="reflect")
        self.act = nn.PReLU(8)
        self.tail = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        up = F.pixel_shuffle(self.tail(self.act(self.head(x))), 2)
        return (up + F.interpolate(x, scale_factor=2, mode="nearest")).clamp_(-3, 3)


class MlpMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.token = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2)
        )
        self.channel = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)) for _ in range(2)
        )
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i in range(2):
            x = x + self.token[i](self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channel[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(dim=1))


class WaveNet(nn.Module):
    """Dilated causal gated convolutions with weight norm and summed skips."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.enter = nn.Conv1d(1, 8, 1)
        self.gates = nn.ModuleList(norm(nn.Conv1d(8, 16, 2, dilation=2**i)) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(8, 12, 1) for _ in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))
        self.out = nn.Conv1d(12, 4, 1)

    def forward(self, wave: Tensor) -> Tensor:
        x = self.enter(wave)
        total = None
        for i, gate in enumerate(self.gates):
            f, g = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            h = torch.tanh(f) * torch.sigmoid(g)
            skip = self.skips[i](h)
            total = skip if total is None else total + skip
            x = x + self.residuals[i](h)
        return self.out(F.relu(total)).log_softmax(1)


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.to_matrix = nn.Linear(8, 9)
        self.body = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.to_matrix(self.transform(points).max(2)[0]).view(-1, 3, 3) + torch.eye(3)
        moved = torch.bmm(points.transpose(2, 1), matrix).transpose(2, 1)
        return self.head(torch.max(self.body(moved), 2, keepdim=True)[0].view(-1, 16))


class DictOutputs(nn.Module):
    """Structured outputs, a None among them, one tensor twice, and in-place arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((6,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> dict[str, object]:
        h = self.a(x)
        h *= self.scale
        h[:, 0] = 0.0
        h.relu_()
        logits = self.b(h)
        return {"logits": logits, "loss": None, "all": (h, [logits, h.sum(-1)])}


class SpectralConv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv3d(2, 6, 3, padding=1))
        self.norm = nn.InstanceNorm3d(6, affine=True)
        self.up = nn.ConvTranspose3d(6, 2, 2, stride=2)

    def forward(self, volume: Tensor) -> Tensor:
        return self.up(F.leaky_relu(self.norm(self.conv(volume)), 0.2, inplace=True))


IMAGE = {"x": floats("batch", 3, 16, 16)}
TOKENS = {"tokens": ints("batch", "seq", low=0)}
SEQ = ({"batch": 1, "seq": 5}, {"batch": 3, "seq": 13})


def _shuffle() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), ShuffleUnit(16), ShuffleUnit(16), nn.Conv2d(16, 5, 1))


def _inception() -> nn.Module:
    return nn.Sequential(conv_bn(3, 8), SqueezeExcite(), Inception(), nn.Conv2d(20, 5, 1))


class Wrapped(nn.Module):
    """Gives a Sequential an input called `x`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


add("vgg_bn", FAMILY, Vgg, IMAGE)
add("lstm_classifier", FAMILY, LstmClassifier, TOKENS, *SEQ)
add("gru_classifier", FAMILY, lambda: LstmClassifier(nn.GRU), TOKENS, *SEQ)
add("torch_encoder", FAMILY, EncoderClassifier, TOKENS, *SEQ)
add(
    "torch_transformer",
    FAMILY,
    Seq2Seq,
    {"source": ints("batch", "seq"), "target": ints("batch", "out")},
    {"batch": 1, "seq": 5, "out": 4},
    {"batch": 3, "seq": 6, "out": 9},
    base={"out": 7},
)
add(
    "unet",
    FAMILY,
    UNet,
    {"x": floats("batch", 3, 16, 16)},
)
add("densenet", FAMILY, DenseNet, IMAGE)
add("shufflenet", FAMILY, lambda: Wrapped(_shuffle()), IMAGE)
add("inception_se", FAMILY, lambda: Wrapped(_inception()), IMAGE)
add(
    "super_resolution",
    FAMILY,
    SuperResolution,
    {"x": floats("batch", 3, "height", "width")},
    {"batch": 1, "height": 9, "width": 11},
    {"batch": 3, "height": 20, "width": 14},
    base={"height": 12, "width": 16},
)
add("mlp_mixer", FAMILY, MlpMixer, IMAGE)
add("wavenet", FAMILY, WaveNet, {"wave": floats("batch", 1, "seq")}, *SEQ)
add("pointnet", FAMILY, PointNet, {"points": floats("batch", 3, "seq")}, *SEQ)
add("structured_outputs", FAMILY, DictOutputs, {"x": floats("batch", 6)})
add("spectral_conv3d", FAMILY, SpectralConv3d, {"volume": floats("batch", 2, 4, 6, 6)})
