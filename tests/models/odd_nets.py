"""Nets that no list of architectures names: odd uses of channels, in double precision.

`units` is the number of removable units, counted by hand where a comment or the widths say how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Net:
    """A builder, its input shapes and the number of removable units."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    units: int


NETS: dict[str, Net] = {}
Image, Tokens = (2, 3, 8, 8), (2, 7, 3)


def net(units: int, *shapes: tuple[int, ...]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def add(cls: type[nn.Module]) -> type[nn.Module]:
        NETS[cls.__name__] = Net(cls, shapes, units)
        return cls

    return add


class Stem(nn.Module):
    """conv to `c` channels, what a subclass makes of them (`out`), conv to 5."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, c, 3, 1, 1), nn.Conv2d(out, 5, 1)

    def mix(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(F.relu(self.stem(x))))


# ---- convolutions


@net(4, Image)
class ChannelShuffle(Stem):
    """Two groups lose the same offsets."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.norm = nn.BatchNorm2d(8)

    def mix(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.channel_shuffle(x, 2))


@net(4 + 4, Image)
class PixelUnshuffle(Stem):
    """Space to depth and back: 4 channels; a group of four again behind the second conv."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.a = nn.Conv2d(16, 16, 3, 1, 1)

    def mix(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.a(F.pixel_unshuffle(x, 2)), 2)


@net(4 + 3, Image)
class GroupedChain(Stem):
    """Equal offsets in every group: 8 / 2 in front of and 12 / 4 behind the grouped conv."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.a = nn.Conv2d(8, 12, 3, 1, 1, groups=2)
        self.b = nn.Conv2d(12, 12, 3, 1, 1, groups=4)

    def mix(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return y + self.b(y)


@net(4 + 3 + 6, Image)
class GroupedTranspose(Stem):
    def __init__(self) -> None:
        super().__init__(8, 6)
        self.a = nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.b = nn.ConvTranspose2d(6, 6, 3, 1, 1, groups=6)
        self.c = nn.ConvTranspose2d(6, 6, 3, 1, 1)

    def mix(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@net(8, Image)
class SharedConv(Stem):
    """One convolution at three scales, each with a norm of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.shared = nn.Conv2d(8, 8, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def mix(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = x + F.relu(norm(self.shared(x)))
        return x


@net(5 + 3 + 4 + 5, Image)
class SplitConcat(Stem):
    """Unequal pieces; a lone channel of the first is read by itself, which keeps both."""

    def __init__(self) -> None:
        super().__init__(10, 14)
        self.a, self.b = nn.Conv2d(5, 4, 1), nn.Conv2d(3, 5, 1)

    def mix(self, x: Tensor) -> Tensor:
        one, two, three = x.split([2, 5, 3], 1)
        return torch.cat([one, self.b(three), one, F.relu(self.a(two)), one[:, :1]], 1)


@net(8 + 8 + 8, Image)
class Paddings(Stem):
    """Reflected, circular and repeated borders; the second is added to the stem."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.a = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.b = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.c = nn.Conv2d(8, 8, 3, padding="same", padding_mode="replicate")

    def mix(self, x: Tensor) -> Tensor:
        return self.c(F.relu(x + self.b(F.relu(self.a(x)))))


@net(6 + 6, (2, 3, 6, 6, 6))
class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(3, 6, 3, padding=1), nn.ConvTranspose3d(6, 6, 2, 2)
        self.norm, self.c = nn.InstanceNorm3d(6, affine=True), nn.Conv3d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.max_pool3d(self.b(F.elu(self.norm(self.a(x)))), 2))


@net(8 + 8 + 8, (2, 3, 12))
class TemporalConvs(nn.Module):
    """Causal dilated convolutions with weight norm, cut to length, residual."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.stem = nn.Conv1d(3, 8, 1)
        self.a = nn.ModuleList(norm(nn.Conv1d(8, 8, 3, dilation=d, padding=2 * d)) for d in (1, 2))
        self.b = nn.ModuleList(norm(nn.Conv1d(8, 8, 1)) for _ in (1, 2))
        self.head = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(F.relu(a(x)[..., : x.shape[-1]]))
        return self.head(x)


@net(6 + 8 + 4 + 6, Image)
class NormUnet(nn.Module):
    """InstanceNorm without parameters in one half, GroupNorm behind the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 8, 3, 1, 1)
        self.plain, self.affine = nn.InstanceNorm2d(6), nn.InstanceNorm2d(8, affine=True)
        self.group, self.head = nn.GroupNorm(4, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.leaky_relu(self.plain(self.a(x)))
        deep = F.leaky_relu(self.affine(self.b(skip)))
        return self.head(F.silu(self.group(self.out(torch.cat([self.up(deep), skip], 1)))))


@net(6 + 8 + 5, Image)
class AttentionGate(nn.Module):
    """The skip is weighted by one map that both branches make: 5 inner channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.x, self.g, self.psi = nn.Conv2d(6, 5, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 1, 1)
        self.head = nn.Conv2d(14, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.a(x))
        deep = F.interpolate(F.relu(self.b(skip)), scale_factor=2, mode="bilinear")
        gate = self.psi(F.relu(self.x(skip) + self.g(deep))).sigmoid()
        return self.head(torch.cat([skip * gate, deep], 1))


@net(12, Image)
class ConvBlockAttention(Stem):
    """Channel gate from mean and maximum over space, spatial gate from them over channels."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up, self.spatial = (
            nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(1, 1, 3, 1, 1)
        )  # fmt: skip

    def mix(self, x: Tensor) -> Tensor:
        pools = (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1))
        x = x * sum(self.up(F.relu(self.down(p))) for p in pools).sigmoid()
        return x * self.spatial(x.mean(1, keepdim=True)).sigmoid()


