from __future__ import annotations

import torch
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.fuse import Qkv

CHAIN = ("text", [("fuse.qkv", {})])


class Attention(nn.Module):
    """Shared heads, rotated queries and keys, a bias in one projection."""

    def __init__(self, crossed: bool = False) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 8, bias=False)
        self.v, self.out, self.crossed = nn.Linear(16, 8, bias=False), nn.Linear(16, 16), crossed

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        source = memory if self.crossed else x

        def heads(y: torch.Tensor, n: int) -> torch.Tensor:
            return y.unflatten(-1, (n, 4)).transpose(1, 2)

        def rotated(y: torch.Tensor) -> torch.Tensor:
            a, b = y[..., :2], y[..., 2:]
            return y * 0.6 + torch.cat([-b, a], -1) * 0.8

        q = rotated(heads(self.q(x), 4))
        k, v = (y.repeat_interleave(2, 1) for y in
                (rotated(heads(self.k(source), 2)), heads(self.v(source), 2)))  # fmt: skip
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(a.transpose(1, 2).flatten(2)) + memory.mean()


def program(model: nn.Module) -> gw.Program:
    x, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 5, 16).double()
    dims = {"x": {0: "b", 1: "n"}, "memory": {0: "b", 1: "n"}}
    return gw.trace(model.double().eval(), (x, memory), dims)


def linears(program: gw.Program) -> int:
    return sum(op_name(node) == "linear" for node in program.graph.nodes)


def test_three_projections_are_one() -> None:
    given = program(Attention())
    result = Qkv().execute(given, Context())
    assert measure(given, result.program).relative < 1e-12  # float64: rounding alone
    assert (linears(given), linears(result.program)) == (4, 2)
    assert result.program.state["qkv.weight"].shape == (32, 16)
    assert result.program.state["qkv.bias"][16:].abs().max() == 0
    assert result.actions == (gw.Action("qkv", "one layer of q, k, v"),)


def test_keys_and_values_of_another_sequence() -> None:
    given = program(Attention(crossed=True))
    result = Qkv().execute(given, Context())
    assert measure(given, result.program).relative < 1e-12
    assert result.actions == (gw.Action("qkv", "one layer of k, v"),)


def test_targets_choose_layers() -> None:
    result = Qkv(targets=["*", "!q"]).execute(program(Attention()), Context())
    assert result.actions == (gw.Action("qkv", "one layer of k, v"),)


def test_a_shared_weight_stays() -> None:
    model = Attention()
    model.v.weight = model.k.weight
    result = Qkv().execute(program(model), Context())
    assert result.actions == (gw.Action.left("q, k, v", "its weight is used by another layer too"),)


def test_quantized_and_lowered() -> None:
    model = Attention().float()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    joined = Qkv()(gw.trace(model.eval(), (x, memory), {"x": {1: "n"}, "memory": {1: "n"}}))
    small = gw.passes.quantize.Rtn(block=16)(joined)
    # ONNX Runtime rounds the activations of products with 4-bit weights to 8 bits
    for backend, most in (("onnxruntime", 0.02), ("triton", 1e-4)):
        compiled = gw.lower(small, backend)
        assert gw.compare(small(x, memory), compiled(x, memory)).relative < most
