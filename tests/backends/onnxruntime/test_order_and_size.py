"""Equal values, sizes of one, and arithmetic on sizes, where a model may part from its program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import sympy
import torch
from models.function import Function
from torch import Tensor, nn
from torch.utils._sympy import functions as sym

import graphwright as gw
from graphwright.backends.onnxruntime.emitter import Emitter
from graphwright.backends.onnxruntime.numbers import NoFormError, number, truth
from graphwright.backends.onnxruntime.ties import with_settled_ties
from graphwright.ir.errors import ArgumentError
from graphwright.ir.graph.nodes import op_name


def tied(rows: int) -> Tensor:
    return torch.randint(-2, 3, (rows, 40), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.sort(x, -1),
        lambda x: torch.sort(x, -1, descending=True),
        lambda x: torch.sort(x, dim=0, stable=True),
        lambda x: torch.sort(x, dim=-1, stable=False),
        lambda x: torch.argsort(x, dim=-1, stable=False),
        lambda x: torch.topk(x, 5, -1),
        lambda x: torch.topk(x, 5, -1, largest=False),
        lambda x: torch.kthvalue(x, 7, -1),
        lambda x: torch.kthvalue(x, 7, -1, keepdim=True),
        lambda x: (torch.argsort(x, -1), torch.argsort(x, -1, descending=True)),
    ],
)
def test_equal_values_come_in_their_order(function: Callable[[Tensor], Any]) -> None:
    program = gw.trace(Function(function), {"x": tied(3)}, dynamic={"x": {0: "n"}})
    settled = with_settled_ties(program)
    x = tied(5)
    for found, want, own in zip(
        gw.lower(program, "onnxruntime")(x), settled(x), program(x), strict=True
    ):
        assert torch.equal(found, want)
        assert found.shape == own.shape
        if found.is_floating_point():
            assert torch.equal(found, own)


def test_an_order_that_decides_the_outputs_is_said() -> None:
    weights = torch.randn(40)

    def grouped(x: Tensor) -> Tensor:
        places = torch.sort(
            x, dim=-1, stable=False
        ).indices  # more than 16 values: not in their order
        return weights[places] * torch.arange(40.0)

    compiled = gw.lower(gw.trace(Function(grouped), {"x": tied(3)}), "onnxruntime")
    (warning,) = compiled.notes["warnings"]
    assert warning.startswith("'sort': torch leaves the order of equal values open")
    stable = weights[torch.sort(tied(3), dim=-1, stable=True).indices] * torch.arange(40.0)
    torch.testing.assert_close(compiled(tied(3)), stable)
    values = gw.lower(
        gw.trace(Function(lambda x: torch.sort(x, -1).values), {"x": tied(3)}), "onnxruntime"
    )
    assert not values.notes["warnings"]


def test_settled_indices_point_at_the_values() -> None:
    program = gw.trace(Function(lambda x: torch.topk(x, 9, -1)), {"x": tied(3)})
    settled = with_settled_ties(program)
    assert "topk" not in [op_name(node) for node in settled.graph.nodes]
    values, places = settled(tied(3))
    assert torch.equal(tied(3).gather(-1, places), values)
    assert bool((places[:, 1:] > places[:, :-1])[values[:, 1:] == values[:, :-1]].all())


def test_a_program_without_sorts_is_left_alone() -> None:
    program = gw.trace(Function(torch.relu), {"x": tied(3)})
    assert with_settled_ties(program) is program


def test_a_size_of_one_that_the_model_cannot_take_is_refused_and_named() -> None:
    net = Function(lambda x: x[:2].repeat_interleave(x.shape[0], 0))
    program = gw.trace(net, {"x": torch.randn(6, 4)}, dynamic={"x": {0: "n"}})
    torch.testing.assert_close(program(torch.ones(1, 4)), torch.ones(1, 4))
    compiled = gw.lower(program, "onnxruntime")
    assert compiled.signature.dims["n"].min == 2
    assert compiled.notes["warnings"][0].startswith("dimension 'n' is 2 or more: ")
    with pytest.raises(ArgumentError, match="2 to any size"):
        compiled(torch.ones(1, 4))
    x = torch.randn(5, 4)
    assert torch.equal(compiled(x), program(x))


def test_a_size_of_one_that_the_model_takes_stays() -> None:
    program = gw.trace(Function(torch.relu), {"x": torch.randn(6, 4)}, dynamic={"x": {0: "n"}})
    compiled = gw.lower(program, "onnxruntime")
    assert compiled.signature.dims["n"].min == 1
    assert "narrowed" not in compiled.notes


def _label(value: object) -> str:
    """A name of a case that is the same in every process; a function's text holds its address."""
    return str(value) if isinstance(value, sympy.Basic) else "python"


T = sympy.Symbol("t", integer=True, positive=True)
HALF = sym.FloatTrueDiv(sym.ToFloat(T), sympy.Float(2.0))