@net(0, Image)
class AcrossChannels(Stem):
    """A convolution that slides over the channels keeps them all."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def mix(self, x: Tensor) -> Tensor:
        y = self.slide(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return x * y.sigmoid()


@net(8 + 6, Image)
class SelectiveKernels(Stem):
    """Two kernels, a softmax over the branches for every channel."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.a, self.b = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 5, 1, 2, groups=8)
        self.down = nn.Linear(8, 6)
        self.up = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))

    def mix(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.a(x), self.b(x)], 1)
        squeezed = F.relu(self.down(branches.sum(1).mean((-1, -2))))
        weight = torch.stack([up(squeezed) for up in self.up], 1).softmax(1)
        return (branches * weight[..., None, None]).sum(1)


@net(6 + 5 + 5, Image)
class Pyramid(nn.Module):
    """Lateral convolutions, nearest and bilinear resizing, one head on both levels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 5, 3, 2, 1)
        self.la, self.lb, self.head = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 5, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = F.relu(self.a(x))
        low = self.lb(F.relu(self.b(a)))
        high = self.la(a) + F.interpolate(low, size=a.shape[-2:])
        return self.head(high), self.head(low)


@net(8, Image)
class Blur(Stem):
    """A fixed depthwise kernel, expanded to the channels."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("kernel", torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16)

    def mix(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return F.conv2d(x, self.kernel.expand(c, 1, 3, 3), stride=2, padding=1, groups=c)


@net(8, Image)
class SpaceToDepthBySlices(Stem):
    def __init__(self) -> None:
        super().__init__(8, 32)

    def mix(self, x: Tensor) -> Tensor:
        a, b = x[..., ::2, :], x[..., 1::2, :]
        return torch.cat([a[..., ::2], a[..., 1::2], b[..., ::2], b[..., 1::2]], 1)


@net(8 + 5, Image)
class Unfolded(Stem):
    """im2col by hand keeps what it reads; the stem and the product behind it are free."""

    def __init__(self) -> None:
        super().__init__(8, 5)
        self.inner, self.weight = nn.Conv2d(8, 6, 1), nn.Parameter(torch.randn(5, 54))

    def mix(self, x: Tensor) -> Tensor:
        y = self.weight @ F.unfold(self.inner(x), 3, padding=1)
        return y.unflatten(2, (8, 8))


@net(4 + 4, Image)
class Maxout(Stem):
    """The largest of two linear pieces per channel: a unit has both of them."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.pieces = nn.Conv2d(4, 8, 1)

    def mix(self, x: Tensor) -> Tensor:
        return self.pieces(x).unflatten(1, (4, 2)).amax(2)


@net(6 + 4 + 4, Image)
class Ghost(Stem):
    """Half of the channels are made from the other half by a cheap depthwise convolution."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.a, self.cheap = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, 1, 1, groups=4)
        self.b = nn.Conv2d(8, 4, 1)

    def mix(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return F.hardswish(self.b(torch.cat([y, F.relu(self.cheap(y))], 1)))


@net(6 + 4, Image)
class PaddedShortcut(Stem):
    """Zero channels are added on a shortcut (ResNet option A): 6 tied ones and 4 behind it."""

    def __init__(self) -> None:
        super().__init__(6, 10)
        self.a = nn.Conv2d(6, 10, 3, 2, 1)

    def mix(self, x: Tensor) -> Tensor:
        short = F.pad(x[..., ::2, ::2], (0, 0, 0, 0, 2, 2))
        return F.relu(self.a(x) + short)


@net(4, (1, 3, 8, 8))
class HyperConv(Stem):
    """The kernel comes from another layer: a row of that belongs to two channels; one side goes."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.make = nn.Linear(3, 4 * 6)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.make(x.mean((0, 2, 3))).view(4, 6, 1, 1)
        return self.head(F.relu(F.conv2d(F.relu(self.stem(x)), kernel)))


@net(8, Image)
class InPlace(Stem):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.a, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def mix(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).relu_()
        y += x
        y *= 0.5
        return y.clamp_(min=-1)


@net(0, Image)
class PermutedChannels(Stem):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def mix(self, x: Tensor) -> Tensor:
        return x[:, self.order].flip(1)


@net(8 + 7, Image)
class StatisticsPooling(nn.Module):
    """Mean and deviation over time, joined (speaker vectors)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Linear(16, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)).flatten(2)
        spread = (y.var(-1) + 1e-5).sqrt()
        return self.c(F.relu(self.b(torch.cat([y.mean(-1), spread], -1))))


@net(8, Image)
class LocalResponse(Stem):
    """A window over channels keeps them; the layer in front is free."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.a, self.norm = nn.Conv2d(8, 6, 1), nn.LocalResponseNorm(3)

    def mix(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x))


@net(8 + 6, Image)
class GlobalResponse(Stem):
    def __init__(self) -> None:
        super().__init__(8, 6)
        self.a = nn.Conv2d(8, 6, 1)
        self.gamma, self.beta = (nn.Parameter(torch.ones(6, 1, 1)) for _ in range(2))

    def mix(self, x: Tensor) -> Tensor:
        y = self.a(x)
        norm = y.norm(p=2, dim=(2, 3), keepdim=True)
        return self.gamma * (y * norm / (norm.mean(1, keepdim=True) + 1e-6)) + self.beta + y


@net(8 + 6 + 4, Image)
class SpectralNorms(Stem):
    def __init__(self) -> None:
        super().__init__(8, 4)
        norm = nn.utils.parametrizations.spectral_norm
        self.a, self.b = norm(nn.Conv2d(8, 6, 3)), norm(nn.Conv2d(6, 4, 1))

    def mix(self, x: Tensor) -> Tensor:
        return F.mish(self.b(F.prelu(self.a(x), torch.tensor(0.1, dtype=x.dtype))))


class StandardConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, spread = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (w - mean) / (spread + 1e-5), self.bias, padding=1)


@net(8 + 6, Image)
class Standardised(Stem):
    """Folded first: the columns of a kernel that is standardised cannot be zeroed."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.a, self.norm = StandardConv(8, 6, 3), nn.GroupNorm(6, 6)

    def mix(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x))


