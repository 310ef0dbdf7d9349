"""A mixture of experts as libraries write it: matrices gathered by the router's choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw

WIDTH, HIDDEN, COUNT, BEST = 32, 48, 4, 2


class Experts(nn.Module):
    """Stacks (experts, out, in) without and (experts, in, out) with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH) / HIDDEN**0.5)
        self.down_bias = nn.Parameter(torch.randn(COUNT, WIDTH) / 10)

    def forward(self, x: Tensor, which: Tensor, share: Tensor) -> Tensor:
        rows, ids = x.repeat_interleave(BEST, 0), which.reshape(-1)
        y = torch.bmm(self.up[ids], rows.unsqueeze(-1)).squeeze(-1)
        y = torch.bmm(F.silu(y).unsqueeze(1), self.down[ids]).squeeze(1) + self.down_bias[ids]
        return (y * share.reshape(-1, 1)).reshape(-1, BEST, WIDTH).sum(1)


class Mixture(nn.Module):
    """A linear layer, then routed experts beside a residual; `mask` marks padding with 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, COUNT)
        self.experts = Experts()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.stem(x) * attention_mask.unsqueeze(-1)
        flat = x.reshape(-1, WIDTH)
        share, which = self.router(flat).softmax(-1).topk(BEST, -1)
        return x + self.experts(flat, which, share).reshape(x.shape)


def mixture(seed: int = 0) -> tuple[Mixture, gw.Program]:
    """The net and its program, with free batch and length."""
    torch.manual_seed(seed)
    net = Mixture().eval()
    dims = {0: "batch", 1: "length"}
    example = (torch.randn(2, 5, WIDTH), torch.ones(2, 5))
    names = {"x": example[0], "attention_mask": example[1]}
    return net, gw.trace(net, names, dynamic=dict.fromkeys(names, dims))


def batches(count: int = 3, *, padded: int = 0, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of 4 sequences of 9 tokens; the last `padded` of each are padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 9)
    mask[:, 9 - padded :] = 0
    return [(torch.randn(4, 9, WIDTH, generator=generator), mask) for _ in range(count)]
