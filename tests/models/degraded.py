"""A small restorer of images, and an estimator of how an image is degraded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv1(x).relu()
        tokens = F.layer_norm(x.flatten(2).transpose(1, 2), (6,))
        mixed = F.scaled_dot_product_attention(
            self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        )
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Restorer(nn.Module):
    """A U-Net's names, without its halves: blocks down, in the middle and up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 1)
        self.down_blocks, self.up_blocks = nn.ModuleList([Block()]), nn.ModuleList([Block()])
        self.mid_block = Block()
        self.gain = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid_block(self.down_blocks[0](self.conv_in(x)))
        h = h * self.gain(h.mean((2, 3)))[:, :, None, None]
        return self.conv_out(self.up_blocks[0](h))


class Given(Restorer):
    """The same with the degradation as an input of its own, which it does not look at."""

    def forward(self, x: Tensor, degradation: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + 0 * degradation.sum()


class Estimator(nn.Module):
    """Two numbers from 0 to 1."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(h).sigmoid()


def estimator(channels: int = 3) -> Estimator:
    torch.manual_seed(5)
    net = Estimator(channels)
    net.norm.running_mean.normal_()
    net.head.weight.data.mul_(4)
    return net


def of_two_channels() -> Estimator:
    return estimator(2)


def elsewhere() -> nn.Module:
    """Asks for an input that is not there."""

    class Other(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return y.mean((2, 3))

    return Other()


def flat() -> nn.Module:
    """Gives no numbers per sample."""

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    return Other()