@net(8, Image)
class ImageLayerNorm(Stem):
    """A norm over channels and pixels together keeps its channels."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.a, self.norm = nn.Conv2d(8, 6, 1), nn.LayerNorm([6, 8, 8])

    def mix(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x))


@net(6 + 7, (2, 3, 8, 12))
class ConvsBesideLstm(nn.Module):
    """Convolutions, a bidirectional LSTM over columns, a head: the cell keeps what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 4, 3, 1, 1)
        self.lstm = nn.LSTM(32, 5, bidirectional=True, batch_first=True)
        self.c, self.head = nn.Linear(10, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x))).flatten(1, 2).transpose(1, 2)
        return self.head(F.relu(self.c(self.lstm(y)[0])))


# ---- tokens


class TokenStem(nn.Module):
    """linear to `c`, what a subclass makes of them (`out`), linear to 5."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, c), nn.Linear(out, 5)

    def mix(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.stem(x)))


@net(8 + 6, Tokens)
class GatedLinear(TokenStem):
    def __init__(self) -> None:
        super().__init__(8, 6)
        self.a = nn.Linear(8, 12)

    def mix(self, x: Tensor) -> Tensor:
        return F.glu(self.a(x), -1)


@net(12 + 4 + 9, Tokens)
class TorchAttention(TokenStem):
    """nn.MultiheadAttention with its fused projection, causal, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 9), nn.Linear(9, 12)

    def mix(self, x: Tensor) -> Tensor:
        mask = torch.full((7, 7), -1e9, dtype=x.dtype).triu(1)
        y = x + self.attention(x, x, x, attn_mask=mask)[0]
        return y + self.down(F.gelu(self.up(self.norm(y))))


