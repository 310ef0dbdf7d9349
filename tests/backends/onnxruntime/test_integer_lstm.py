"""LSTMs with int8 weights on ONNX Runtime's integer kernel: its arithmetic, check and count."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends.onnxruntime import integer_lstm
from graphwright.backends.onnxruntime.attempt import Attempt
from graphwright.backends.onnxruntime.check import Differs
from graphwright.backends.onnxruntime.runtime import SessionSettings
from graphwright.backends.onnxruntime.translate import translate_with_values
from graphwright.ir.context import Context

Int8 = gw.passes.quantize.Int8


class Net(nn.Module):
    def __init__(self, layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 16, layers, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def coded(net: nn.Module, seed: int = 0) -> gw.Program:
    torch.manual_seed(seed)
    program = gw.trace(net.eval(), {"x": torch.randn(7, 2, 24)}, {"x": {0: "time", 1: "batch"}})
    return Int8().execute(program, Context()).program


def test_the_reference_is_torchs_lstm() -> None:
    torch.manual_seed(0)
    net = nn.LSTM(24, 16, bidirectional=True).double()
    x, state = torch.randn(7, 3, 24).double(), torch.randn(2, 2, 3, 16).double()
    order = [0, 3, 1, 2]

    def stacked(name: str) -> Tensor:
        both = (getattr(net, f"{name}_l0{end}").detach() for end in ("", "_reverse"))
        return torch.stack([torch.cat([t.chunk(4)[i] for i in order]) for t in both])

    found = integer_lstm.lstm(
        x, (stacked("weight_ih"), stacked("weight_hh")),
        torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1), state[0], state[1], rounds=False,
    )  # fmt: skip
    expected = net(x, (state[0], state[1]))[0].detach().unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}],
)
def test_the_integer_kernel_runs_and_is_counted(options: dict[str, Any]) -> None:
    program = coded(Net(**options))
    compiled = gw.lower(program, "onnxruntime")
    depth = options.get("layers", 1)
    assert compiled.notes["kernels"]["DynamicQuantizeLSTM"] == depth
    assert "LSTM" not in compiled.notes["kernels"]
    assert compiled.notes["lstms"]["integer"] == depth
    counts = compiled.notes["integer_kernels"]
    assert counts["integer"] == counts["quantized"] == depth * (4 if "layers" in options else 2)
    stored = sum(t.nbytes for t in program.state.values())
    assert len(compiled.model) < stored + 8000
    for shape in ((7, 2, 24), (3, 5, 24)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            error = float((compiled(x) - program(x)).norm() / program(x).norm())
        assert 0 < error < 0.03


def model_of(program: gw.Program) -> ir.Model:
    return translate_with_values(program, 21)[0]


def check(program: gw.Program, model: ir.Model, rounded: Any) -> float:
    return integer_lstm.check_rounded(
        program, model, rounded, SessionSettings("cpu", 1, 1), program.examples
    )


def test_the_kernel_is_held_to_its_arithmetic() -> None:
    program = coded(Net(bidirectional=True))
    model = model_of(program)
    rounded = integer_lstm.on_integers(model)
    assert check(program, model, rounded) < 0.05


@pytest.mark.parametrize("part", ["hidden_scale", "input"])
def test_a_kernel_with_something_else_in_it_is_refused(part: str) -> None:
    program = coded(Net())
    model = model_of(program)
    rounded = integer_lstm.on_integers(model)
    (value,) = [v for n, v in model.graph.initializers.items() if n.endswith(f".{part}")]
    assert value.const_value is not None
    changed = torch.tensor(value.const_value.numpy())
    # another scale, or one gate's codes in another's place
    changed = changed.roll(16, -1) if part == "input" else changed * 1.01
    value.const_value = ir.tensor(changed.numpy(), name=value.name)
    with pytest.raises(Differs, match="integer LSTM"):
        check(program, model, rounded)


def test_a_kernel_that_differs_leaves_the_float_one_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(integer_lstm, "NEAR", -1.0)
    compiled = gw.lower(coded(Net()), "onnxruntime")
    assert compiled.notes["kernels"]["LSTM"] == 1
    assert any("computed in float" in text for text in compiled.notes["warnings"])
    assert compiled.notes["integer_kernels"]["integer"] == 0


def test_gru_stays_a_float_kernel_with_int8_weights() -> None:
    torch.manual_seed(0)
    net = nn.GRU(24, 16).eval()
    program = gw.trace(net, (torch.randn(7, 2, 24),))
    program = Int8().execute(program, Context()).program
    compiled = gw.lower(program, "onnxruntime")
    assert compiled.notes["kernels"]["GRU"] == 1
    assert compiled.notes["integer_kernels"]["float"] == {
        "weight_ih_l0": "gru", "weight_hh_l0": "gru"
    }  # fmt: skip
    assert len(compiled.model) < sum(t.nbytes for t in program.state.values()) + 8000


def test_another_provider_has_no_integer_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    program = coded(Net())
    made = Attempt(program, {})
    settings = SessionSettings("cpu", 1, 1)
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(SessionSettings, "providers", lambda self: both)
    assert integer_lstm.to_integers(program, settings, model_of(program), made, []) is None
    assert made.lstms["why"] == "only the CPU provider has an integer kernel"
