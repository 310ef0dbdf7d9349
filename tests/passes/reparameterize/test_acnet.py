from __future__ import annotations

import torch
from models import branch_nets
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.reparameterize import Acnet

CHAIN = ("conv", [("reparameterize.expand", {"form": "acnet"}), ("reparameterize.acnet", {})])


def run(model: nn.Module, *shape: int) -> tuple[gw.Program, gw.Result]:
    x = torch.randn(*shape, dtype=torch.float64)
    dims = {"input": {0: "batch", 2: "h", 3: "w"}}
    program = gw.trace(branch_nets.with_statistics(model), (x,), dims)
    result = Acnet().execute(program, Context())
    assert measure(program, result.program).relative < 1e-10  # float64: rounding alone
    return program, result


def calls(program: gw.Program) -> list[str]:
    names = [op_name(n) for n in program.graph.nodes if n.op == "call_function"]
    return [name for name in names if name != "sym_size"]


def test_strips_go_into_the_square() -> None:
    program, result = run(nn.Sequential(branch_nets.acnet(3, 6)), 2, 3, 7, 8)
    assert calls(program).count("conv2d") == 3
    assert calls(result.program) == ["conv2d", "relu"]
    assert result.actions[0].what == "one layer of 3 branches: kernel, strip, strip"


def test_sums_without_strips_are_of_another_method() -> None:
    _, result = run(nn.Sequential(branch_nets.repvgg(3, 6)), 2, 3, 7, 8)
    assert calls(result.program).count("add") == 1
