from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.calibration.hessian import hessian
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.factors import eigenspace, split
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program

CHAIN = ("text", [("quantize.rtn", {"block": 16}), ("compensate.eora", {"rank": 2})])


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs with a few strong directions, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    mixing *= torch.logspace(0, -2, columns)[:, None]
    return torch.randn(rows, columns, generator=generator) @ mixing


def matrices(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (200, 24) and a weight difference (32, 24)."""
    generator = torch.Generator().manual_seed(100 + seed)
    return correlated(200, 24, seed), torch.randn(32, 24, generator=generator)


def error(x: Tensor, delta: Tensor) -> float:
    return float((x.double() @ delta.double().T).norm())


def factors(x: Tensor, delta: Tensor, rank: int) -> Tensor:
    found = split(delta, *eigenspace(hessian([x[None]]).matrix[0]), rank)
    return found.b.double() @ found.a.double()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rank", [1, 4, 9, 23])
def test_the_error_is_the_smallest_that_any_correction_of_that_rank_has(
    rank: int, seed: int
) -> None:
    x, delta = matrices(seed)
    singular = torch.linalg.svdvals(x.double() @ delta.double().T)
    best = float(singular[rank:].square().sum().sqrt())
    found = error(x, delta - factors(x, delta, rank))
    # H is summed in float32: what is smaller than its resolution cannot be told apart
    assert found == pytest.approx(best, rel=1e-4, abs=1e-5 * float(singular[0]))


def test_no_rank_is_better_served_by_plain_or_activation_scaled_svd() -> None:
    for seed, rank in itertools.product(range(3), (1, 4, 9, 16)):
        x, delta = matrices(seed)
        eora = error(x, delta - factors(x, delta, rank))
        plain = split(delta, None, None, rank)
        assert eora <= error(x, delta - plain.b.double() @ plain.a.double())
        scale = x.abs().mean(0).double()  # the paper's baseline "ACT-S"
        scaled = split(delta, torch.diag(scale), torch.diag(1 / scale), rank)
        assert eora <= error(x, delta - scaled.b.double() @ scaled.a.double())


def test_full_rank_restores_the_weight() -> None:
    x, delta = matrices()
    torch.testing.assert_close(factors(x, delta, 24), delta.double(), rtol=0, atol=1e-4)


def test_isotropic_inputs_give_the_plain_svd() -> None:
    _, delta = matrices()
    found = split(delta, *eigenspace(torch.eye(24)), 5)
    plain = split(delta, None, None, 5)
    torch.testing.assert_close(found.b @ found.a, plain.b @ plain.a, rtol=1e-4, atol=1e-5)


def test_fewer_samples_than_features_give_factors_that_stay_small() -> None:
    x, delta = correlated(7, 24), matrices()[1]
    found = split(delta, *eigenspace(hessian([x[None]]).matrix[0]), 5)
    singular = torch.linalg.svdvals(x.double() @ delta.double().T)
    best = float(singular[5:].square().sum().sqrt())
    left = error(x, delta - found.b.double() @ found.a.double())
    assert left == pytest.approx(best, rel=1e-3, abs=1e-5 * float(singular[0]))
    assert float(found.a.norm()) < 100 * float(delta.norm())


class Net(nn.Module):
    """A convolution, two linear layers, and a product with the weight turned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(32, 24), nn.Linear(24, 16, bias=False)
        self.turned = nn.Parameter(torch.randn(16, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x))
        h = torch.nn.functional.adaptive_avg_pool2d(h, 2).flatten(1)
        return torch.relu(self.fc2(torch.relu(self.fc1(h)))) @ self.turned


def original() -> Program:
    torch.manual_seed(0)
    return gw.trace(Net().eval(), {"x": torch.randn(4, 3, 8, 8)}, dynamic={"x": {0: "batch"}})


def batches() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 8, 8),) for _ in range(4)]


