from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers
from graphwright.ir.program import Program

CHAIN = ("text", [("quantize.rtn", {"block": 16}), ("compensate.svd", {"rank": 2})])


def original(tied: bool = False) -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).eval()
    if tied:
        net[2].weight = net[0].weight
    return gw.trace(net, (torch.randn(4, 24),))


def values(program: Program) -> list[torch.Tensor]:
    return [weight_value(program, layer).double() for layer in layers(program)]


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_the_weight_error_is_the_tail_of_its_singular_values(rank: int) -> None:
    before = original()
    rough = gw.passes.quantize.Rtn(bits=2, block=8)(before)
    fixed = gw.passes.compensate.Svd(rank=rank)(rough, teacher=before)
    for whole, compressed, corrected in zip(
        values(before), values(rough), values(fixed), strict=True
    ):
        tail = torch.linalg.svdvals(whole - compressed)[rank:]
        left = float((whole - corrected).norm())
        assert left == pytest.approx(float(tail.norm()), rel=1e-4, abs=1e-5)


def test_a_pruned_weight_takes_its_correction_in_when_it_is_lowered() -> None:
    before = original()
    sparse = gw.passes.prune.Magnitude(sparsity=0.6)(before)
    fixed = gw.passes.compensate.Svd(rank=3)(sparse, teacher=before)
    compiled = gw.lower(fixed, "onnxruntime")
    x = torch.randn(4, 24)
    torch.testing.assert_close(compiled(x), fixed(x).detach(), rtol=1e-4, atol=1e-5)
    assert compiled.notes["steps"]["low_rank"] == 2
    assert (
        compiled.notes["kernels"].get("Gemm", 0)
        + compiled.notes["kernels"].get("MatMul", 0)
        + compiled.notes["kernels"].get("FusedGemm", 0)
        == 2
    )  # nothing beside the layers


def test_a_tied_weight_is_corrected_once() -> None:
    before = original(tied=True)
    rough = gw.passes.quantize.Rtn(bits=2, block=8)(before)
    fixed = gw.passes.compensate.Svd(rank=24)(rough, teacher=before)
    first, second = values(fixed)
    torch.testing.assert_close(first, values(before)[0], rtol=0, atol=1e-4)
    assert torch.equal(first, second)
    calls = [str(n.target) for n in fixed.graph.nodes if "add_low_rank" in str(n.target)]
    assert len(calls) == 1


def test_every_layer_is_reported() -> None:
    before = original()
    rough = gw.passes.quantize.Rtn(bits=2, block=8, targets=["0"])(before)
    result = gw.passes.compensate.Svd(rank=3).run(rough, Context(teacher=before))
    told = {a.layer: a.what.split(",")[0] for a in result.actions}
    assert told == {"0": "rank 3", "2": "left alone"}
    assert 0 < result.metrics["layer_error_after"] < result.metrics["layer_error_before"]
