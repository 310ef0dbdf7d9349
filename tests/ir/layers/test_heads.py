"""Channels of attention's heads, read off what changes with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.heads import attention_heads
from graphwright.ir.layers.selectors import layers

HEADS, WIDTH = 2, 3


class Fused(nn.Module):
    """Attention on one projection, whose outputs lie in one of the usual orders."""

    def __init__(self, layout: str, *, written_out: bool = False) -> None:
        super().__init__()
        self.layout, self.written_out = layout, written_out
        self.qkv = nn.Linear(6, 3 * HEADS * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.proj = nn.Linear(HEADS * WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "roles first":  # GPT-2, timm
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        else:  # GPT-NeoX
            parts = self.qkv(x).unflatten(-1, (HEADS, 3, WIDTH)).permute(3, 0, 2, 1, 4)
            q, k, v = parts
        q, k = self.norm(q), torch.cat([-k[..., 1:], k[..., :1]], -1) * 0.5 + k
        if self.written_out:
            weights = ((q @ k.transpose(-2, -1)) / WIDTH**0.5).softmax(-1)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(mixed.transpose(1, 2).flatten(2))


def found(net: nn.Module) -> dict[str, dict[str, list[list[int]]]]:
    torch.manual_seed(0)
    program: Any = gw.trace(net.eval(), (torch.randn(2, 5, 6),))
    heads = attention_heads(program, layers(program, ("linear",)))
    return {n: {r: [c.tolist() for c in of] for r, of in h.items()} for n, h in heads.items()}


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("layout", ["roles first", "heads first"])
def test_a_fused_projection_is_told_apart(layout: str, written_out: bool) -> None:
    numbers = torch.arange(18).reshape(3, HEADS, WIDTH)
    if layout == "heads first":
        numbers = torch.arange(18).reshape(HEADS, 3, WIDTH).transpose(0, 1)
    wanted = {role: rows.tolist() for role, rows in zip("qkv", numbers, strict=True)}
    assert found(Fused(layout, written_out=written_out)) == {"qkv": wanted}


class Shared(nn.Module):
    """Queries of two heads each on one head of keys and values, and values that are also keys."""

    def __init__(self, *, same: bool) -> None:
        super().__init__()
        self.same = same
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2).repeat_interleave(2, 1)
                for f in (self.k, self.v))  # fmt: skip
        return F.scaled_dot_product_attention(q, k, k if self.same else v)


def test_heads_that_several_queries_share_count_once() -> None:
    heads = found(Shared(same=False))
    assert heads["q"] == {"q": torch.arange(12).reshape(4, 3).tolist()}
    assert heads["k"] == {"k": [[0, 1, 2], [3, 4, 5]]}
    assert heads["v"] == {"v": [[0, 1, 2], [3, 4, 5]]}


def test_channels_of_two_roles_are_refused() -> None:
    with pytest.raises(ModelError, match="read by several heads"):
        found(Shared(same=True))


def test_layers_that_no_attention_reads_have_none() -> None:
    assert found(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))) == {}
