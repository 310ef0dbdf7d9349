from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.passes.decompose._math.tensors import Tucker as Found
from graphwright.passes.decompose._math.tensors import tucker, unfold
from graphwright.passes.decompose.tucker import Tucker

CHAIN = ("conv", [("decompose.tucker", {"ratio": 0.3})])


class One(nn.Module):
    """A single convolution."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


LAYERS = [
    (nn.Conv1d(12, 16, 5, stride=2, padding=2), (2, 12, 17)),
    (nn.Conv2d(12, 16, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 12, 9, 11)),
    (nn.Conv2d(12, 16, 3, padding="same"), (2, 12, 9, 11)),
    (nn.Conv2d(12, 16, (3, 1), stride=2, padding=(1, 1)), (2, 12, 9, 11)),
    (nn.Conv3d(8, 8, (3, 2, 3), padding=(1, 0, 1)), (2, 8, 5, 6, 7)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_kernel_of_those_ranks_stays_what_it_is(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    out, inner, *kernel = layer.weight.shape
    core = torch.randn(out // 4, inner // 4, *kernel)
    layer.weight.data = torch.einsum(
        "op,pq...,iq->oi...", torch.randn(out, out // 4), core, torch.randn(inner, inner // 4)
    )
    program = gw.trace(One(layer).eval(), (torch.randn(*shape),), {"x": {0: "batch"}})
    made = Tucker(rank=out // 4, max_error=1e-5)(program)
    sizes = {n: tuple(p.shape) for n, p in made.parameters().items()}
    flat = (1,) * len(kernel)
    assert sizes["layer.first.weight"] == (inner // 4, inner, *flat)
    assert sizes["layer.core.weight"] == (out // 4, inner // 4, *kernel)
    assert sizes["layer.last.weight"] == (out, out // 4, *flat)


def test_alternating_is_no_worse_than_its_start_and_no_better_than_the_bound() -> None:
    torch.manual_seed(0)
    w = torch.randn(20, 16, 3, 3, dtype=torch.float64)
    p, q = 8, 6
    found = tucker(w, p, q)
    left = float((w - found.whole()).norm())
    out, inner = (torch.linalg.svd(unfold(w, m), full_matrices=False)[0][:, :r]
                  for m, r in ((0, p), (1, q)))  # fmt: skip
    start = Found(out, torch.einsum("oikl,op,iq->pqkl", w, out, inner), inner)
    assert left < float((w - start.whole()).norm())
    tails = [float(torch.linalg.svdvals(unfold(w, m))[r:].norm()) for m, r in ((0, p), (1, q))]
    assert left >= max(tails)
    eye = torch.eye(p, dtype=torch.float64)
    torch.testing.assert_close(found.out.t() @ found.out, eye)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_a_ratio_is_kept_and_used_up(ratio: float) -> None:
    torch.manual_seed(0)
    program = gw.trace(One(nn.Conv2d(48, 96, 3, bias=False)).eval(), (torch.randn(2, 48, 8, 8),))
    result = Tucker(ratio=ratio).run(program, Context())
    kept = result.metrics["parameters_kept"]
    numbers = sum(p.numel() for p in result.program.parameters().values())
    assert numbers == pytest.approx(kept * 48 * 96 * 9)
    assert 1 - ratio - 0.06 < kept <= 1 - ratio


def test_energy_and_what_stays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, groups=2))
    program = gw.trace(net.eval(), (torch.randn(2, 8, 9, 9),))
    result = Tucker(energy=0.5).run(program, Context())
    told = {action.layer: action for action in result.actions}
    assert told["0"].changed
    assert told["1"].reason == "its kernel is a matrix: decompose.svd takes it"
    assert told["2"].reason.startswith("a grouped convolution")
    stays = Tucker(rank=16, targets=["0"]).run(program, Context())
    assert stays.program is program
    assert "would store" in stays.actions[0].reason
    with pytest.raises(ModelError, match="no selected layer"):
        Tucker(targets=["2"])(program)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_it_lowers_and_is_cut_behind(backend: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    program = gw.trace(net, (torch.randn(2, 8, 9, 9),), {"input": {0: "batch"}})
    made = gw.passes.prune.Zig(sparsity=0.25)(Tucker(ratio=0.4)(program))
    assert made.state["0.last.weight"].shape[0] < 16
    compiled, x = gw.lower(made, backend), torch.randn(3, 8, 9, 9)
    assert gw.compare(made(x).detach(), compiled(x).detach()).relative < 1e-4
