from __future__ import annotations

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
from graphwright.ir.stored import grid
from graphwright.ir.stored.blocks import round_to_nearest
from graphwright.passes.quantize._math.gptq import GptqSettings, round_matrix
from graphwright.passes.quantize.gptq import Gptq

CHAIN = ("text", [("quantize.gptq", {"block": 16})])


class Net(nn.Module):
    """A table, two linear layers and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.conv = nn.Conv1d(32, 24, 3, stride=2, padding=1, groups=4)
        # Inputs that are far from independent, as real ones are.
        self.table.weight.data @= torch.randn(32, 32) / 4
        self.table.weight.data += 0.5

    def forward(self, ids: Tensor) -> Tensor:
        h = self.down(torch.relu(self.up(self.table(ids))))
        out: Tensor = self.conv(h.transpose(1, 2))
        return out


def prepared() -> tuple[gw.Program, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    example = torch.randint(0, 40, (3, 10))
    program = gw.trace(Net().eval(), (example,), {"ids": {0: "batch", 1: "length"}})
    return program, [(torch.randint(0, 40, (4, 12)),) for _ in range(6)]


def weight_of(program: gw.Program, name: str) -> Tensor:
    return weight_value(program, next(each for each in layers(program) if each.name == name))


def factor(h: Tensor) -> Tensor:
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


def expected(w: Tensor, x: Tensor, block: int, bits: int = 4) -> Tensor:
    """GPTQ of a matrix on rows x, in float64 and with an explicit inverse."""
    x = x.detach().double()
    settings = GptqSettings(bits, block, dtype=torch.float32)
    return round_matrix(w.double(), x.T @ x / len(x), factor, settings).value(block).float()


@pytest.mark.parametrize("sequential", [True, False])
def test_every_layer_is_calibrated_on_what_reaches_it(sequential: bool) -> None:
    program, batches = prepared()
    rounded = Gptq(block=16, sequential=sequential)(program, calibration=batches)
    seen = rounded if sequential else program
    ids = torch.cat([ids for (ids,) in batches])
    table = torch.nn.functional.embedding(ids, weight_of(seen, "table"))
    up = torch.relu(nn.functional.linear(table, weight_of(seen, "up"), program.state["up.bias"]))
    torch.testing.assert_close(
        weight_of(rounded, "up"), expected(weight_of(program, "up"), table.flatten(0, 1), 16)
    )
    torch.testing.assert_close(
        weight_of(rounded, "down"), expected(weight_of(program, "down"), up.flatten(0, 1), 16)
    )
    down = nn.functional.linear(up, weight_of(seen, "down"), program.state["down.bias"])
    windows = nn.functional.unfold(
        down.transpose(1, 2)[:, :, None], (1, 3), padding=(0, 1), stride=(1, 2)
    )
    parts = []
    for group in range(4):
        x = windows[:, group * 24 : group * 24 + 24].transpose(1, 2).flatten(0, 1)
        w = weight_of(program, "conv")[group * 6 : group * 6 + 6].flatten(1)
        parts.append(expected(w, x, 16))
    torch.testing.assert_close(weight_of(rounded, "conv").flatten(1), torch.cat(parts))


def test_weights_are_on_their_grid_and_better_than_rounding_to_nearest() -> None:
    program, batches = prepared()
    for bits in (2, 3, 4):
        ours = Gptq(bits=bits, block=32)(program, calibration=batches)
        nearest = Gptq(bits=bits, block=32, least_rows=10**6)(program, calibration=batches)
        errors = [measure(program, other, batches).relative for other in (ours, nearest)]
        assert errors[0] < 0.8 * errors[1]
        for row in weight_of(ours, "up"):
            assert len(row.unique()) <= 2**bits


def test_tables_are_rounded_to_nearest_or_left_alone() -> None:
    program, batches = prepared()
    table = weight_of(program, "table")
    rounded = weight_of(Gptq(block=32)(program, calibration=batches), "table")
    scale, zero = (v[:, None] for v in grid.fit(table, 4))
    value = grid.decode(grid.encode(table, scale, zero, 4), scale, zero)
    torch.testing.assert_close(rounded, value)
    result = Gptq(embeddings=False).execute(program, Context(calibration=batches))
    reasons = {a.layer: a.reason for a in result.actions}
    assert reasons["table"] == "embeddings: false"
    assert result.program.state["table.weight"] is program.state["table.weight"]


def test_zeros_of_a_pruned_weight_stay() -> None:
    program, batches = prepared()
    pruned = dict(program.state)
    w = pruned["up.weight"].detach().clone()
    w[w.abs() < w.abs().median()] = 0
    pruned["up.weight"] = nn.Parameter(w)
    sparse = program.replace(state=pruned)
    kept = Gptq(keep_zeros=True, block=32)(sparse, calibration=batches)
    assert bool((weight_of(kept, "up")[w == 0] == 0).all())
    plain = Gptq(block=32)(sparse, calibration=batches)
    assert bool((weight_of(plain, "up")[w == 0] != 0).any())


def test_options_reach_the_rounding() -> None:
    program, batches = prepared()
    variants: list[dict[str, Any]] = [
        {},
        {"symmetric": True},
        {"act_order": True, "static_groups": True},
        {"static_groups": True},
        {"search": True},
        {"damping": 0.5},
        {"block": -1},
        {"bits": 3},
    ]
    found = [
        weight_of(Gptq(**{"block": 16, **v})(program, calibration=batches), "down")
        for v in variants
    ]
    for index, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[:index])
    symmetric = Gptq(symmetric=True)(program, calibration=batches)
    assert not any("zero_point" in name for name in symmetric.state)


def test_act_order_without_static_groups_is_refused() -> None:
    with pytest.raises(ArgumentError, match="static_groups"):
        Gptq(act_order=True)
    assert Gptq(act_order=True, block=-1).options.act_order


def test_too_few_rows_are_reported() -> None:
    program, _ = prepared()
    result = Gptq(targets=["up", "down"], least_rows=17).execute(
        program, Context(calibration=[(torch.randint(0, 40, (2, 8)),)])
    )
    assert all("only 16 rows" in action.reason for action in result.actions)


def test_a_hessian_of_one_direction_is_damped_and_works() -> None:
    program, _ = prepared()
    constant = [(torch.full((4, 12), 7),)] * 2
    rounded = Gptq(block=16)(program, calibration=constant)
    assert all(bool(torch.isfinite(t).all()) for t in rounded(*constant[0]))
    nearest = Gptq(block=16, least_rows=10**6)(program, calibration=constant)
    errors = [measure(program, other, constant).relative for other in (rounded, nearest)]
    assert errors[0] < errors[1]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(self.table(ids))))
        return out


def test_a_tied_weight_is_stored_once_and_follows_its_product() -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, 48, (4, 16))
    program = gw.trace(Tied().eval(), (ids,))
    result = Gptq(block=32).execute(program, Context(calibration=[(ids,)]))
    torch.testing.assert_close(
        weight_of(result.program, "table"), weight_of(result.program, "head")
    )
    assert sum(name.endswith("codes") for name in result.program.state) == 2
    assert {a.layer: a.reason for a in result.actions}["table"] == "shares the weight of head"
    # A head that is left out keeps its weight, and so the table does too.
    apart = Gptq(targets=["*", "!head"]).execute(program, Context(calibration=[(ids,)]))
    reason = {a.layer: a.reason for a in apart.actions}["table"]
    assert reason.startswith("its weight is also read by")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_table_and_what_it_shares_may_have_bits_of_their_own(method: str) -> None:
    ids = torch.randint(0, 48, (4, 16))
    program = gw.trace(Tied().eval(), (ids,))
    of = {"rtn": gw.passes.quantize.Rtn, "gptq": Gptq}[method]
    result = of(block=32, embedding_bits=8).execute(program, Context(calibration=[(ids,)]))
    what = {action.layer: action.what for action in result.actions}
    assert {name: text[:4] for name, text in what.items()} == {
        "table": "int8", "head": "int8", "body": "int4"
    }  # fmt: skip
    old, new = weight_of(program, "table"), weight_of(result.program, "table")
    assert torch.equal(new, weight_of(result.program, "head"))
    assert torch.equal(new, round_to_nearest(old, 8, 32).value())


def test_what_it_cannot_quantize_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(8, 8, 3)
            self.bad = nn.Linear(8, 8)
            self.good = nn.Linear(8, 8)
            self.bad.weight.data[0, 0] = float("nan")

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.good(x), self.bad(self.up(x.transpose(1, 2)).transpose(1, 2))

    x = torch.randn(4, 6, 8)
    program = gw.trace(Odd().eval(), (x,))
    result = Gptq(least_rows=1).execute(program, Context(calibration=[(x,)]))
    reasons = {a.layer: a.reason for a in result.actions}
    assert "rounded to nearest" in reasons["up"]
    assert "NaN" in reasons["bad"]
    assert reasons["good"] == ""
    with pytest.raises(ModelError, match="none of its targets") as caught:
        Gptq(targets=["good"]).execute(result.program, Context(calibration=[(x,)]))
    assert "quantized already" in str(caught.value.details)
    with pytest.raises(ModelError, match="NaN or infinity"):
        Gptq(targets=["good"]).execute(program, Context(calibration=[(x / 0,)]))


def test_half_precision_weights_keep_their_type() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).bfloat16().eval()
    x = torch.randn(40, 32).bfloat16()
    program = gw.trace(net, (x,))
    rounded = Gptq(block=16)(program, calibration=[(x,)])
    weight = weight_of(rounded, "0")
    assert weight.dtype == torch.bfloat16
    assert measure(program, rounded, [(x,)]).relative < 0.12


def test_jobs_change_nothing() -> None:
    program, batches = prepared()
    one, two = (
        Gptq(sequential=False)
        .execute(program, Context(calibration=batches, jobs=jobs))
        .program.state
        for jobs in (1, 2)
    )
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_lowers(backend: str) -> None:
    program, batches = prepared()
    rounded = Gptq(block=16)(program, calibration=batches)
    compiled = gw.lower(rounded, backend)
    # ONNX Runtime's kernels of few bits round the activation to 8 bits.
    assert gw.compare(rounded(*batches[0]), compiled(*batches[0])).relative < 0.02
