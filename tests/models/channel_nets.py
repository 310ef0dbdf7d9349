"""Small nets, one per structure that the channel algebra must see through, in double precision.

`units` is the number of removable units counted by hand; equalities that are too strong show up
there and nowhere else. Widths differ from token counts, so that no wrong axis goes unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.ir.ops.attention import attention


@dataclass(frozen=True)
class Net:
    """A builder, its input shape and the number of removable units."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    units: int


NETS: dict[str, Net] = {}


def net(units: int, *shape: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def add(cls: type[nn.Module]) -> type[nn.Module]:
        NETS[cls.__name__] = Net(cls, shape, units)
        return cls

    return add


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), nn.ReLU()
    )


class Chain(nn.Module):
    """Applies its parts in order."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


@net(6 + 8 + 10 + 14, 2, 3, 8, 8)
class VggFlatten(Chain):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 6), nn.MaxPool2d(2), conv(6, 8), nn.MaxPool2d(2), conv(8, 10), nn.Flatten(),
            nn.Linear(40, 14), nn.ReLU(), nn.Linear(14, 5),
        )  # fmt: skip


class Basic(nn.Module):
    def __init__(self, i: int, o: int, s: int) -> None:
        super().__init__()
        self.a, self.b = (
            conv(i, o, 3, s),
            nn.Sequential(nn.Conv2d(o, o, 3, 1, 1), nn.BatchNorm2d(o)),
        )
        self.skip = nn.Conv2d(i, o, 1, s) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.a(x)) + self.skip(x))


@net(6 + 6 + 10 + 10, 2, 3, 8, 8)
class ResNet18(Chain):
    """Per stage: the residual stream and one inner width."""

    def __init__(self) -> None:
        super().__init__(conv(3, 6), Basic(6, 6, 1), Basic(6, 10, 2), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(10, 5))  # fmt: skip


class Bottleneck(nn.Module):
    def __init__(self, i: int, m: int) -> None:
        super().__init__()
        self.main = nn.Sequential(conv(i, m, 1), conv(m, m), nn.Conv2d(m, i, 1), nn.BatchNorm2d(i))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.main(x))


@net(12 + 2 * (4 + 4), 2, 3, 8, 8)
class ResNet50(Chain):
    def __init__(self) -> None:
        super().__init__(conv(3, 12), Bottleneck(12, 4), Bottleneck(12, 4),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))  # fmt: skip


class DenseLayer(nn.Module):
    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(i), nn.Conv2d(i, growth, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


@net(6 + 4 + 4 + 7, 2, 3, 8, 8)
class DenseNet(Chain):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3), DenseLayer(6, 4), DenseLayer(10, 4), nn.BatchNorm2d(14),
            nn.Conv2d(14, 7, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5),
        )  # fmt: skip


class ConvNextBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(c, c, 3, 1, 1, groups=c), nn.LayerNorm(c)
        self.up, self.down = nn.Linear(c, 3 * c), nn.Linear(3 * c, c)
        self.gamma = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


@net(8 + 24 + 24, 2, 3, 8, 8)
class ConvNext(Chain):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 2, 2), ConvNextBlock(8), ConvNextBlock(8), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 5),
        )  # fmt: skip


class C2f(nn.Module):
    def __init__(self, i: int, c: int, o: int) -> None:
        super().__init__()
        self.a, self.b, self.inner = conv(i, 2 * c, 1), conv(3 * c, o, 1), conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return self.b(torch.cat([left, right, right + self.inner(right)], 1))


@net(6 + 4 + 4 + 9, 2, 3, 8, 8)
class Yolo(Chain):
    """left half 4; right half 4, tied with what is added to it; 9 out."""

    def __init__(self) -> None:
        super().__init__(conv(3, 6), C2f(6, 4, 9), nn.Conv2d(9, 5, 1))


class RepVggBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(c, c, 3, 1, 1), nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + self.b(x) + self.norm(x))


@net(6, 2, 3, 8, 8)
class RepVgg(Chain):
    def __init__(self) -> None:
        super().__init__(conv(3, 6), RepVggBlock(6), RepVggBlock(6), nn.Conv2d(6, 5, 1))


@net(6 + 12 + 8 + 3, 2, 3, 8, 8)
class MobileNet(nn.Module):
    """Inverted residual with squeeze-excitation: stem, expansion, projection, squeeze."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.depthwise = conv(3, 6), conv(6, 12, 1), conv(12, 12, 3, 1, 12)
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.down, self.head = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.up(self.stem(x)))
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(self.down(y * gate))


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@net(6 + 6 + 3 + 3, 2, 3, 8, 8)
class ShuffleNet(nn.Module):
    """The shuffle of 12 channels by 2 keeps either whole groups or whole offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 12), conv(6, 6, 1), conv(6, 6)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        return self.head(shuffle(torch.cat([left, self.b(self.a(right))], 1), 2))


@net(4 + 3 + 7, 2, 3, 8, 8)
class Carn(nn.Module):
    """Grouped convolutions (equal offsets: 8 / 2) and a pixel shuffle (12 / 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.up, self.mid, self.tail = nn.Conv2d(8, 12, 1), nn.Conv2d(3, 7, 3), nn.Conv2d(7, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + F.relu(self.grouped(x))
        return self.tail(F.relu(self.mid(F.pixel_shuffle(self.up(x), 2))))


class SmallUnet(nn.Module):
    def __init__(self, i: int, c: int, o: int) -> None:
        super().__init__()
        self.enter, self.down, self.deep = conv(i, c), nn.Conv2d(c, 7, 2, 2), conv(7, 8)
        self.up, self.out = nn.ConvTranspose2d(8, 9, 2, 2), conv(c + 9, o)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        return self.out(torch.cat([skip, self.up(self.deep(self.down(skip)))], 1))


@net(2 * (6 + 7 + 8 + 9) + 5 + 5, 2, 3, 8, 8)
class StackedUnets(Chain):
    def __init__(self) -> None:
        super().__init__(SmallUnet(3, 6, 5), SmallUnet(5, 6, 5), nn.Conv2d(5, 4, 1))


@net(3 + 3, 2, 3, 8, 8)
class GroupNorms(Chain):
    """Whole norm groups: 12 / 4 and 9 / 3."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.SiLU(), nn.Conv2d(12, 9, 3),
                         nn.GroupNorm(3, 9), nn.SiLU(), nn.Conv2d(9, 4, 1))  # fmt: skip


@net(10 + 7, 2, 3, 8, 8)
class OneGroupNorm(Chain):
    """GroupNorm with one group keeps its divisor."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 10, 3), nn.GroupNorm(1, 10), nn.Conv2d(10, 7, 1), nn.ReLU(),
                         nn.GroupNorm(1, 7), nn.Conv2d(7, 4, 1))  # fmt: skip


@net(6 + 7, 2, 3, 8, 8)
class WeightNorms(Chain):
    def __init__(self) -> None:
        norm = nn.utils.parametrizations.weight_norm
        super().__init__(norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), norm(nn.Conv2d(6, 7, 3)), nn.ReLU(),
                         nn.Conv2d(7, 4, 1))  # fmt: skip


