from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright as gw
from graphwright.backends.onnxruntime import translate
from graphwright.backends.onnxruntime.pads import guard_pads
from graphwright.ir.errors import LoweringError

ZERO = nn.ConstantPad2d(1, 0.0)
POOLS: dict[str, list[nn.Module]] = {
    "max": [ZERO, nn.MaxPool2d(3, 2)],
    "max with padding of its own": [nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2, 1)],
    "average without its padding": [ZERO, nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    "average to a whole last window": [ZERO, nn.AvgPool2d(3, 2, 1, ceil_mode=True)],
    "max behind the standard exporter": [ZERO, nn.MaxPool2d(3, 2), nn.AdaptiveMaxPool2d(1)],
}


def net(layers: list[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *layers).eval()


def worst(model: nn.Module, shift: float) -> float:
    """Largest error of the artifact on features that are all of one sign."""
    x = torch.randn(2, 3, 16, 16)
    compiled = gw.lower(gw.trace(model, (x,)), "onnxruntime")
    with torch.no_grad():
        return float((compiled(x * 0.1 + shift) - model(x * 0.1 + shift)).abs().max())


@pytest.mark.parametrize("kind", POOLS)
def test_a_zero_pad_stays_in_front_of_a_pooling(kind: str) -> None:
    model = net(POOLS[kind])
    assert max(worst(model, shift) for shift in (-8.0, 8.0)) < 1e-5


def test_without_the_guard_the_runtime_folds_the_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "guard_pads", lambda model: 0)
    with pytest.raises(LoweringError, match="differs"):
        worst(net(POOLS["max"]), -8.0)


class Moved(nn.Module):
    """Channels last in, then `after`: the runtime moves the transposition through it."""

    def __init__(self, after: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    "after",
    [
        lambda x: F.pad(x, (1, 0, 2, 1)),
        lambda x: F.pad(x, (0, 1, 0, 2), mode="reflect") * 2,
        lambda x: F.pad(x, (0, -1), value=3.0),
        lambda x: F.max_pool2d(F.pad(x, (1, 0, 1, 1)), 3, 2).permute(0, 2, 3, 1),
        lambda x: F.unfold(x, (3, 2), padding=(1, 2)),
    ],
)
def test_transpositions_move_through_pads(after: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model, x = Moved(after), torch.randn(2, 8, 9, 5)
    compiled = gw.lower(gw.trace(model, {"x": x}), "onnxruntime")
    assert torch.allclose(compiled(x - 3), model(x - 3))


def test_a_convolution_takes_its_pad_in() -> None:
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, stride=2)).eval()
    compiled = gw.lower(gw.trace(model, (torch.randn(2, 3, 8, 8),)), "onnxruntime")
    assert "Pad" not in compiled.notes["kernels"]


def test_pads_of_run_time_widths_are_left() -> None:
    pad = onnx.helper.make_node("Pad", ["x", "widths"], ["y"])
    floats, ints = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    graph = onnx.helper.make_graph(
        [pad], "g",
        [onnx.helper.make_tensor_value_info("x", floats, [2]),
         onnx.helper.make_tensor_value_info("widths", ints, [2])],
        [onnx.helper.make_tensor_value_info("y", floats, ["n"])],
    )  # fmt: skip
    assert guard_pads(ir.from_proto(onnx.helper.make_model(graph))) == 0
