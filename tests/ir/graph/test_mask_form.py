"""Masks over a cache, read from the arithmetic that builds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.graph.mask_form import mask_form
from graphwright.ir.graph.sizes import sizes_of


class Masked(nn.Module):
    """Attention of new queries over `past` keys and their own, under a mask of `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, q: Tensor, past: Tensor, seen: Tensor) -> Tensor:
        keys = torch.cat([past, q], 2)
        before = past.shape[2]
        at = torch.arange(q.shape[2])[:, None] + before
        k = torch.arange(before + q.shape[2])[None]
        mask = {
            "causal": k <= at,
            "window": (k <= at) & (k > at - 4),
            "within": (at >= k) & (at - k < 4),
            "two windows": (k <= at) & (k > at - 4) & (k > at - 3),
            "forward": k >= at,
            "off by one": k < at,
        }[self.kind]
        mask = mask & seen.bool()[:, None, None, :]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, keys, attn_mask=mask)


def form_of(kind: str) -> tuple[bool, int | None, str] | None:
    inputs = (torch.randn(2, 1, 3, 8), torch.randn(2, 1, 5, 8), torch.ones(2, 8, dtype=torch.int64))
    free = {"q": {0: "batch", 2: "seq"}, "past": {0: "batch", 2: "past"}, "seen": {0: "batch"}}
    program = gw.trace(Masked(kind), inputs, free, check=False)
    target = torch.ops.aten.scaled_dot_product_attention.default
    (node,) = program.graph.find_nodes(op="call_function", target=target)
    (past,) = program.graph.find_nodes(op="placeholder", target="past")
    mask = node.args[3] if len(node.args) > 3 else node.kwargs["attn_mask"]
    form = mask_form(mask, program.state, sizes_of(past)[2])
    return form and (form.causal, form.window, form.keys.name if form.keys else "")


@pytest.mark.parametrize(("kind", "window"), [("causal", None), ("window", 4), ("within", 4)])
def test_a_cached_mask_is_causal_within_a_window_over_real_keys(
    kind: str, window: int | None
) -> None:
    assert form_of(kind) == (True, window, "seen")


def test_a_bound_on_one_side_alone_is_not_causal() -> None:
    assert form_of("forward") == (False, 1, "seen")


@pytest.mark.parametrize("kind", ["two windows", "off by one"])
def test_other_masks_have_no_form(kind: str) -> None:
    assert form_of(kind) is None
