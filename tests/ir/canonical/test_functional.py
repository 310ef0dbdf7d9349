"""Graphs with in-place calls become functional, and compute what the model computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.graph.aliasing import writes
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.trace.capture import TraceWarning

Body = Callable[[Tensor], Tensor]


class Wrap(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def plain(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1).relu_()
    return y


def read_before_and_after(x: Tensor) -> Tensor:
    y = x + 1
    before = y * 3
    y.mul_(2)
    return before + y


def through_a_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = 7.0
    y[..., 0] += x[..., 1]
    return y


def through_views_of_views(x: Tensor) -> Tensor:
    y = x + 0
    z = y.view(x.shape[0], 2, 3).transpose(1, 2)
    z[:, 0].fill_(5)
    return y * z.sum()


def an_old_view_sees_a_later_write(x: Tensor) -> Tensor:
    y = x + 0
    head = y[:, :2]
    y.mul_(3)
    return head + y[:, 2:4]


def a_copy_does_not(x: Tensor) -> Tensor:
    y = x + 0
    kept = y.clone()
    joined = torch.cat([y, y], 1)
    y.zero_()
    return kept + joined[:, 6:] + y


def chunks(x: Tensor) -> Tensor:
    y = x + 0
    left, right = y.chunk(2, dim=1)
    right.mul_(left)
    left.sub_(1)
    return y


def unbound(x: Tensor) -> Tensor:
    y = x.view(-1, 2, 3) * 1
    first, second = y.unbind(1)
    second.copy_(first)
    return y.flatten(1)


def the_diagonal(x: Tensor) -> Tensor:
    y = (x.t() @ x) + 0
    y.diagonal().fill_(1)
    return y


def an_input(x: Tensor) -> Tensor:
    x.add_(1)
    return x * x


def masked(x: Tensor) -> Tensor:
    y = x + 0
    y[y > 0.5] = -1.0
    return y.masked_fill_(y < -2, 0.0)


def keeps_its_dtype(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float32)
    y += x.double()
    counts = torch.zeros(x.shape, dtype=torch.int64)
    counts[:] = 2
    return y * counts


def every_second(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, 0::2] = x[:, 1::2] * 2
    y[:, 1::2] = x[:, 0::2]
    return y


def behind_a_dropout_that_is_off(x: Tensor) -> Tensor:
    y = x + 1
    nn.functional.dropout(y, 0.5, training=False).mul_(2)
    nn.functional.alpha_dropout(y, 0.5, training=False).add_(1)
    return y


def an_item_of_several_results(x: Tensor) -> Tensor:
    values, places = x.topk(2, dim=1)
    values.mul_(2)
    values[:, 0] += 1
    return values + places


CASES = [
    plain, read_before_and_after, through_a_slice, through_views_of_views,
    an_old_view_sees_a_later_write, a_copy_does_not, chunks, unbound, the_diagonal, an_input,
    masked, keeps_its_dtype, an_item_of_several_results, every_second,
    behind_a_dropout_that_is_off,
]  # fmt: skip


@pytest.mark.parametrize("body", CASES, ids=lambda body: body.__name__)
def test_in_place_calls_are_gone_and_the_result_is_the_models(body: Body) -> None:
    generator = torch.Generator().manual_seed(0)
    program = gw.trace(Wrap(body), (torch.randn(4, 6, generator=generator),), {"x": {0: "n"}})
    assert not any(writes(node) for node in program.graph.nodes)
    assert not any("scatter" in op_name(n) for n in program.graph.nodes if body is not the_diagonal)
    for size in (4, 1, 5):
        x = torch.randn(size, 6, generator=generator)
        given = x.clone()
        torch.testing.assert_close(program(given), body(x.clone()), rtol=1e-6, atol=1e-6)
        assert torch.equal(given, x)  # a program does not write to its inputs


def test_an_update_of_a_buffer_is_seen_in_the_call_and_reported_as_dropped() -> None:
    class Counts(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x * self.count

    model = Counts()
    with pytest.warns(TraceWarning, match="the model writes 'count'"):
        program = gw.trace(model, (torch.ones(3),), check=False)
    torch.testing.assert_close(program(torch.ones(3)), torch.ones(3))
    torch.testing.assert_close(program(torch.ones(3)), torch.ones(3))
    assert program.facts["trace"]["updates_dropped"] == ["count"]
    assert model.count.item() == 0
