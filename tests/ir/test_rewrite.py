from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.edit import Editor
from graphwright.ir.rewrite import (
    Match,
    Rewrite,
    apply_rewrites,
    const,
    find_matches,
    one_of,
    op,
    value,
)

aten = torch.ops.aten


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.fc(x)
        gate = torch.sigmoid(h)
        return gate * h, torch.relu(gate)


class OnlySwish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


SWISH = op(
    aten.mul.Tensor, value("x"), op(aten.sigmoid.default, value("x"), name="s"), commutative=True
)


class ToSilu(Rewrite):
    pattern = SWISH

    def replacement(self, match: Match, editor: Editor) -> torch.fx.Node:
        return editor.call(aten.silu.default, match.node("x"), before=match.root)


def test_a_match_is_replaced_and_its_calls_are_gone() -> None:
    program = gw.trace(OnlySwish(), (torch.randn(3, 4),))
    editor = Editor(program, by="test.silu")
    applied = apply_rewrites(editor, [ToSilu()])
    after = editor.finish()
    assert applied.counts == {"ToSilu": 1}
    assert [n.target for n in after.graph.nodes if n.op == "call_function"] == [aten.silu.default]
    assert measure(program, after).relative < 1e-6  # one float32 rounding per element


def test_an_inner_call_with_another_reader_stops_the_match() -> None:
    program = gw.trace(Swish(), (torch.randn(3, 4),))
    assert list(find_matches(program.graph, SWISH)) == []
    shared = op(
        aten.mul.Tensor,
        value("x"),
        op(aten.sigmoid.default, value("x"), shared=True),
        commutative=True,
    )
    found = list(find_matches(program.graph, shared))
    assert [m.root.target for m in found] == [aten.mul.Tensor]
    assert found[0].node("x").target is aten.linear.default


def test_a_name_captured_twice_must_be_one_node() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(y)

    program = gw.trace(Two(), (torch.randn(2, 2), torch.randn(2, 2)))
    assert list(find_matches(program.graph, SWISH)) == []


def test_constants_alternatives_and_defaults() -> None:
    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return torch.nn.functional.softmax(scaled, dim=-1)

    program = gw.trace(Norm(), (torch.randn(2, 8),))
    mean = op(aten.mean.dim, op(aten.pow.Tensor_Scalar, value("x"), 2), [-1], True)
    pattern = op(
        aten.mul.Tensor,
        value("x"),
        op(aten.rsqrt.default, op(aten.add.Tensor, mean, const("eps"))),
    )
    (match,) = find_matches(program.graph, pattern)
    assert match["eps"] == 1e-6
    either = one_of(op(aten.relu.default, value("y")), op(aten.softmax.int, value("y"), -1))
    assert len(list(find_matches(program.graph, either))) == 1
    # 2 is not 2.0 and -1 is not -2: plain values match by type and value.
    assert not list(find_matches(program.graph, op(aten.softmax.int, value("y"), -2)))


def test_a_condition_turns_a_match_down_with_its_reason() -> None:
    class Never(ToSilu):
        def condition(self, match: Match, editor: Editor) -> str | None:
            return "not today"

    program = gw.trace(OnlySwish(), (torch.randn(3, 4),))
    editor = Editor(program, by="test.never")
    applied = apply_rewrites(editor, [Never()])
    assert applied.total == 0
    assert [(r.rewrite, r.reason) for r in applied.rejections] == [("Never", "not today")]
    assert editor.finish() is program


def test_rewrites_that_undo_each_other_are_reported() -> None:
    class Back(Rewrite):
        pattern = op(aten.silu.default, value("x"))

        def replacement(self, match: Match, editor: Editor) -> torch.fx.Node:
            x = match.node("x")
            gate = editor.call(aten.sigmoid.default, x, before=match.root)
            return editor.call(aten.mul.Tensor, x, gate, before=match.root)

    editor = Editor(gw.trace(OnlySwish(), (torch.randn(3, 4),)), by="test.loop")
    with pytest.raises(RuntimeError, match=r"\['ToSilu', 'Back'\] undo each other"):
        apply_rewrites(editor, [ToSilu(), Back()])
