"""Which codes of a runtime are taken for the program's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.backends.onnxruntime.check import Case, Differs
from graphwright.backends.onnxruntime.forced import Found, on_codes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.nn.functional.gelu(self.a(x)))


@pytest.fixture(scope="module")
def programs() -> dict[str, gw.Program]:
    """In float32 and in float16, the second layer quantized alike."""
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    program = gw.trace(Net().eval(), {"x": x}, dynamic={"x": {0: "n"}})
    quantize = gw.passes.quantize.Int8(activations="static", targets=["b"])
    eight = quantize(program, calibration=[{"x": x}])
    return {"float32": eight, "float16": gw.passes.cast.Dtype(to="float16")(eight)}


def shown(program: gw.Program, change: float) -> None:
    """Hands in as the runtime's codes those of a hidden value that is larger by a share."""
    (quantizer,) = (n for n in program.graph.nodes if "fake_quantize" in n.name)
    float_ones = program.state
    x = program.examples[0]
    hidden = torch.nn.functional.gelu(
        torch.nn.functional.linear(x, float_ones["a.weight"].float(), float_ones["a.bias"].float())
    )
    scale, zero = quantizer.args[1], quantizer.args[2]
    codes = (hidden * (1 + change) / scale).round().add(zero).clamp(0, 255)
    found = Found(codes.to(torch.uint8), torch.tensor(scale), torch.tensor(zero))
    case = Case((x,), program.run_flat((x,)), {})
    on_codes(program, case, {quantizer.name: found})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rounding_is_let_pass_and_a_wrong_scale_is_not(programs, dtype: str) -> None:
    shown(programs[dtype], 0.0)  # float16 rounds in front of the quantizer, the runtime need not
    with pytest.raises(Differs, match="codes differ"):
        shown(programs[dtype], 0.01)


def test_half_precision_in_front_is_what_moves_the_further_codes(programs) -> None:
    """The roundings of float16 move more codes than float32 is allowed, and no more than it is."""
    with pytest.raises(Differs, match="codes differ"):
        shown(programs["float32"], 2**-10)
    shown(programs["float16"], 2**-10)


class Timed(nn.Module):
    """A layer that reads one number per row, as the time of a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.last = nn.Linear(1, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.last(torch.nn.functional.silu(self.time(timestep[:, None] / 10)))


@pytest.mark.parametrize("times", [[500.0, 500.0], [-3.0, -3.0], [0.0, 0.0], [500.0, 100.0]])
def test_the_codes_of_one_number_are_steps_from_zero(times: list[float]) -> None:
    """A range of no width without the zero that it is coded with had an endless number of steps."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4), "timestep": torch.tensor(times)}
    free = {name: {0: "batch"} for name in inputs}
    program = gw.trace(Timed().eval(), inputs, free)
    made = gw.passes.quantize.Int8(activations="dynamic")(program)
    compiled = gw.lower(made, "onnxruntime")
    found, wanted = (f(*made.examples).detach() for f in (compiled, made))
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
