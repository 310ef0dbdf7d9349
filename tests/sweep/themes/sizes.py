"""Arithmetic on sizes: numbers computed from a free dimension, branches and loops on them."""

from __future__ import annotations

import math

import torch
from sweep.cases import Theme, With, real
from torch import Tensor, nn
from torch.nn import functional as F

SEQUENCE = {"x": real("t", 4)}
LINE = ("themes/",)


def _t(x: Tensor) -> int:
    return x.shape[0]


numbers = Theme("sizes as numbers")
numbers.functions(
    {
        "int(t * 0.5)": lambda x: x[: int(_t(x) * 0.5) + 1],
        "int(t * 0.3) as a factor": lambda x: x * int(_t(x) * 0.3),
        "int(t / 3)": lambda x: x[: int(_t(x) / 3) + 1],
        "t / 3 as a factor": lambda x: x * (_t(x) / 3),
        "t ** 0.5 as a factor": lambda x: x / _t(x) ** 0.5,
        "math.sqrt(t)": lambda x: x * math.sqrt(_t(x)),
        "math.isqrt of a size": lambda x: x[: math.isqrt(_t(x))],
        "int(t ** 0.5)": lambda x: x[: int(_t(x) ** 0.5)],
        "t ** 2": lambda x: x * _t(x) ** 2,
        "2 ** t": lambda x: x * 2.0 ** -_t(x),
        "t ** -1": lambda x: x * _t(x) ** -1,
        "math.log(t)": lambda x: x * math.log(_t(x) + 1),
        "math.log2(t)": lambda x: x * math.log2(_t(x) + 1),
        "math.exp(-t)": lambda x: x * math.exp(-_t(x) / 10),
        "math.sin(t)": lambda x: x * math.sin(_t(x)),
        "math.ceil(t / 4)": lambda x: x[: math.ceil(_t(x) / 4)],
        "math.floor(t / 4)": lambda x: x[: math.floor(_t(x) / 4) + 1],
        "math.trunc(t / 4)": lambda x: x[: math.trunc(_t(x) / 4) + 1],
        "round(t / 4)": lambda x: x[: round(_t(x) / 4) + 1],
        "round(t * 0.7)": lambda x: x[: round(_t(x) * 0.7)],
        "-(-t // 4)": lambda x: x[: -(-_t(x) // 4)],
        "t // 2": lambda x: x[_t(x) // 2 :],
        "t % 4": lambda x: F.pad(x, (0, 0, 0, _t(x) % 4)),
        "-t % 4": lambda x: F.pad(x, (0, 0, 0, -_t(x) % 4)),
        "divmod(t, 3)": lambda x: x * divmod(_t(x), 3)[0] + divmod(_t(x), 3)[1],
        "t & 1": lambda x: x * (_t(x) & 1),
        "t >> 1": lambda x: x[: (_t(x) >> 1) + 1],
        "t.bit_length()": lambda x: x * int(_t(x)).bit_length(),
        "max(t, 16)": lambda x: F.pad(x, (0, 0, 0, max(_t(x), 16) - _t(x))),
        "min(t, 16)": lambda x: x[: min(_t(x), 16)],
        "abs(t - 20)": lambda x: x * abs(_t(x) - 20),
        "float(t)": lambda x: x / float(_t(x)),
        "1 / t": lambda x: x * (1 / _t(x)),
        "t * 0.5 plus t": lambda x: x + _t(x) * 0.5 + _t(x),
        "len(x)": lambda x: x / len(x),
        "x.numel() // 8": lambda x: x * (x.numel() // 8),
        "torch.tensor(t)": lambda x: x / torch.tensor(_t(x)),
        "torch.tensor(t).sqrt()": lambda x: x / torch.tensor(float(_t(x))).sqrt(),
        "torch.sqrt of a size": lambda x: x * torch.sqrt(torch.tensor(_t(x) * 1.0)),
        "torch.full of a size": lambda x: torch.full((2,), _t(x)) * x.sum(),
        "str(t) in a dictionary": lambda x: x * {"12": 2.0}.get(str(_t(x)), 3.0),
        "t in a list index": lambda x: x * [1.0, 2.0, 3.0][_t(x) % 3],
        "the size returned": lambda x: (x * 2, _t(x)),
        "half of the size returned": lambda x: (x * 2, _t(x) // 2),
        "the size as a list": lambda x: x.new_tensor([_t(x), 4]) + x.sum(),
        "hash of a size": lambda x: x * (hash((_t(x), 3)) % 7),
    },
    **SEQUENCE,
)

branches = Theme("branches on sizes")


def _if(condition: object) -> object:
    return lambda x: x * 2 if condition(_t(x)) else x - 1  # type: ignore[operator]


for _name, _condition in {
    "t // 4 == 3": lambda t: t // 4 == 3,
    "t % 4 == 0": lambda t: t % 4 == 0,
    "t % 2": lambda t: t % 2,
    "t > 20": lambda t: t > 20,
    "t >= 12": lambda t: t >= 12,
    "t < 13": lambda t: t < 13,
    "t == 12": lambda t: t == 12,
    "t != 16": lambda t: t != 16,
    "t * 0.5 > 7": lambda t: t * 0.5 > 7,
    "t ** 0.5 > 4": lambda t: t**0.5 > 4,
    "math.log2(t) is whole": lambda t: math.log2(t) % 1 == 0,
    "int(t * 0.5) == 6": lambda t: int(t * 0.5) == 6,
    "math.ceil(t / 5) == 3": lambda t: math.ceil(t / 5) == 3,
    "round(t / 5) == 2": lambda t: round(t / 5) == 2,
    "t in (12, 24)": lambda t: t in (12, 24),
    "10 < t < 20": lambda t: 10 < t < 20,
    "t & (t - 1) == 0": lambda t: t & (t - 1) == 0,
    "t is 1": lambda t: t == 1,
    "t * t > 200": lambda t: t * t > 200,
    "min(t, 16) == t": lambda t: min(t, 16) == t,
    "t % 3 and t % 4": lambda t: t % 3 == 0 and t % 4 == 0,
    "(t + 1) // 2 * 2 == t": lambda t: (t + 1) // 2 * 2 == t,
}.items():
    branches.function(_name, _if(_condition), **SEQUENCE, blames=LINE)  # type: ignore[arg-type]


def _grown(x: Tensor) -> Tensor:
    while x.shape[0] < 16:
        x = torch.cat([x, x])
    return x


def _halved(x: Tensor) -> Tensor:
    total = x.sum(0)
    while x.shape[0] > 1:
        x = x[: x.shape[0] // 2]
        total = total + x.sum(0)
    return total


def _checked(x: Tensor) -> Tensor:
    if x.shape[0] % 4:
        x = F.pad(x, (0, 0, 0, 4 - x.shape[0] % 4))
    return x.view(-1, 4, 4).mean(1)


def _asserted(x: Tensor) -> Tensor:
    assert x.shape[0] >= 4, "too short"
    return x.unfold(0, 4, 1).sum(-1)


branches.function("padded when it is no multiple", _checked, **SEQUENCE, blames=LINE)
branches.function("an assertion on the size", _asserted, x=real("t", 4),
                  sizes={"t": (12, 13, 16, 24, 49, 4)}, blames=LINE)  # fmt: skip
branches.function("a loop until the size is reached", _grown, **SEQUENCE, blames=LINE)
branches.function("a loop that halves", _halved, **SEQUENCE, blames=LINE)
branches.function("a loop over the size", lambda x: sum(x[i] * i for i in range(_t(x))),
                  **SEQUENCE, blames=LINE)  # fmt: skip
branches.function("a loop over the tensor", lambda x: torch.stack([row * 2 for row in x]),
                  **SEQUENCE, blames=LINE)  # fmt: skip
branches.function("a list of the size", lambda x: torch.tensor(list(range(_t(x)))) * x.sum(),
                  **SEQUENCE, blames=LINE)  # fmt: skip
branches.function("chunks in a loop",
                  lambda x: torch.cat([c * i for i, c in enumerate(x.split(5))]),
                  **SEQUENCE, blames=LINE)  # fmt: skip
branches.function("windows in a loop",
                  lambda x: torch.stack([x[i : i + 4].sum(0) for i in range(0, _t(x) - 3, 2)]),
                  x=real("t", 4), sizes={"t": (12, 13, 16, 24, 49, 4)}, blames=LINE)  # fmt: skip

shaping = Theme("sizes that shape")
shaping.functions(
    {
        "arange(t)": lambda x: x + torch.arange(_t(x))[:, None],
        "arange(t) in reverse": lambda x: x * torch.arange(_t(x) - 1, -1, -1)[:, None],
        "arange(0, t, 3)": lambda x: x[torch.arange(0, _t(x), 3)],
        "arange(t // 2)": lambda x: torch.arange(_t(x) // 2).float() * x.sum(),
        "arange of floats up to t": lambda x: torch.arange(0.0, _t(x), 0.5) * x.sum(),
        "linspace over t": lambda x: x * torch.linspace(-1, 1, _t(x))[:, None],
        "zeros(t // 2)": lambda x: torch.cat([x, torch.zeros(_t(x) // 2, 4)]),
        "ones(t, t).tril()": lambda x: torch.ones(_t(x), _t(x)).tril() @ x,
        "eye(t)": lambda x: (torch.eye(_t(x)) * 2) @ x,
        "full((t,), inf).triu()": lambda x: (
            (x @ x.T + torch.full((_t(x), _t(x)), float("-inf")).triu(1)).softmax(-1) @ x
        ),
        "expand(t)": lambda x: x[:1].expand(_t(x), -1) + x,
        "view(t * 4)": lambda x: x.view(_t(x) * 4),
        "view(t, 2, -1)": lambda x: x.view(_t(x), 2, -1).sum(2),
        "view(-1, t)": lambda x: x.reshape(-1, _t(x)).sum(0),
        "view of a padded multiple of 8": lambda x: F.pad(x, (0, 0, 0, -_t(x) % 8)).view(-1, 8, 4),
        "padded by ceil(t / 8) * 8": lambda x: F.pad(
            x, (0, 0, 0, math.ceil(_t(x) / 8) * 8 - _t(x))
        ).view(-1, 8, 4),
        "padded by int(t * 0.25)": lambda x: F.pad(x, (0, 0, int(_t(x) * 0.25), 0)),
        "padded in halves": lambda x: F.pad(
            x, (0, 0, (-_t(x) % 8) // 2, -_t(x) % 8 - (-_t(x) % 8) // 2)
        ),
        "cut to a multiple of 4": lambda x: x[: _t(x) // 4 * 4].reshape(-1, 4),
        "cut off at the end again": lambda x: F.pad(x, (0, 0, 0, -_t(x) % 8)).cumsum(0)[: _t(x)],
        "chunk in two": lambda x: torch.cat(F.pad(x, (0, 0, 0, _t(x) % 2)).chunk(2), 1),
        "split in halves": lambda x: torch.cat([x[_t(x) // 2 :], x[: _t(x) // 2]]),
        "roll by half": lambda x: x.roll(_t(x) // 2, 0),
        "roll by minus one": lambda x: x.roll(-1, 0),
        "even and odd rows": lambda x: torch.cat([x[::2], x[1::2]]),
        "repeat(t)": lambda x: x[:1].repeat(_t(x), 1) * x,
        "repeat_interleave(t)": lambda x: x[:2].repeat_interleave(_t(x), 0),
        "one_hot of positions": lambda x: F.one_hot(torch.arange(_t(x)) % 5, 5),
        "positions relative": lambda x: torch.arange(_t(x))[:, None] - torch.arange(_t(x)),
        "mean by division": lambda x: x.sum(0) / _t(x),
        "index by the middle": lambda x: x[_t(x) // 2],
        "index by t - 1": lambda x: x[_t(x) - 1],
        "slice from -3": lambda x: x[-3:],
        "slice of a quarter": lambda x: x[_t(x) // 4 : 3 * _t(x) // 4 + 1],
        "slice by a float": lambda x: x[: int(0.9 * _t(x)) + 1],
        "unfold(t // 4)": lambda x: F.pad(x, (0, 0, 2, 2)).unfold(0, 4, 2),
        "topk(t // 2)": lambda x: x.topk(_t(x) // 2 + 1, 0)[0],
        "topk(min(t, 5))": lambda x: x.topk(min(_t(x), 5), 0)[0],
        "topk(int(t * 0.4) + 1)": lambda x: x.topk(int(_t(x) * 0.4) + 1, 0)[0],
        "interpolate to t * 2": lambda x: F.interpolate(x.T[None], _t(x) * 2, mode="linear"),
        "interpolate to int(t * 1.5)": lambda x: F.interpolate(x.T[None], int(_t(x) * 1.5)),
        "interpolate by 0.5": lambda x: F.interpolate(
            F.pad(x, (0, 0, 0, 1)).T[None], scale_factor=0.5
        ),
        "adaptive pool to t // 2": lambda x: F.adaptive_avg_pool1d(x.T[None], _t(x) // 2 + 1),
        "average pool over t": lambda x: F.avg_pool1d(x.T[None], _t(x)),
        "strided windows": lambda x: x.as_strided((_t(x), 2), (4, 1)),
        "sinusoidal positions": lambda x: x + _sinusoids(_t(x)),
        "alibi biases": lambda x: (x @ x.T - _distances(_t(x)) * 0.5).softmax(-1) @ x,
        "space to depth": lambda x: F.pad(x, (0, 0, 0, -_t(x) % 2)).view(-1, 2, 4).flatten(1),
        "batch and block of t": lambda x: x.view(_t(x), 1, 4).expand(-1, 3, -1).flatten(0, 1),
        "meshgrid of sizes": lambda x: (
            torch.meshgrid(torch.arange(_t(x)), torch.arange(4), indexing="ij")[0] + x
        ),
    },
    **SEQUENCE,
)


def _sinusoids(size: int) -> Tensor:
    rate = torch.exp(torch.arange(0, 4, 2) * (-math.log(10000.0) / 4))
    angle = torch.arange(size)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def _distances(size: int) -> Tensor:
    return (torch.arange(size)[:, None] - torch.arange(size)).abs()


images = Theme("image sizes")
IMAGE = {"x": real("b", 3, "h", "w")}


def _windows(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    x = F.pad(x, (0, -w % 4, 0, -h % 4))
    rows, columns = x.shape[2] // 4, x.shape[3] // 4
    x = x.view(b, c, rows, 4, columns, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    x = x - x.mean(1, keepdim=True)
    x = x.view(b, rows, columns, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * 4, -1)
    return x[:, :, :h, :w]


def _grid(x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    ys = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(b, -1, -1, w)
    xs = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(b, -1, h, -1)
    return torch.cat([x, ys, xs], 1)


def _grown_map(x: Tensor) -> Tensor:
    low = F.max_pool2d(x, 2)
    high = F.interpolate(low, scale_factor=2)
    dy, dx = x.shape[2] - high.shape[2], x.shape[3] - high.shape[3]
    return torch.cat([x, F.pad(high, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2))], 1)


images.functions(
    {
        "windows of 4 by 4": _windows,
        "coordinate channels": _grid,
        "skip with a padded difference": _grown_map,
        "skip with a cropped map": lambda x: F.interpolate(F.max_pool2d(x, 2, ceil_mode=True),
                                                           scale_factor=2)[
            :, :, : x.shape[2], : x.shape[3]] + x,
        "aspect ratio": lambda x: x * (x.shape[2] / x.shape[3]),
        "area": lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
        "centre crop": lambda x: x[
            :, :, x.shape[2] // 4 : x.shape[2] // 4 + 3, x.shape[3] // 4 : x.shape[3] // 4 + 3
        ],
        "larger side": lambda x: F.pad(x, (0, max(x.shape[2:]) - x.shape[3], 0,
                                           max(x.shape[2:]) - x.shape[2])),
        "taller than wide": lambda x: x.mT if x.shape[2] > x.shape[3] else x,
        "tokens of patches": lambda x: F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)).unfold(
            2, 4, 4).unfold(3, 4, 4).flatten(4).sum(-1),
        "tokens and back": lambda x: (x.flatten(2).mT * 2).mT.view(x.shape),
        "resized to half and back": lambda x: F.interpolate(
            F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2), mode="bilinear"), x.shape[2:]),
        "resized by a ratio of sizes": lambda x: F.interpolate(
            x, scale_factor=(12 / x.shape[2], 12 / x.shape[3])),
        "average by a kernel of the size": lambda x: F.avg_pool2d(x, (x.shape[2], 1)),
        "axial positions": lambda x: x + torch.arange(x.shape[2]).view(-1, 1) / x.shape[2]
        + torch.arange(x.shape[3]) / x.shape[3],
        "square root of the tokens": lambda x: x * (x.shape[2] * x.shape[3]) ** -0.5,
        "shifted windows": lambda x: x.roll((-2, -2), (2, 3)) - x.roll((1, 0), (2, 3)),
        "flattened positions": lambda x: x.flatten(2) + torch.arange(x.shape[2] * x.shape[3]),
    },
    **IMAGE,
)  # fmt: skip


class Positions(nn.Module):
    """A table of positions, cut to the length, resized where it is too short."""

    def __init__(self, resize: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 50, 4))
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        if not self.resize:
            return x + self.table[0, : x.shape[0]]
        found = F.interpolate(self.table.mT, x.shape[0], mode="linear")
        return x + found[0].T


shaping.module("a table cut to the length", lambda: Positions(False), **SEQUENCE)
shaping.module("a table resized to the length", lambda: Positions(True), **SEQUENCE,
               blames=("upsample",))  # fmt: skip
shaping.module("a table cut by a buffer's size", lambda: With(
    lambda m, x: x * m.mask[: _t(x), : _t(x)].sum(1, True), mask=torch.ones(64, 64).tril()),
    **SEQUENCE)  # fmt: skip

THEMES = (numbers, branches, shaping, images)
