"""Operators without a translation are taken apart at their place, or the right one is blamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.function import Function
from torch import Tensor, fx, nn

import graphwright as gw
from graphwright.backends.onnxruntime import aten as table
from graphwright.backends.onnxruntime.decompose import taken_apart
from graphwright.ir.errors import LoweringError
from graphwright.passes.quantize.int8 import Int8

aten = torch.ops.aten


def traced(function: Callable[[Tensor], Any], *shape: int, free: int = 0) -> gw.Program:
    return gw.trace(Function(function), {"x": torch.randn(shape)}, dynamic={"x": {free: "n"}})


def node_of(program: gw.Program, target: Any) -> fx.Node:
    (node,) = program.graph.find_nodes(op="call_function", target=target)
    return node  # type: ignore[no-any-return]


def test_a_call_becomes_calls_that_have_translations() -> None:
    program = traced(lambda x: torch.logaddexp(x, x * 2), 4, 3)
    known = table.load().keys()
    found = taken_apart(node_of(program, aten.logaddexp.default), known)
    assert found is not None
    graph, given = found
    assert [node.name for node in given] == ["x", "mul"]
    assert {n.target for n in graph.nodes if n.op == "call_function"} <= known
    compiled = gw.lower(program, "onnxruntime")
    assert compiled.notes["translator"] == "direct"
    x = torch.randn(9, 3)
    torch.testing.assert_close(compiled(x), program(x), rtol=1e-6, atol=1e-6)


def test_the_rest_of_a_quantized_model_keeps_its_kernels() -> None:
    layer = nn.Sequential(nn.Linear(32, 64), Function(lambda x: torch.logaddexp(x, x * 2)))
    program = gw.trace(layer, {"input": torch.randn(4, 32)}, dynamic={"input": {0: "n"}})
    compiled = gw.lower(Int8(activations="dynamic")(program), "onnxruntime")
    assert compiled.notes["translator"] == "direct"
    assert any("Integer" in kernel or "Quantize" in kernel for kernel in compiled.notes["kernels"])


def test_what_would_fix_a_size_is_not_used_and_fixes_none() -> None:
    program = traced(lambda x: nn.functional.adaptive_max_pool2d(x, 2), 2, 3, 8, 8, free=2)
    node = node_of(program, aten.adaptive_max_pool2d.default)
    known = table.load().keys() - {node.target}
    assert taken_apart(node, known) is None
    size = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape[2]
    assert not size.node.expr.is_number


def test_a_write_into_a_view_is_not_taken_for_a_new_value() -> None:
    program = traced(lambda x: torch.vander(x[0], 3) + x[0, 0], 4, 3)
    assert taken_apart(node_of(program, aten.vander.default), table.load().keys()) is None


@pytest.mark.parametrize(
    ("function", "culprit"),
    [
        (lambda x: torch.histc(x, 4, -1.0, 1.0) + torch.lgamma(x.abs()[0]), "lgamma"),
        (lambda x: nn.functional.celu(x) + torch.i0(x).nanmedian(1, keepdim=True)[0], "i0"),
    ],
)
def test_the_operator_that_has_no_form_is_blamed(
    function: Callable[[Tensor], Any], culprit: str
) -> None:
    program = traced(function, 3, 4)
    with pytest.raises(LoweringError) as caught:
        gw.lower(program, "onnxruntime")
    assert caught.value.where == f"node {culprit!r}"
    assert culprit in caught.value.message
    assert caught.value.fix


def test_a_result_of_several_is_blamed_on_its_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = table.load()

    def shifted(e: Any, node: fx.Node, a: fx.Node, dim: int, *_: Any) -> Any:
        value = e.op("ReduceMax", e.values[a], e.ints(dim), keepdims=0)
        return [value, e.op("ArgMin", e.values[a], axis=dim, keepdims=0)]

    monkeypatch.setitem(entry, aten.max.dim, shifted)
    program = traced(lambda x: x.max(1)[1], 4, 9)
    with pytest.raises(LoweringError, match=r"max_1 \(aten\.max\.dim\)") as caught:
        gw.lower(program, "onnxruntime")
    assert caught.value.fix
