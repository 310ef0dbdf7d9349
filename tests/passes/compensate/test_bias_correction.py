from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program

CHAIN = ("conv", [("quantize.rtn", {"block": 16}), ("compensate.bias_correction", {})])


class Net(nn.Module):
    """Convolution and linear layers, one of them without a bias, on inputs that are not centred."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(h, 2).flatten(1))


def original() -> Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), {"x": torch.rand(4, 3, 8, 8)}, dynamic={"x": {0: "batch"}})


def batches() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.rand(8, 3, 8, 8) + 0.5,) for _ in range(4)]


def output_means(program: Program) -> dict[str, Tensor]:
    """Mean output of every channel of every layer, by a plain run of the graph."""
    by_node = {layer.node: layer.name for layer in layers(program)}
    totals: dict[str, Tensor] = {}

    class Tap(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n in by_node:
                axis = 1 if value.dim() == 4 else value.dim() - 1
                mean = value.double().movedim(axis, 0).flatten(1).mean(1)
                totals[by_node[n]] = totals.get(by_node[n], 0) + mean / len(batches())
            return value

    with torch.no_grad():
        for (x,) in batches():
            Tap(program.module).run(x)
    return totals


def rough(before: Program) -> Program:
    return gw.passes.quantize.Rtn(bits=3, block=8)(before)


def test_the_means_of_all_channels_are_the_original_ones_again() -> None:
    before = original()
    compressed = rough(before)
    fixed = gw.passes.compensate.BiasCorrection()(compressed, calibration=batches(), teacher=before)
    wanted, shifted, found = (output_means(p) for p in (before, compressed, fixed))
    for name, mean in wanted.items():
        assert float((shifted[name] - mean).norm() / mean.norm()) > 1e-3
        torch.testing.assert_close(found[name], mean, rtol=1e-4, atol=1e-5)


def test_the_outputs_come_closer() -> None:
    before = original()
    compressed = rough(before)
    fixed = gw.passes.compensate.BiasCorrection()(compressed, calibration=batches(), teacher=before)
    torch.manual_seed(9)
    x = torch.rand(32, 3, 8, 8) + 0.5  # held out
    with torch.no_grad():
        errors = [float((p(x) - before(x)).norm()) for p in (compressed, fixed)]
    assert errors[1] < 0.7 * errors[0]


def test_integer_biases_keep_their_codes() -> None:
    before = original()
    static = gw.passes.quantize.Int8(activations="static")(before, calibration=batches())
    fixed = gw.passes.compensate.BiasCorrection(targets=["conv1"])(
        static, calibration=batches(), teacher=before
    )
    conv = next(layer for layer in layers(fixed) if layer.name == "conv1").node
    codes = fixed.state[str(conv.args[2].args[0].target)]
    assert codes.dtype == torch.int32
    wanted, found = output_means(before)["conv1"], output_means(fixed)["conv1"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    compiled = gw.lower(fixed, "onnxruntime")
    assert "QLinearConv" in str(compiled.notes["kernels"])


def test_a_layer_that_computes_the_same_keeps_its_bias_to_rounding() -> None:
    before = original()
    fixed = gw.passes.compensate.BiasCorrection()(before, calibration=batches(), teacher=before)
    x = batches()[0][0]
    torch.testing.assert_close(fixed(x), before(x), rtol=1e-5, atol=1e-5)


def test_layers_without_a_counterpart_are_reported() -> None:
    before = original()
    smaller = gw.passes.prune.Zig(sparsity=0.3, targets=["conv1"])(before)
    context = Context(calibration=batches(), teacher=before)
    result = gw.passes.compensate.BiasCorrection().run(smaller, context)
    reasons = {a.layer: a.reason for a in result.actions if a.what == "left alone"}
    assert reasons == {"conv1": "its channels are no longer the original's"}
    with pytest.raises(ArgumentError, match="needs calibration"):
        gw.passes.compensate.BiasCorrection()(before)