@net(12 + 9 + 4 + 5, Tokens)
class EinsumAttention(TokenStem):
    def __init__(self) -> None:
        super().__init__(12, 12)
        self.qkv, self.o = (
            nn.Parameter(torch.randn(3, 12, 4, 5)),
            nn.Parameter(torch.randn(4, 5, 12)),
        )
        self.up, self.down = nn.Linear(12, 9), nn.Linear(9, 12)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btc,nchd->nbthd", x, self.qkv)
        weight = torch.einsum("bthd,bshd->bhts", q, k).mul(0.3).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", weight, v)
        x = x + torch.einsum("bthd,hdc->btc", y, self.o)
        return x + self.down(F.relu(self.up(x)).square())


@net(8 + 9 + 3, (2, 3, 8, 8))
class WindowAttention(nn.Module):
    """Shifted windows of 4x4 with a table of relative positions, patch merging."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.qkv, self.o = nn.Linear(8, 3 * 3 * 4), nn.Linear(12, 8)
        self.table = nn.Parameter(torch.randn(49, 3))
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        offset = at[:, :, None] - at[:, None] + 3
        self.register_buffer("place", offset[0] * 7 + offset[1])
        self.merge_norm, self.merge = nn.LayerNorm(32), nn.Linear(32, 9, bias=False)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).view(-1, 16, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.place.view(-1)].view(16, 16, 3).permute(2, 0, 1)
        y = ((q * 0.5) @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        y = self.o(y.transpose(1, 2).reshape(-1, 16, 12)).view(b, h // 4, w // 4, 4, 4, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (2, 2), (1, 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.head(self.merge(self.merge_norm(torch.cat(corners, -1))).mean((1, 2)))


@net(8 + 6 + 4 + 3, Tokens)
class StateSpace(TokenStem):
    """A selective scan: inner width 6 with its gate, state 4, step rank 3."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.enter, self.out = nn.Linear(8, 12, bias=False), nn.Linear(6, 8, bias=False)
        self.conv = nn.Conv1d(6, 6, 4, padding=3, groups=6)
        self.x, self.dt = nn.Linear(6, 3 + 2 * 4, bias=False), nn.Linear(3, 6)
        self.a, self.d = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.ones(6))

    def mix(self, x: Tensor) -> Tensor:
        y, z = self.enter(x).chunk(2, -1)
        y = F.silu(self.conv(y.transpose(1, 2))[..., :7].transpose(1, 2))
        rank, b, c = self.x(y).split([3, 4, 4], -1)
        step = F.softplus(self.dt(rank))
        decay = torch.exp(step[..., None] * -torch.exp(self.a))
        drive = step[..., None] * b[:, :, None] * y[..., None]
        state, out = y.new_zeros(y.shape[0], 6, 4), []
        for t in range(7):
            state = decay[:, t] * state + drive[:, t]
            out.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(out, 1) + y * self.d
        return x + self.out(y * F.silu(z))


