from __future__ import annotations

import torch
from models import branch_nets
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.reparameterize import Mobileone

CHAIN = (
    "conv",
    [("reparameterize.expand", {"form": "mobileone"}), ("reparameterize.mobileone", {})],
)


def run(model: nn.Module, *shape: int) -> tuple[gw.Program, gw.Result]:
    x = torch.randn(*shape, dtype=torch.float64)
    dims = {"input": {0: "batch", 2: "h", 3: "w"}}
    program = gw.trace(branch_nets.with_statistics(model), (x,), dims)
    result = Mobileone().execute(program, Context())
    assert measure(program, result.program).relative < 1e-10  # float64: rounding alone
    return program, result


def calls(program: gw.Program) -> list[str]:
    names = [op_name(n) for n in program.graph.nodes if n.op == "call_function"]
    return [name for name in names if name != "sym_size"]


def test_depthwise_and_pointwise_blocks() -> None:
    """Five depthwise branches become a depthwise convolution, four pointwise ones a 1x1."""
    program, result = run(nn.Sequential(branch_nets.mobileone(6, 6)), 2, 6, 7, 8)
    assert calls(program).count("batch_norm") == 9
    assert calls(result.program) == ["conv2d", "relu", "conv2d", "relu"]
    shapes = {tuple(v.shape) for n, v in result.program.state.items() if n.endswith("weight")}
    assert shapes == {(6, 1, 3, 3), (6, 6, 1, 1)}
