from __future__ import annotations

import torch
from models import branch_nets
from torch import nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.graph.nodes import op_name
from graphwright.passes.reparameterize import Repvgg

CHAIN = ("conv", [("reparameterize.expand", {"form": "repvgg"}), ("reparameterize.repvgg", {})])


def run(model: nn.Module, *shape: int) -> tuple[gw.Program, gw.Result]:
    x = torch.randn(*shape, dtype=torch.float64)
    dims = {"input": {0: "batch", 2: "h", 3: "w"}}
    program = gw.trace(branch_nets.with_statistics(model), (x,), dims)
    result = Repvgg().execute(program, Context())
    assert measure(program, result.program).relative < 1e-10  # float64: rounding alone
    return program, result


def calls(program: gw.Program) -> list[str]:
    names = [op_name(n) for n in program.graph.nodes if n.op == "call_function"]
    return [name for name in names if name != "sym_size"]


def test_blocks_become_convolutions() -> None:
    """A strided block of two branches and a grouped one of three: a convolution and a ReLU each."""
    net = nn.Sequential(branch_nets.repvgg(3, 8, 2), branch_nets.repvgg(8, 8, groups=2))
    program, result = run(net, 2, 3, 9, 10)
    assert calls(program).count("batch_norm") == 5
    assert calls(result.program) == ["conv2d", "relu", "conv2d", "relu"]
    assert [action.layer for action in result.actions] == ["0.branches", "1.branches"]
    assert set(result.program.state) == {
        f"{n}.branches.{name}" for n in (0, 1) for name in ("weight", "bias")
    }
    again = Repvgg().execute(result.program, Context())
    assert again.program.graph is result.program.graph
    assert again.actions[0].reason == (
        "no sum of a convolution, a 1x1 convolution and an identity of one input"
    )


def test_copies_are_of_another_method() -> None:
    _, result = run(nn.Sequential(branch_nets.mobileone(4, 4)), 2, 4, 6, 6)
    assert "add" in calls(result.program)


def test_norms_in_training_mode_stay() -> None:
    model = nn.Sequential(branch_nets.repvgg(4, 4))
    x = torch.randn(2, 4, 6, 6)
    program = gw.trace(model.eval(), (x,)).train()
    result = Repvgg().execute(program, Context())
    assert "is in training mode; its statistics still move" in result.actions[0].reason
    assert calls(result.program) == calls(program)


def test_int8_pruning_and_both_backends() -> None:
    """From one chain: folded, pruned, quantized, and run by ONNX Runtime and the fused module."""
    net = nn.Sequential(branch_nets.repvgg(3, 8), branch_nets.repvgg(8, 8))
    x = torch.randn(8, 3, 8, 8)
    program = gw.trace(branch_nets.with_statistics(net).float(), (x,), {"input": {0: "batch"}})
    folded = Repvgg()(program)
    pruned = gw.passes.prune.Magnitude(sparsity=0.3)(folded)
    small = gw.passes.quantize.Int8(activations="static")(pruned, calibration=[(x,)])
    for backend in ("onnxruntime", "triton"):
        compiled = gw.lower(small, backend)
        # 8-bit steps of the last quantizer may fall the other way
        assert gw.compare(small(x), compiled(x)).relative < 0.02