@net(8 + 6, Tokens)
class DenseExperts(TokenStem):
    """Three experts in stacked tensors, the two best weighted; a unit is an offset in all."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.router = nn.Linear(8, 3)
        self.up = nn.Parameter(torch.randn(3, 8, 12))
        self.down = nn.Parameter(torch.randn(3, 6, 8))

    def mix(self, x: Tensor) -> Tensor:
        score = self.router(x).softmax(-1)
        best, which = score.topk(2, -1)
        weight = torch.zeros_like(score).scatter(-1, which, best / best.sum(-1, keepdim=True))
        gate, up = torch.einsum("btc,ecf->ebtf", x, self.up).chunk(2, -1)
        y = torch.einsum("ebtf,efc->ebtc", F.silu(gate) * up, self.down)
        return x + (y * weight.permute(2, 0, 1)[..., None]).sum(0)


@net(8 + 5, (2, 7, 3), (2, 4))
class Modulation(nn.Module):
    """A condition scales, shifts and gates (adaptive norm): its rows join the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 5)
        self.condition, self.norm = nn.Linear(4, 24), nn.LayerNorm(8, elementwise_affine=False)
        self.up, self.down = nn.Linear(8, 5), nn.Linear(5, 8)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.stem(x)
        scale, shift, gate = self.condition(F.silu(c))[:, None].chunk(3, -1)
        y = self.norm(x) * (1 + scale) + shift
        return self.head(x + gate * self.down(F.gelu(self.up(y))))


