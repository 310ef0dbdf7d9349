"""The part of a quantized program that integer kernels compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.layers.on_codes import computed_on_codes

aten, ops = torch.ops.aten, torch.ops.graphwright


class Net(nn.Module):
    """Two convolutions whose sum is pooled, a linear layer behind it, and one left in float."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.mid, self.last = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x) + self.b(x))
        x = F.max_pool2d(x, 2).flatten(1)
        return F.softplus(self.last(F.gelu(self.mid(x))))


def test_what_runs_on_codes_is_found() -> None:
    torch.manual_seed(0)
    program = gw.trace(Net().eval(), {"x": torch.randn(3, 3, 4, 4)}, dynamic={"x": {0: "n"}})
    assert computed_on_codes(program.graph) == set()
    data = [{"x": torch.randn(4, 3, 4, 4)} for _ in range(2)]
    static = gw.passes.quantize.Int8(activations="static", targets=["*", "!last"])
    program = static(program, calibration=data)
    on_codes = computed_on_codes(program.graph)
    assert {n.target for n in on_codes} >= {
        aten.conv2d.default, aten.add.Tensor, aten.relu.default, aten.max_pool2d.default,
        aten.linear.default, ops.dequantize.default, ops.fake_quantize.default,
    }  # fmt: skip
    left = {n.name for n in program.graph.nodes} - {n.name for n in on_codes}
    assert {"gelu", "softplus"} <= left
    last = [n for n in program.graph.nodes if n.target is aten.linear.default][-1]
    assert last.name in left