@net(8 + 12, 2, 3, 8, 8)
class Multiplier(Chain):
    """A depthwise convolution with two outputs per input: 8 units of 1 + 2 channels."""

    def __init__(self) -> None:
        super().__init__(conv(3, 8), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 12, 1),
                         nn.ReLU(), nn.Conv2d(12, 4, 1))  # fmt: skip


@net(9, 2, 3, 8, 8)
class Sigmoid(Chain):
    """f(0) = 0.5 and a norm without parameters: harmless, the next columns are zero."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 9, 3), nn.Sigmoid(), nn.BatchNorm2d(9, affine=False),
                         nn.Conv2d(9, 4, 1))  # fmt: skip


@net(11, 2, 7, 6)
class MeanOfNonzero(nn.Module):
    """A mean over channels that are not zero when removed pins them; the inner width is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(6, 11), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).sigmoid().mean(-1, keepdim=True) + self.c(F.relu(self.b(x)))


class Attention(nn.Module):
    """Heads by separate or fused projections; `kv` key-value heads, rotary positions."""

    def __init__(self, c: int, heads: int, kv: int, width: int, layout: str) -> None:
        super().__init__()
        self.heads, self.kv, self.width, self.layout = heads, kv, width, layout
        if layout in ("separate", "capped"):
            self.q, self.k, self.v = (nn.Linear(c, n * width) for n in (heads, kv, kv))
        else:
            self.qkv = nn.Linear(c, 3 * heads * width)
        self.o = nn.Linear(heads * width, c)
        if layout == "capped":
            self.sinks = nn.Parameter(torch.randn(heads))
        table = torch.arange(16)[:, None] * 0.7 ** torch.arange(width // 2)
        table = torch.cat([table, table], -1)
        self.register_buffer("cos", table.cos())
        self.register_buffer("sin", table.sin())

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        b, t, _ = x.shape
        if self.layout == "separate":
            parts = ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv))
            q, k, v = (p(x).view(b, t, n, self.width).transpose(1, 2) for p, n in parts)
            repeat = self.heads // self.kv
            k, v = (y[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(b, self.heads, t, -1)
                    for y in (k, v))  # fmt: skip
            return q, k, v
        if self.layout == "3hd":
            return (
                self.qkv(x).view(b, t, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
            )
        return self.qkv(x).view(b, t, self.heads, 3 * self.width).transpose(1, 2).chunk(3, -1)

    def rotated(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        t = x.shape[-2]
        return x * self.cos[:t] + torch.cat([-right, left], -1) * self.sin[:t]

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "capped":
            q, k, v = (p(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
                       for p in (self.q, self.k, self.v))  # fmt: skip
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            y = attention(self.rotated(q), self.rotated(k), v, seen, 0.4, 1.5, self.sinks)
            return self.o(y.transpose(1, 2).flatten(2))
        q, k, v = self.split(x)
        y = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c: int, norm: Callable[[int], nn.Module], **attention: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm(c), norm(c)])
        self.attention = Attention(c, **attention)
        self.gate, self.up, self.down = nn.Linear(c, 11), nn.Linear(c, 11), nn.Linear(11, c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def transformer(norm: Callable[[int], nn.Module], **attention: Any) -> Callable[[], nn.Module]:
    return lambda: Chain(nn.Linear(3, 12), Block(12, norm, **attention), norm(12), nn.Linear(12, 5))


SIZES = {"heads": 4, "width": 6}
for _name, _kv, _layout, _norm, _heads in [
    ("MultiHead", 4, "separate", nn.LayerNorm, 4),
    ("GroupedQuery", 2, "separate", nn.RMSNorm, 2),
    ("Capped", 2, "capped", nn.RMSNorm, 2),
    ("MultiQuery", 1, "separate", nn.RMSNorm, 4),
    ("FusedOuter", 4, "3hd", nn.LayerNorm, 4),
    ("FusedInner", 4, "h3d", nn.LayerNorm, 4),
]:
    NETS[_name] = Net(
        transformer(_norm, kv=_kv, layout=_layout, **SIZES), (2, 7, 3), 12 + 11 + _heads
    )


@net(8 + 9 + 10, 2, 7, 3)
class TokenMixer(nn.Module):
    """The bias of the token layer makes removed channels non-zero: the second norm pins them.

    So the stem's 8 channels stay where they meet that norm, unless it sees no bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tokens, self.back = (
            nn.Linear(3, 8),
            nn.Linear(7, 9, bias=False),
            nn.Linear(9, 7, bias=False),
        )
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(F.gelu(self.tokens(x.transpose(1, 2)))).transpose(1, 2)
        return self.down(F.gelu(self.up(self.norm(x))))


@net(9 + 10, 2, 7, 3)
class BiasedTokenMixer(TokenMixer):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.back = nn.Linear(7, 9), nn.Linear(9, 7)


class Tied(nn.Module):
    """Embedding and output layer share one tensor; the vocabulary stays."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(13, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + torch.tanh(self.inner(x)))


class Reused(nn.Module):
    """One layer called twice: both call sites share their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.shared(F.relu(self.shared(x)))))


NETS["Reused"] = Net(Reused, (4, 3), 8)


@torch.no_grad()
def prepare(model: nn.Module, *shape: int) -> nn.Module:
    """Double precision, weights by fan-in, batch-norm statistics from data, 1-D ones perturbed.

    Fresh deep nets die, and a constant output equals anything.
    """
    g = torch.Generator().manual_seed(1)
    model.double()
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
        if p.dim() > 1:
            p.copy_(1.4 * noise / math.sqrt(p[0].numel()))
        else:
            p.add_(0.3 * noise)
    if len(shape) > 1 and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model.train()
        for _ in range(5):
            model(torch.randn(8, *shape[1:], generator=g, dtype=torch.float64))
    return model.eval()


def error(a: Any, b: Any) -> float:
    """Largest relative error of the tensors of two results."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (a, b)), strict=True)
    return max(float((x - y).detach().norm() / x.detach().norm()) for x, y in pairs)