@net(8 + 6 + 3, Tokens)
class LatentCrossAttention(TokenStem):
    """Learned queries read the tokens: latents of width 6, 3 heads."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.latents = nn.Parameter(torch.randn(1, 5, 6))
        self.q, self.kv, self.o = nn.Linear(6, 12), nn.Linear(8, 24), nn.Linear(12, 6)

    def mix(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        z = self.latents.expand(b, -1, -1)
        q = self.q(z).view(b, 5, 3, 4).transpose(1, 2)
        k, v = (p.reshape(b, 7, 3, 4).transpose(1, 2) for p in self.kv(x).chunk(2, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return z + self.o(y.transpose(1, 2).reshape(b, 5, 12))


@net(12 + 3, Tokens)
class LinearAttention(TokenStem):
    """elu + 1 features and a normaliser: whole heads go."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.qkv, self.o = nn.Linear(12, 36), nn.Linear(12, 12)

    def mix(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = (p.reshape(b, 7, 3, 4).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = q @ (k.transpose(-1, -2) @ v) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        return x + self.o(y.transpose(1, 2).reshape(b, 7, 12))


@net(8 + 6, Tokens)
class TokenShift(TokenStem):
    """Every token is mixed with the one before (learned share), squared relu."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.share = nn.Parameter(torch.rand(8))
        self.k, self.v, self.r = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8)

    def mix(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        y = torch.lerp(before, x, self.share)
        return x + torch.sigmoid(self.r(y)) * self.v(torch.relu(self.k(y)) ** 2)


@net(8, Tokens)
class CosineHead(TokenStem):
    """Both sides normalised: the length is over channels, zeros add nothing."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = F.normalize(F.relu(self.stem(x)), dim=-1)
        return self.scale * F.linear(y, self.head.weight)


@net(8 + 6, Tokens)
class BilinearForm(TokenStem):
    """nn.Bilinear has no rule: its inputs stay; the layer behind it is free."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.a, self.pair = nn.Linear(8, 4), nn.Bilinear(4, 4, 7)
        self.b = nn.Linear(7, 6)

    def mix(self, x: Tensor) -> Tensor:
        y = self.a(torch.relu(x))
        return torch.relu(self.b(self.pair(y, y)))


@net(8 + 7, Tokens)
class Spectrum(TokenStem):
    """A Fourier transform over tokens has no rule: what it reads stays."""

    def __init__(self) -> None:
        super().__init__(8, 7)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 7)

    def mix(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.fft.fft(self.a(torch.relu(x)), dim=1).real))


@net(6 + 9, (2, 3, 8, 8))
class NonLocal(Stem):
    """Pixels attend to pixels over 9 channels; a gram of features beside it."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.q, self.k, self.v = nn.Conv2d(6, 9, 1), nn.Conv2d(6, 9, 1), nn.Conv2d(6, 6, 1)
        self.gamma = nn.Parameter(torch.ones(1))

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        y = v @ torch.bmm(q.transpose(1, 2), k).softmax(-1).transpose(1, 2)
        return x + self.gamma * y.view(x.shape)


@net(6 + 4, (2, 3, 8, 8))
class BilinearPooling(nn.Module):
    """Outer product of two feature maps, flattened: the outer one can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        pair = self.a(x).flatten(2) @ self.b(x).flatten(2).transpose(1, 2)
        return self.head(pair.flatten(1))


@net(8, Tokens)
class Learned(TokenStem):
    """A learned scale and offset per channel, a buffer as mask, a constant added."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(1, 1, 8))
        self.register_buffer("mask", (torch.arange(8) % 3 > 0).double())
        self.temperature = nn.Parameter(torch.tensor([0.7]))

    def mix(self, x: Tensor) -> Tensor:
        y = torch.where(x > 0, x * self.scale, x / self.temperature.exp())
        return (y + self.shift) * self.mask + 0.5


@net(8, Tokens)
class Doubled(TokenStem):
    """cat(x, -x), repeat, expand and tile of channels."""

    def __init__(self) -> None:
        super().__init__(8, 64)

    def mix(self, x: Tensor) -> Tensor:
        y = torch.relu(torch.cat([x, -x], -1)).repeat(1, 1, 2)
        return y[..., None].expand(-1, -1, -1, 2).flatten(2)


@net(6 + 5, Tokens)
class GatedCell(nn.Module):
    """A recurrent cell written out: hidden width 6; gates in one matrix, chunked."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(3, 18), nn.Linear(6, 18)
        self.up, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for t in range(x.shape[1]):
            (xr, xz, xn), (hr, hz, hn) = self.x(x[:, t]).chunk(3, 1), self.h(h).chunk(3, 1)
            z = torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
        return self.head(torch.relu(self.up(h)))


@net(8 + 6 + 12, Tokens)
class Squash(TokenStem):
    """Capsules: 6 of width 4, scaled by their length, votes by a stacked matrix."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.a, self.votes = nn.Linear(8, 24), nn.Parameter(torch.randn(6, 4, 12))

    def mix(self, x: Tensor) -> Tensor:
        c = self.a(torch.relu(x)).unflatten(-1, (6, 4))
        n = c.square().sum(-1, keepdim=True)
        c = c * n / (1 + n) / (n + 1e-8).sqrt()
        return torch.tanh(torch.einsum("btnd,nde->bte", c, self.votes))
