"""quantize.rtn: rounding by hand, what becomes of each kind of layer, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import encoder
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.ir.stored.blocks import round_to_nearest

CHAIN = ("text", [("quantize.rtn", {"block": 16})])

Rtn = gw.passes.quantize.Rtn
ours = torch.ops.graphwright


def test_one_group_by_hand() -> None:
    row = torch.tensor([[-1.0, 0.62, 2.0, 0.15, *[0.0] * 12]])
    # range [-1, 2] in 15 steps of 0.2, zero point 5
    made = round_to_nearest(row, 4, 16)
    assert made.scale.item() == pytest.approx(0.2)
    assert made.zero_point is not None
    assert made.zero_point.tolist() == [[5]]
    codes = torch.tensor([0.0, 8.0, 15.0, 6.0, *[5.0] * 12])
    torch.testing.assert_close(made.value()[0], (codes - 5) * 0.2)


def test_symmetric_group_by_hand() -> None:
    row = torch.tensor([[-1.0, 0.45, 3.0, -3.0]])
    # range [-3, 3] in 7 steps of 6/7 from the lowest, zero point 4: codes -> (q - 4) * 6/7
    made = round_to_nearest(row, 3, 4, symmetric=True)
    assert made.zero_point is None
    assert made.scale.item() == pytest.approx(6 / 7)
    # -3 is 3.5 steps below zero, which rounds to even: -4; 3 clips at code 7
    assert made.value()[0].tolist() == pytest.approx([-6 / 7, 6 / 7, 18 / 7, -24 / 7])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_weight_gets_its_nearest_value(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(6, 50, generator=generator, dtype=torch.float64).float()
    made = round_to_nearest(w, bits, 16, symmetric=symmetric)
    value = made.value().double()
    for row in range(6):
        for start in range(0, 50, 16):
            part = w[row, start : start + 16].double()
            scale = made.scale[row, start // 16].double()
            low, high = part.min().clamp(max=0), part.max().clamp(min=0)
            peak = torch.maximum(high, -low)
            width = 2 * peak if symmetric else high - low
            assert float(scale) == pytest.approx(float(width / (2**bits - 1)), rel=1e-6)
            zero = 2.0 ** (bits - 1) if symmetric else float(torch.round(-low / scale))
            grid = (torch.arange(2**bits, dtype=torch.float64) - zero) * scale
            nearest = (part[:, None] - grid[None]).abs().amin(1)
            off = (part - value[row, start : start + 16]).abs()
            torch.testing.assert_close(off, nearest, atol=4e-7, rtol=0)


def test_search_lowers_its_error_on_heavy_tails() -> None:
    w = torch.distributions.StudentT(4.0).sample((32, 128))
    errors = [
        float((round_to_nearest(w, 3, 64, search=s).value() - w).abs().pow(2.4).sum())
        for s in (False, True)
    ]
    assert errors[1] < 0.95 * errors[0]


class Net(nn.Module):
    """One layer of every kind that has a weight; the table is tied to the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 72)
        self.linear = nn.Linear(72, 40)
        self.product = nn.Parameter(torch.randn(40, 36))
        self.conv = nn.Conv1d(36, 16, 3, padding=1)
        self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose1d(16, 72, 1)
        self.head = nn.Linear(72, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.linear(self.table(ids))) @ self.product
        x = self.up(self.grouped(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x)


def traced(model: nn.Module | None = None) -> gw.Program:
    ids = torch.arange(10).reshape(2, 5)
    return gw.trace((model or Net()).eval(), (ids,), {"ids": {0: "n"}})


def run(program: gw.Program, **options: Any) -> Any:
    return Rtn(**options).execute(program, Context(scope=("quantize.rtn",)))


def test_every_layer_is_accounted_for() -> None:
    program = traced()
    result = run(program, bits=4, block=32)
    told = {action.layer: action for action in result.actions}
    assert set(told) == {"table", "linear", "product", "conv", "grouped", "up", "head"}
    assert told["up"].what.startswith("int4, block 32")
    assert told["head"].reason == "shares the weight of table"
    assert told["grouped"].what.startswith("int4, block 16")
    assert told["linear"].reason == "the last block of a row has 8 weights"
    floats = [n for n, t in result.program.state.items() if t.is_floating_point() and t.dim() > 1]
    assert {n.rpartition("_")[2].rpartition(".")[2] for n in floats} == {"scale"}
    calls = [n for n in result.program.graph.nodes if n.target is ours.dequantize_blocks.default]
    assert len(calls) == 6
    assert result.metrics["weights"] == 6
    assert 4 < result.metrics["bits_per_weight"] < 8


def test_the_program_computes_with_the_rounded_weights() -> None:
    program = traced()
    result = run(program, bits=3, block=16)
    model = Net()
    state = dict(program.original_state_dict())
    for layer in layers(result.program):
        key = layer.name if layer.name == "product" else f"{layer.name}.weight"
        state[key] = weight_value(result.program, layer)
    model.load_state_dict(state)
    ids = torch.randint(0, 50, (3, 5))
    torch.testing.assert_close(result.program(ids), model.eval()(ids), atol=1e-5, rtol=1e-5)


def test_more_bits_and_smaller_blocks_are_nearer() -> None:
    program = traced()
    ids = torch.randint(0, 50, (8, 5))
    wanted = program(ids).detach()

    def error(**options: Any) -> float:
        result = run(program, **options).program(ids).detach()
        return float((result - wanted).norm() / wanted.norm())

    by_bits = [error(bits=bits, block=32) for bits in (2, 3, 4, 6, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[-1] < 0.02
    assert error(block=16) < error(block=64) < error(block=-1, symmetric=True)


def test_jobs_do_not_change_the_result() -> None:
    program = traced()
    one, two = (Rtn().execute(program, Context(jobs=jobs)).program.state for jobs in (1, 3))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_half_weights_keep_their_type() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).to(torch.float16)
    program = gw.trace(model.eval(), (torch.randn(2, 64).half(),))
    result = run(program, block=32).program
    assert result.state["0.weight_scale"].dtype == torch.float16
    assert result(torch.ones(2, 64).half()).dtype == torch.float16


def test_bad_weights_are_left_alone_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].weight.data[3, 4] = float("nan")
    model[1].weight.data[:] = 0.0
    program = gw.trace(model.eval(), (torch.randn(2, 32),))
    result = run(program)
    assert result.actions[0].reason == "its weight holds NaN or infinity"
    assert result.actions[1].what.endswith("relative error 0.00e+00")
    with pytest.raises(ModelError, match="can quantize none of its targets"):
        run(program, targets=["0"])


def test_it_is_not_done_twice() -> None:
    once = run(traced()).program
    with pytest.raises(ModelError, match="can quantize none") as caught:
        run(once, targets=["linear"])
    assert "quantized already" in str(caught.value.details)


def test_saved_and_loaded(tmp_path: Any) -> None:
    result = run(traced(), bits=3).program
    result.save(tmp_path / "net.pt2")
    again = gw.load(tmp_path / "net.pt2")
    ids = torch.randint(0, 50, (3, 5))
    assert torch.equal(again(ids), result(ids))


@pytest.mark.slow
def test_the_sentence_encoder_in_a_sixth_of_its_size(tmp_path: Any) -> None:
    program = encoder.program()
    batches = encoder.held_out()[:20]
    reference = encoder.embeddings(program, batches)
    whole = gw.lower(program, "onnxruntime").save(tmp_path / "whole").file_bytes
    cosines = []
    for options, share in [({"block": 32}, 0.18), ({"block": 128}, 0.15)]:
        small = gw.lower(Rtn(**options)(program), "onnxruntime")
        assert small.notes["products"]["accuracy_level"] == 4
        assert small.notes["dropped"] == {}
        assert small.save(tmp_path / f"{options['block']}").file_bytes < share * whole
        cosines.append(encoder.mean_cosine(reference, encoder.embeddings(small, batches)))
    assert cosines[0] > 0.96 > cosines[1] > 0.93
