"""A program in float64: nothing in it brings float32 back, and values go when they were read."""

from __future__ import annotations

import pytest
import torch
from models.rounding_nets import folded
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.check.exact import _SideBySide
from graphwright.ir.check.precision import Walk, own_precision, roundoff, run_in_double
from graphwright.ir.check.promise import EXACT, Promise
from graphwright.ir.check.verify import FIRST_LOOK, check_contract, measure
from graphwright.ir.edit import Editor

aten = torch.ops.aten
PROMISE = Promise("cleanup.fold_batch_norm", "exact")


class Mixed(nn.Module):
    """Casts, factories and sizes: nothing in it may bring float32 back."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], dtype=torch.float32)
        y = x.float() * torch.sin(steps * 0.1) + torch.full((x.shape[1],), 0.1)
        return (y.to(torch.float32) @ y.t().half().float()).softmax(-1)


def test_no_cast_in_a_program_shortens_its_float64_run() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    program = gw.trace(Mixed(), (x,), dynamic={"x": {0: "n"}})
    (got,) = run_in_double(program, (x,))
    steps = torch.arange(5, dtype=torch.float64)
    y = x.double() * torch.sin(steps * 0.1) + 0.1
    want = (y @ y.t()).softmax(-1)
    assert got.dtype == torch.float64
    assert float((got - want).abs().max()) < 1e-7  # 0.1 as float32, where a factory rounds it
    assert program.run_flat((x,))[0].dtype == torch.float32


def only_float32(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise TypeError("no float64 kernel")
    return x * 1.1


def test_an_op_without_a_float64_form_runs_in_its_own_precision() -> None:
    before, after = folded("mlp", 2)
    made = []
    for program in (before, after):
        editor = Editor(program, by="test.op")
        tanh = next(n for n in editor.graph.nodes if n.target is aten.tanh.default)
        call = editor.call(only_float32, tanh, before=tanh.next)
        tanh.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
        made.append(editor.finish())
    (got,) = run_in_double(made[0], made[0].examples)
    assert got.dtype == torch.float64
    assert measure(*made).relative > FIRST_LOOK  # so the look in float64 is taken
    check_contract(made[0], made[1], PROMISE)


def test_a_value_can_be_replaced_for_those_that_read_it() -> None:
    program, _ = folded("mlp", 2)
    first = next(n.name for n in program.graph.nodes if n.target is aten.tanh.default)
    (zeroed,) = run_in_double(program, program.examples, {first: lambda value: value * 0})
    (same,) = run_in_double(program, program.examples)
    assert zeroed[0] == pytest.approx(zeroed[1])
    assert same[0] != pytest.approx(same[1])


def test_values_are_freed_after_their_last_reader() -> None:
    program, _ = folded("plain_relu", 2)
    walk = Walk(program, program.examples, wide=True)
    most = 0
    for node in program.graph.nodes:
        if node.op != "output":
            walk.step(node)
            walk.release(node)
            most = max(most, len(walk.values))
    assert most <= 2
    both = _SideBySide(program, folded("plain_relu", 2)[1], program.examples, EXACT)
    assert both.run() == []
    assert [len(walk.values) for walk in (both.old, both.own, both.new)] == [1, 1, 1]  # the output


def test_the_unit_of_rounding_is_that_of_the_coarsest_type() -> None:
    """The distance of the next number from 1, by the definition of each type."""
    program, _ = folded("mlp", 2)
    assert roundoff(program) == torch.finfo(torch.float32).eps
    for dtype in (torch.float16, torch.bfloat16):
        half = gw.passes.cast.Dtype(to=str(dtype).removeprefix("torch."))(program)
        assert roundoff(half) == torch.finfo(dtype).eps


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_without_any_float_the_unit_is_that_of_float32() -> None:
    program = gw.trace(Whole(), (torch.arange(3),))
    assert roundoff(program) == torch.finfo(torch.float32).eps


def test_values_are_put_into_the_types_of_others_nest_by_nest() -> None:
    wide, narrow = torch.ones(2, dtype=torch.float64), torch.ones(2)
    assert own_precision(wide, narrow).dtype == torch.float32
    first, (second, third) = own_precision((wide, [wide, 3]), (narrow, [narrow.half(), 4]))
    assert (first.dtype, second.dtype, third) == (torch.float32, torch.float16, 3)
    assert own_precision(wide, None) is wide
    assert own_precision(3, narrow) == 3


def test_a_step_gives_the_value_that_it_keeps() -> None:
    program, _ = folded("mlp", 2)
    walk = Walk(program, program.examples, wide=True)
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert walk.step(node) is walk.values[node]


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.randn_like(x), torch.randn_like(x)])


def test_every_call_that_draws_has_draws_of_its_own_in_every_walk() -> None:
    with pytest.warns(UserWarning, match="other results on every call"):
        program = gw.trace(Drawing(), (torch.randn(4),))
    (one,), (two,) = (run_in_double(program, program.examples) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
