"""Nets that lose digits: deep and random, with norm statistics taken from a few inputs.

Where a channel hardly varies, its norm divides by next to nothing, and float32's rounding grows
with it. `nets()` names them; `with_statistics` sets the statistics as published audits do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.passes.cleanup.fold_batch_norm import FoldBatchNorm


def conv_norm(a: int, b: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.act = inner, act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.inner(x))


class Dense(nn.Module):
    def __init__(self, a: int, growth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(conv_norm(a, growth), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)], 1)


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(c, c), nn.SiLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x * self.gate(x)


class UNet(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.first = nn.Sequential(conv_norm(3, c), nn.ReLU())
        self.down = nn.Sequential(conv_norm(c, 2 * c, stride=2), nn.ReLU())
        self.deep = nn.Sequential(*(nn.Sequential(conv_norm(2 * c, 2 * c), nn.ReLU())
                                    for _ in range(12)))  # fmt: skip
        self.up = nn.Sequential(nn.ConvTranspose2d(2 * c, c, 2, 2, bias=False), nn.BatchNorm2d(c))
        self.last = nn.Sequential(conv_norm(2 * c, c), nn.ReLU(), nn.Conv2d(c, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        near = self.first(x)
        return self.last(torch.cat([near, self.up(self.deep(self.down(near)))], 1))


def _head(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def _plain(depth: int, act: Callable[[], nn.Module]) -> nn.Module:
    layers = [m for _ in range(depth) for m in (*conv_norm(12, 12), act())]
    return _head(conv_norm(3, 12), act(), *layers, width=12)


def deep(depth: int) -> nn.Module:
    """A plain net in which float32 loses a thousandth at a depth of 60."""
    return _plain(depth, nn.LeakyReLU)


def _mobile() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(
            conv_norm(12, 36, 1), nn.Hardswish(), conv_norm(36, 36, groups=36), nn.Hardswish(),
            conv_norm(36, 12, 1),
        )  # fmt: skip

    return _head(conv_norm(3, 12), *(Residual(block(), nn.Identity()) for _ in range(8)), width=12)


def _audio() -> nn.Module:
    layers: list[nn.Module] = []
    width = 1
    for _ in range(14):
        layers += [nn.Conv1d(width, 12, 5, padding=2), nn.BatchNorm1d(12), nn.ELU()]
        width = 12
    return nn.Sequential(*layers, nn.Conv1d(12, 2, 1))


def _mlp() -> nn.Module:
    layers = [m for _ in range(20) for m in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def _residual(depth: int) -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(conv_norm(12, 12), nn.ReLU(), conv_norm(12, 12))

    return _head(conv_norm(3, 12), *(Residual(block()) for _ in range(depth)), width=12)


def nets() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Name to (maker, shape of one input)."""
    image = (3, 12, 12)
    return {
        "plain_relu": (lambda: _plain(24, nn.ReLU), image),
        "plain_tanh": (lambda: _plain(16, nn.Tanh), image),
        "plain_leaky": (lambda: _plain(40, nn.LeakyReLU), image),
        "residual": (lambda: _residual(10), image),
        "dense": (lambda: _head(*(Dense(3 + 4 * i, 4) for i in range(10)), width=43), image),
        "gated": (lambda: _head(conv_norm(3, 12), *(Gated(12) for _ in range(8)), width=12), image),
        "mobile": (_mobile, image),
        "unet": (lambda: UNet(8), image),
        "audio": (_audio, (1, 64)),
        "mlp": (_mlp, (16,)),
    }


@torch.no_grad()
def with_statistics(model: nn.Module, shape: tuple[int, ...], seed: int, count: int) -> nn.Module:
    """The model with random affine norms whose statistics are those of `count` inputs."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None  # the mean over what was seen, from the first input on
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
            norm.bias.copy_(0.3 * torch.randn(norm.bias.shape, generator=generator))
    model.train()
    model(torch.randn(count, *shape, generator=generator))
    return model.eval()


@cache
def folded(name: str, count: int) -> tuple[gw.Program, gw.Program]:
    """A net whose norm statistics are those of `count` inputs, and the same net without norms."""
    make, shape = nets()[name]
    torch.manual_seed(count)
    model = with_statistics(make(), shape, count, count)
    program = gw.trace(model, (torch.randn(3, *shape),))
    return program, FoldBatchNorm().execute(program, Context()).program
