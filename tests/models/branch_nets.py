"""Blocks with training-time branches, as their papers draw them, and norms as after training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def with_statistics(model: nn.Module) -> nn.Module:
    """In double precision, with nothing of a norm at its default."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, tuple(NORMS.values())):
            size = norm.running_mean.shape
            norm.running_mean.copy_(torch.randn(size, generator=generator))
            norm.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            norm.weight.data.copy_(torch.randn(size, generator=generator))
            norm.bias.data.copy_(torch.randn(size, generator=generator))
    return model.double().eval()


class Normed(nn.Module):
    """A convolution and a batch norm; of no kernel, the norm alone."""

    def __init__(self, rank: int, i: int, o: int, kernel: object = None, **options: object) -> None:
        super().__init__()
        self.norm = NORMS[rank](o)
        self.conv = (
            nn.Identity() if kernel is None
            else CONVOLUTIONS[rank](i, o, kernel, bias=False, **options)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Summed(nn.Module):
    """The sum of branches of one input, and a ReLU."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return F.relu(total)


def repvgg(i: int, o: int, stride: int = 1, groups: int = 1) -> nn.Module:
    branches = [
        Normed(2, i, o, 3, padding=1, stride=stride, groups=groups),
        Normed(2, i, o, 1, stride=stride, groups=groups),
    ]
    return Summed(*branches, *([Normed(2, i, o)] if i == o and stride == 1 else []))


def mobileone(c: int, o: int, copies: int = 3) -> nn.Module:
    depthwise = [Normed(2, c, c, 3, padding=1, groups=c) for _ in range(copies)]
    pointwise = [Normed(2, c, o, 1) for _ in range(copies)]
    return nn.Sequential(
        Summed(*depthwise, Normed(2, c, c, 1, groups=c), Normed(2, c, c)),
        Summed(*pointwise, *([Normed(2, c, c)] if c == o else [])),
    )


def acnet(i: int, o: int) -> nn.Module:
    return Summed(
        Normed(2, i, o, 3, padding=1),
        Normed(2, i, o, (1, 3), padding=(0, 1)),
        Normed(2, i, o, (3, 1), padding=(1, 0)),
    )


class NormAndPad(nn.Module):
    """A batch norm with a border of what it makes of zero, written as the paper's code does."""

    def __init__(self, c: int, width: int) -> None:
        super().__init__()
        self.norm, self.width = nn.BatchNorm2d(c), width

    def forward(self, x: Tensor) -> Tensor:
        w, norm = self.width, self.norm
        scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        value = (norm.bias.detach() - norm.running_mean * scale).view(1, -1, 1, 1)
        y = F.pad(norm(x), [w, w, w, w])
        y[:, :, :w, :] = value
        y[:, :, -w:, :] = value
        y[:, :, :, :w] = value
        y[:, :, :, -w:] = value
        return y


def dbb(c: int, o: int) -> nn.Module:
    return Summed(
        Normed(2, c, o, 3, padding=1),
        Normed(2, c, o, 1),
        nn.Sequential(nn.Conv2d(c, c, 1, bias=False), NormAndPad(c, 1), Normed(2, c, o, 3)),
        nn.Sequential(nn.Conv2d(c, o, 1, bias=False), NormAndPad(o, 1), nn.AvgPool2d(3, 1),
                      nn.BatchNorm2d(o)),
    )  # fmt: skip
