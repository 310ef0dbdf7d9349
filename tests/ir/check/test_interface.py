"""What a pass may not do on the side: to the interface, the examples, the tensors it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.interface import check_interface
from graphwright.ir.context import Context
from graphwright.ir.errors import ContractError
from graphwright.ir.graph.writes import Writes
from graphwright.ir.signature import DimRange


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.a(x) + self.b(y), "difference": self.a(x) - self.b(y)}


def traced() -> gw.Program:
    torch.manual_seed(0)
    dims = {"x": {0: "n"}, "y": {0: "n"}}
    return gw.trace(Pair(), {"x": torch.randn(3, 6), "y": torch.randn(3, 6)}, dynamic=dims)


def signed(program: gw.Program, **changes: object) -> gw.Program:
    return program.replace(signature=replace(program.signature, **changes))


def renamed(program: gw.Program) -> gw.Program:
    first, second = program.signature.outputs
    return signed(program, outputs=(replace(first, name="total"), second))


def reordered(program: gw.Program) -> gw.Program:
    return signed(program, inputs=program.signature.inputs[::-1])


def narrowed(program: gw.Program) -> gw.Program:
    return signed(program, dims={"n": DimRange(2, 8)})


def other_order_in_the_graph(program: gw.Program) -> gw.Program:
    from graphwright.ir.graph.nodes import copy_graph

    graph = copy_graph(program.graph)
    first, second = graph.find_nodes(op="placeholder")
    first.prepend(second)
    return program.replace(graph=graph)


def other_examples(program: gw.Program) -> gw.Program:
    return program.replace(examples=(torch.zeros(3, 6), program.examples[1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, "changed the outputs of the program"),
        (reordered, "changed the inputs of the program"),
        (narrowed, "changed the dims of the program"),
        (other_order_in_the_graph, r"a graph with the inputs \['y', 'x'\]"),
        (other_examples, "changed the example of the input 'x'"),
    ],
)
def test_a_changed_interface_is_refused(
    change: Callable[[gw.Program], gw.Program], said: str
) -> None:
    program = traced()
    with pytest.raises(ContractError, match=said):
        check_interface(program, change(program), "test.changes")
    check_interface(program, program.replace(examples=tuple(t + 0 for t in program.examples)), "t")


class Writer(gw.Pass):
    """Changes tensors of the program that it was given."""

    contract = "lossy"

    def __init__(self, write: Callable[[gw.Program], object]) -> None:
        super().__init__()
        self.write = write

    def run(self, program: gw.Program, context: Context) -> gw.Result:
        with torch.no_grad():
            self.write(program)
        return gw.Result(program)


def past_torch(program: gw.Program) -> None:
    """Torch does not count this write."""
    array: np.ndarray = program.state["a.weight"].detach().numpy()
    array[2, 3] += 1e-6


def swapped(program: gw.Program) -> None:
    array: np.ndarray = program.state["a.weight"].detach().numpy()
    array[0, [0, 3]] = array[0, [3, 0]]


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda p: p.state["a.weight"].mul_(0.5), "a.weight"),
        (lambda p: p.state["b.bias"].data.mul_(0.5), "b.bias"),
        (lambda p: p.examples[1].add_(1.0), "example of y"),
        (past_torch, "a.weight"),
        (swapped, "a.weight"),
    ],
)
def test_a_write_into_what_a_pass_was_given_is_found(
    write: Callable[[gw.Program], object], named: str
) -> None:
    with pytest.raises(ContractError, match=f"wrote into {named} of the program"):
        Writer(write).execute(traced(), Context())


def test_reading_is_no_write() -> None:
    program = traced()
    assert Writer(lambda p: p(*p.examples)).execute(program, Context()).program is not None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4000),
        torch.randn(70, 90).t(),
        torch.randn(33).to(torch.bfloat16),
        torch.randint(0, 2, (9,), dtype=torch.bool),
        torch.randn(5000)[1:],
        torch.randn(3, dtype=torch.complex64),
    ],
)
def test_every_kind_of_tensor_is_watched(tensor: torch.Tensor) -> None:
    program = traced()
    watched = program.replace(state={**program.state, "more": tensor})
    writes = Writes([watched, program])
    assert writes.found() == []
    at = (0,) * tensor.dim()
    tensor.data[at] = ~tensor[at] if tensor.dtype == torch.bool else tensor[at] * 1.01 + 0.1
    assert writes.found() == ["more"]