def output_error(before: Program, after: Program) -> float:
    x = torch.cat([batch[0] for batch in batches()])
    with torch.no_grad():
        return float((before(x) - after(x)).norm() / before(x).norm())


@pytest.fixture(scope="module")
def quantized() -> Program:
    return gw.passes.quantize.Rtn(bits=2, block=16)(original())


def test_the_layers_of_a_quantized_program_get_better_with_the_rank(quantized: Program) -> None:
    before = original()
    errors = [output_error(before, quantized)]
    for rank in (2, 6, 128):
        fixed = gw.passes.compensate.Eora(rank=rank)(
            quantized, calibration=batches(), teacher=before
        )
        errors.append(output_error(before, fixed))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-4  # full rank
    targets = [str(node.target) for node in fixed.graph.nodes]
    assert sum("dequantize_blocks" in target for target in targets) == 4  # still compressed
    assert sum("add_low_rank" in target for target in targets) == 4


def test_the_corrected_program_lowers_to_what_it_computes(quantized: Program) -> None:
    before = original()
    fixed = gw.passes.compensate.Eora(rank=4)(quantized, calibration=batches(), teacher=before)
    x = batches()[0][0]
    for backend in ("onnxruntime", "triton"):
        compiled = gw.lower(fixed, backend)
        found = compiled(x)
        expected = fixed(x)
        assert float((found - expected).detach().norm() / expected.detach().norm()) < 0.02, backend
    steps = gw.lower(fixed, "onnxruntime").notes["steps"]
    assert steps["low_rank"] == 4


def test_later_layers_are_measured_on_what_the_corrected_ones_give(quantized: Program) -> None:
    step = gw.passes.compensate.Eora(rank=8)
    context = Context(calibration=batches(), teacher=original())
    result = step.run(quantized, context)
    told = {a.layer: a.what for a in result.actions}
    assert set(told) == {"conv", "fc1", "fc2", "turned"}
    assert all(what.startswith("rank ") for what in told.values())
    assert result.metrics["layer_error_after"] < result.metrics["layer_error_before"]
    # An independent run: inputs of fc2 in the corrected program, and the error there.
    fixed = result.program
    layer = next(layer for layer in layers(fixed) if layer.name == "fc2")
    seen = []

    class Tap(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n is layer.node.args[0]:
                seen.append(value)
            return value

    with torch.no_grad():
        for (x,) in batches():
            Tap(fixed.module).run(x)
    rows = torch.cat(seen)
    whole = original().state["fc2.weight"].detach()
    left = error(rows, whole - weight_value(fixed, layer)) / error(rows, whole)
    assert float(told["fc2"].split()[-1]) == pytest.approx(left, rel=0.02)


def test_what_was_not_compressed_is_left_alone() -> None:
    before = original()
    part = gw.passes.quantize.Rtn(bits=3, block=16, targets=["fc1"])(before)
    context = Context(calibration=batches(), teacher=before)
    result = gw.passes.compensate.Eora(rank=4).run(part, context)
    reasons = {a.layer: a.reason for a in result.actions if a.what == "left alone"}
    assert reasons == dict.fromkeys(("conv", "fc2", "turned"), "its weight is the original's")


def test_bad_uses_are_refused() -> None:
    before = original()
    with pytest.raises(ModelError, match="no selected layer can be compensated"):
        gw.passes.compensate.Eora(rank=4)(before, calibration=batches())
    with pytest.raises(ArgumentError, match="needs calibration"):
        gw.passes.compensate.Eora(rank=4)(before)
    with pytest.raises(ArgumentError, match="rank"):
        gw.passes.compensate.Eora(rank=0)
    smaller = gw.passes.prune.Zig(sparsity=0.5)(before)
    context = Context(calibration=batches(), teacher=before)
    with pytest.raises(ModelError, match="no selected layer") as refused:
        gw.passes.compensate.Eora(rank=4).run(smaller, context)
    assert any("its weight was" in reason for reason in refused.value.details)
