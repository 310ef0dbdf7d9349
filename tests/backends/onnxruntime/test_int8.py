"""Static int8 of convolutional nets: every convolution is an integer kernel."""

from __future__ import annotations

import pytest
import torch
from models import int8_nets
from torch import fx, nn

import graphwright as gw
from graphwright.backends.base import Compiled
from graphwright.backends.onnxruntime import job
from graphwright.backends.onnxruntime.emitter import Untranslatable
from graphwright.backends.onnxruntime.steps import int8
from graphwright.ir.edit import Editor
from graphwright.passes.cleanup import FoldBatchNorm


def compiled(model: nn.Module, x: torch.Tensor) -> Compiled:
    quantize = gw.passes.quantize.Int8(activations="static")
    program = gw.trace(model.eval(), {"input": x})
    return gw.lower(quantize(program, calibration=[{"input": x}]), "onnxruntime")


def two(*tail: nn.Module, between: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), between or nn.Identity()]
    return nn.Sequential(*first, nn.Conv2d(16, 16, 3, padding=1), *tail)


@pytest.mark.parametrize("tail", [[], [nn.PReLU()], [nn.Flatten(), nn.Linear(16 * 144, 4)]])
def test_with_and_without_a_linear(tail: list[nn.Module]) -> None:
    lowered = compiled(two(*tail), torch.randn(4, 3, 12, 12))
    assert lowered.notes["dropped"] == {}
    assert lowered.notes["kernels"]["QLinearConv"] == 2
    assert "Conv" not in lowered.notes["kernels"]


@pytest.mark.parametrize("pad", [nn.ZeroPad2d((0, 1, 0, 1)), nn.ReflectionPad2d(1)])
def test_with_a_pad_between(pad: nn.Module) -> None:
    lowered = compiled(two(between=pad), torch.randn(4, 3, 12, 12))
    assert lowered.notes["dropped"] == {}
    assert lowered.notes["kernels"]["QLinearConv"] == 2


@pytest.mark.parametrize("rank", [1, 3])
def test_in_one_and_three_dimensions(rank: int) -> None:
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{rank}d")
    pool = getattr(nn, f"MaxPool{rank}d")
    model = nn.Sequential(conv(8, 16, 3, padding=1), nn.ReLU(), pool(2), conv(16, 16, 3))
    lowered = compiled(model, torch.randn(2, 8, *[8] * rank))
    assert lowered.notes["kernels"]["QLinearConv"] == 2
    assert "Conv" not in lowered.notes["kernels"]


class Blocks(nn.Module):
    """A residual sum, a depthwise layer, an activation that stays float, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Conv2d(32, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.stem(input))
        h = torch.relu(self.body(h) + h)
        h = self.point(nn.functional.silu(self.depth(h)))
        low = nn.functional.interpolate(nn.functional.max_pool2d(h, 2), scale_factor=2.0)
        return self.fc(self.head(torch.cat([h, low], 1)).mean((2, 3)))


@pytest.fixture(scope="module")
def blocks() -> gw.Program:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    program = gw.trace(Blocks().eval(), {"input": x}, {"input": {0: "n"}})
    return gw.passes.quantize.Int8(activations="static")(program, calibration=[{"input": x}])


def test_every_layer_is_counted_in_the_session(blocks: gw.Program) -> None:
    notes = gw.lower(blocks, "onnxruntime").notes
    assert notes["integer_kernels"] == {"quantized": 6, "integer": 6, "float": {}}
    assert notes["kernels"]["QLinearConv"] == 5
    assert notes["warnings"] == []
    assert max(row["relative"] for row in notes["checked"]) < 1e-5


def test_layers_that_stay_float_are_named(blocks: gw.Program) -> None:
    notes = gw.lower(blocks, "onnxruntime", skip=["int8"]).notes
    assert notes["integer_kernels"]["integer"] == 0
    assert list(notes["integer_kernels"]["float"])[:2] == ["stem", "body"]
    assert any("6 of 6 layers" in text and "stem" in text for text in notes["warnings"])


def test_behind_the_standard_exporter(blocks: gw.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: gw.Program, opset: int) -> None:
        raise Untranslatable(next(n for n in program.graph.nodes if n.name == "silu"), "no form")

    monkeypatch.setattr(job, "translate_with_values", refuse)
    notes = gw.lower(blocks, "onnxruntime").notes
    assert notes["integer_kernels"] == {"quantized": 6, "integer": 6, "float": {}}
    assert ["torch.onnx.export" in text for text in notes["warnings"]] == [True]
    assert max(row["relative"] for row in notes["checked"]) < 1e-5


def test_a_wrong_scale_drops_the_step_and_says_where(
    blocks: gw.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = int8._parameters

    def wrong(editor: Editor, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        scale, zero = right(editor, x)
        if x.name == "fake_quantize_default_3":
            name = editor.add_state("wrong", editor.state[str(scale.target)] * 1.05)
            scale = editor.get(name)
        return scale, zero

    monkeypatch.setattr(int8, "_parameters", wrong)
    lowered = gw.lower(blocks, "onnxruntime")
    assert "quantizer fake_quantize_default_3" in lowered.notes["dropped"]["int8"]
    assert any("step int8 was left out" in text for text in lowered.notes["warnings"])


@pytest.mark.parametrize(
    "up",
    [
        nn.ConvTranspose2d(16, 8, 2, 2),
        nn.ConvTranspose2d(16, 8, 3, 2, padding=1, output_padding=1, bias=False),
        nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 2, padding=1), nn.ReLU()),
        nn.ConvTranspose2d(16, 8, 3, padding=1),
    ],
)
def test_transposed_convolutions_are_integer_kernels(up: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), up, nn.Conv2d(8, 4, 3))
    notes = compiled(model, torch.randn(4, 3, 8, 8)).notes
    assert notes["integer_kernels"] == {"quantized": 3, "integer": 3, "float": {}}
    assert notes["kernels"]["QLinearConv"] == 3
    assert "ConvTranspose" not in notes["kernels"]


def test_one_without_a_plain_form_is_stored_and_said_so() -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(16, 8, 2, 2, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), up, nn.Conv2d(8, 4, 3))
    notes = compiled(model, torch.randn(4, 3, 8, 8)).notes
    assert notes["integer_kernels"] == {
        "quantized": 3, "integer": 2, "float": {"2": "ConvTranspose"},
    }  # fmt: skip
    assert any("1 of 3 layers" in text for text in notes["warnings"])


@pytest.mark.parametrize(("name", "layers"), [("resnet", 7), ("unet", 9)])
def test_every_layer_of_a_net_is_an_integer_kernel(name: str, layers: int) -> None:
    model = int8_nets.trained(name, epochs=1, images=192)
    x, _ = int8_nets.samples(name, test=False)
    program = FoldBatchNorm()(gw.trace(model, {"x": x[:8]}, {"x": {0: "n"}}))
    quantize = gw.passes.quantize.Int8(activations="static")
    lowered = gw.lower(quantize(program, calibration=[{"x": x[:128]}]), "onnxruntime")
    assert lowered.notes["integer_kernels"] == {"quantized": layers, "integer": layers, "float": {}}
    assert lowered.notes["warnings"] == []
    assert not {"Conv", "FusedConv", "ConvTranspose"} & set(lowered.notes["kernels"])
    x_test, y_test = int8_nets.samples(name, test=True)
    with torch.no_grad():
        before = int8_nets.accuracy(model(x_test), y_test)
    assert int8_nets.accuracy(lowered(x_test), y_test) > before - 0.01