@pytest.mark.parametrize(
    ("expression", "python"),
    [
        (sym.FloorDiv(T, 3) + 2 * T, lambda t: t // 3 + 2 * t),
        (sym.CeilDiv(T, 4), lambda t: -(-t // 4)),
        (sym.PythonMod(-T, 8), lambda t: -t % 8),
        (sym.TruncToInt(sympy.Float(0.3) * sym.ToFloat(T)), lambda t: int(0.3 * t)),
        (sym.CeilToInt(sym.IntTrueDiv(T, 7)), lambda t: math.ceil(t / 7)),
        (sym.FloorToInt(sym.IntTrueDiv(T, 7)), lambda t: math.floor(t / 7)),
        (sym.RoundToInt(sym.IntTrueDiv(T, 4)), lambda t: round(t / 4)),
        (sym.RoundDecimal(sym.IntTrueDiv(T, 7), 2), lambda t: round(t / 7, 2)),
        (sym.OpaqueUnaryFn_sqrt(sym.ToFloat(T)), lambda t: math.sqrt(t)),
        (sym.OpaqueUnaryFn_log2(sym.ToFloat(T)), lambda t: math.log2(t)),
        (sym.FloatPow(sym.ToFloat(T), sympy.Float(-0.5)), lambda t: t**-0.5),
        (sym.PowByNatural(T, sympy.Integer(2)), lambda t: t**2),
        (sym.Max(T, 16) - sym.Min(T, 5), lambda t: max(t, 16) - min(t, 5)),
        (sym.LShift(T, 2) + sym.RShift(T, 1), lambda t: (t << 2) + (t >> 1)),
        (sym.BitwiseFn_bitwise_and(T, T - 1), lambda t: t & (t - 1)),
        (sym.Where(sympy.Gt(T, 20), T, 2 * T), lambda t: t if t > 20 else 2 * t),
        (sympy.Abs(T - 20), lambda t: abs(t - 20)),
        (sym.TruncToFloat(HALF) + HALF, lambda t: math.trunc(t / 2) + t / 2),
    ],
    ids=_label,
)
def test_arithmetic_on_sizes_is_pythons(expression: Any, python: Callable[[int], Any]) -> None:
    found = computed(lambda e: number(e, expression), range(1, 70))
    assert found == pytest.approx([python(t) for t in range(1, 70)], rel=1e-15)


@pytest.mark.parametrize(
    ("condition", "python"),
    [
        (sympy.And(sympy.Ge(T, 5), sympy.Ne(T, 9)), lambda t: t >= 5 and t != 9),
        (sympy.Or(sympy.Lt(T, 5), sympy.Eq(T, 9)), lambda t: t < 5 or t == 9),
        (sympy.Not(sympy.Le(T, 7)), lambda t: not t <= 7),
    ],
    ids=_label,
)
def test_conditions_on_sizes_are_pythons(condition: Any, python: Callable[[int], bool]) -> None:
    found = computed(lambda e: truth(e, condition), range(1, 20), ir.DataType.BOOL)
    assert found == [python(t) for t in range(1, 20)]


def test_a_function_without_a_form_is_refused() -> None:
    with pytest.raises(NoFormError, match="gamma"):
        computed(lambda e: number(e, sympy.gamma(T / 3)), [1])


def computed(
    make: Callable[[Emitter], ir.Value], sizes: Any, kind: ir.DataType = ir.DataType.DOUBLE
) -> list[Any]:
    """What an expression of `t` gives when the model runs on inputs of these sizes."""
    e = Emitter({}, {}, 21)
    given = ir.Value(name="x", shape=ir.Shape(["t"]), type=ir.TensorType(ir.DataType.FLOAT))
    e._places[T] = (given, 0)
    out = e.op("Identity", make(e))
    out.type, out.shape = ir.TensorType(kind), ir.Shape([1])
    graph = ir.Graph(
        [given], [out], nodes=e.nodes, initializers=list(e.initializers.values()),
        opset_imports={"": 21}, name="t",
    )  # fmt: skip
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [session.run(None, {"x": torch.zeros(t).numpy()})[0].item() for t in sizes]


@pytest.mark.parametrize("quantize", ["rtn", "int8"])
def test_products_that_round_narrow_nothing(quantize: str) -> None:
    """Size 1 is judged before products round their activations, and on the session's own codes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16)).eval()
    x = torch.randn(4, 64)
    program = gw.trace(net, (x,), {"input": {0: "batch"}})
    if quantize == "rtn":
        program = gw.passes.quantize.Rtn(block=32)(program)
    else:
        program = gw.passes.quantize.Int8(activations="static")(program, calibration=[(x,)])
    compiled = gw.lower(program, "onnxruntime")
    assert compiled.notes["products"].get("accuracy_level", 4) == 4
    assert "narrowed" not in compiled.notes
    assert compiled.signature.dims["batch"].min == 1
