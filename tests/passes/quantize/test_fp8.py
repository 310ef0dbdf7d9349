from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.check.verify import measure
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.ir.ops import OPS
from graphwright.passes.quantize.fp8 import Fp8

CHAIN = ("text", [("quantize.fp8", {})])

GRID = sorted({m * 2.0**-9 for m in range(8)}
              | {(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)
                 if (e, m) != (15, 7)})  # fmt: skip
"""All float8 e4m3 values that are not negative, by the format's definition."""


def nearest(x: Tensor) -> Tensor:
    """By search among all values; of two that are equally near, the one with an even mantissa."""
    grid = torch.tensor(GRID, dtype=torch.float64)
    distance = (x.abs().double()[..., None] - grid).abs()
    # Values alternate between even and odd mantissas.
    odd = torch.arange(len(GRID)) % 2
    best = distance.amin(-1, keepdim=True)
    index = torch.where(distance == best, odd, 2).argmin(-1)
    return (grid[index] * x.sign()).float()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.conv = nn.Conv1d(32, 8, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.down(torch.relu(self.up(self.table(ids))))
        out: Tensor = self.conv(h.transpose(1, 2))
        return out


def prepared() -> tuple[gw.Program, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    program = gw.trace(
        Net().eval(), (torch.randint(0, 30, (3, 10)),), {"ids": {0: "batch", 1: "length"}}
    )
    return program, [(torch.randint(0, 30, (4, 12)),) for _ in range(3)]


def weight_of(program: gw.Program, name: str) -> Tensor:
    return weight_value(program, next(each for each in layers(program) if each.name == name))


def test_rounding_is_to_the_nearest_value_of_the_format() -> None:
    ties = torch.tensor([(a + b) / 2 for a, b in pairwise(GRID)])
    x = torch.cat([torch.tensor(GRID), ties, torch.randn(400) * 50, torch.tensor([1e4])])
    x = torch.cat([x, -x])
    rounded = torch.ops.graphwright.fake_quantize_float8(x, 1.0)
    assert torch.equal(rounded, nearest(x))


def test_kernels_agree_on_every_byte_and_every_tie() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].to(device)  # 127 is NaN
    op = OPS["dequantize_float8"]
    scale = torch.tensor(0.5, device=device)
    assert torch.equal(op.load_kernel().launch(codes, scale, 0), op.eager(codes, scale, 0))
    ties = torch.tensor([(a + b) / 2 for a, b in pairwise(GRID)], device=device)
    x = torch.cat([ties, -ties])
    op = OPS["fake_quantize_float8"]
    for step in (1.0, 0.0):
        assert torch.equal(op.load_kernel().launch(x, step), op.eager(x, step))


@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_weights_follow_the_formula(scales: str) -> None:
    program, _ = prepared()
    rounded = Fp8(scales=scales, embeddings=True)(program)
    for name in ("table", "up", "conv"):
        w = weight_of(program, name)
        flat = w.flatten(1)
        largest = flat.abs().amax(1, keepdim=True) if scales == "channel" else flat.abs().max()
        scale = largest / 448
        expected = (nearest(flat / scale) * scale).reshape(w.shape)
        torch.testing.assert_close(weight_of(rounded, name), expected)
    codes = rounded.state["up.weight_codes"]
    assert codes.dtype == torch.uint8
    assert codes.shape == (48, 32)


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_activations_follow_the_formula(activations: str) -> None:
    program, batches = prepared()
    rounded = Fp8(activations=activations, targets=["up"])(program, calibration=batches)
    every = torch.cat([weight_of(program, "table")[ids] for (ids,) in batches])
    ids = batches[0][0]
    x = weight_of(program, "table")[ids]
    if activations != "none":
        largest = x.abs().amax(-1, keepdim=True) if activations == "dynamic" else every.abs().max()
        x = nearest(x / (largest / 448)) * (largest / 448)
    h = nn.functional.linear(x, weight_of(rounded, "up"), program.state["up.bias"])
    h = nn.functional.linear(
        torch.relu(h), program.state["down.weight"], program.state["down.bias"]
    )
    y = nn.functional.conv1d(
        h.transpose(1, 2), program.state["conv.weight"], program.state["conv.bias"], padding=1
    )
    torch.testing.assert_close(rounded(ids), y, rtol=1e-4, atol=1e-5)


def test_it_is_near_the_program_and_reports_every_layer() -> None:
    program, batches = prepared()
    result = Fp8().execute(program, Context())
    assert 0.001 < measure(program, result.program, batches).relative < 0.06
    found = {a.layer: a for a in result.actions}
    assert found["table"].reason == "embeddings: false"
    assert found["conv"].what.startswith("float8, activations dynamic")
    quantizers = [n for n in result.program.graph.nodes if "fake_quantize" in str(n.target)]
    assert len(quantizers) == 3


def test_static_needs_calibration_and_twice_is_refused() -> None:
    program, _ = prepared()
    with pytest.raises(ArgumentError, match="calibration"):
        Fp8(activations="static")(program)
    rounded = Fp8(activations="none", targets=["up"])(program)
    with pytest.raises(ModelError, match="none of its targets"):
        Fp8(targets=["up"])(rounded)


def test_a_weight_of_zeros_and_half_precision() -> None:
    net = nn.Linear(8, 4).half().eval()
    net.weight.data[1] = 0
    program = gw.trace(net, (torch.randn(3, 8).half(),))
    weight = weight_of(Fp8()(program), next(iter(layers(program))).name)
    assert weight.dtype == torch.float16
    assert not weight[1].any()


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    program, batches = prepared()
    rounded = Fp8()(program)
    rounded.save(tmp_path / "m.pt2")
    assert torch.equal(gw.load(tmp_path / "m.pt2")(*batches[0]), rounded(*batches[0]))


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
@pytest.mark.parametrize("options", [{"activations": "none"}, {"activations": "dynamic"}], ids=str)
def test_lowers(backend: str, options: dict[str, Any]) -> None:
    program, batches = prepared()
    rounded = Fp8(**options)(program)
    compiled = gw.lower(rounded, backend)
    assert gw.compare(rounded(*batches[0]), compiled(*batches[0])).relative < 0.01
