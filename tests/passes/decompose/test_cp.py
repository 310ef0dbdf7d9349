from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.passes.decompose._math.tensors import cp, cp_whole
from graphwright.passes.decompose.cp import Cp

CHAIN = ("conv", [("decompose.cp", {"ratio": 0.3})])


class One(nn.Module):
    """A single convolution."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


LAYERS = [
    (nn.Conv1d(12, 16, 5, stride=2, padding=2), (2, 12, 17), 3),
    (nn.Conv2d(12, 16, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 12, 9, 11), 4),
    (nn.Conv2d(12, 16, 3, padding="same"), (2, 12, 9, 11), 4),
    (nn.Conv2d(12, 16, (1, 3), stride=2, padding=(1, 1)), (2, 12, 9, 11), 3),
    (nn.Conv3d(6, 8, (3, 2, 3), padding=(1, 0, 1)), (2, 6, 5, 6, 7), 5),
]


@pytest.mark.parametrize(("layer", "shape", "count"), LAYERS)
def test_a_kernel_of_that_rank_stays_what_it_is(
    layer: nn.Module, shape: tuple[int, ...], count: int
) -> None:
    torch.manual_seed(0)
    factors = [torch.randn(size, 2, dtype=torch.float64) for size in layer.weight.shape]
    layer.weight.data = cp_whole(factors).float()
    program = gw.trace(One(layer).eval(), (torch.randn(*shape),), {"x": {0: "batch"}})
    made = Cp(rank=2, max_error=1e-4)(program)
    assert sum("conv" in str(node.target) for node in made.graph.nodes) == count
    numbers = sum(p.numel() for n, p in made.parameters().items() if n.endswith("weight"))
    assert numbers == 2 * sum(size for size in layer.weight.shape if size > 1)


def test_the_sum_of_products_is_found() -> None:
    torch.manual_seed(0)
    exact = [torch.randn(size, 3, dtype=torch.float64) for size in (9, 7, 3, 3)]
    w = torch.einsum("ar,br,cr,dr->abcd", *exact)
    torch.testing.assert_close(cp_whole(exact), w)
    found = cp(w, 3, torch.Generator().manual_seed(0))
    assert float((cp_whole(found) - w).norm() / w.norm()) < 1e-4
    for factor in found[1:]:
        torch.testing.assert_close(factor.norm(dim=0), torch.ones(3, dtype=torch.float64))
    # more terms leave less, and one term less than the best matrix of rank 1 of any unfolding
    noise = torch.randn(9, 7, 3, 3, dtype=torch.float64)
    left = [float((cp_whole(cp(noise, r, torch.Generator().manual_seed(0))) - noise).norm())
            for r in (1, 4, 16)]  # fmt: skip
    assert left[0] > left[1] > left[2]
    assert left[0] >= float(torch.linalg.svdvals(noise.flatten(1))[1:].norm())


def test_a_ratio_is_kept_and_the_seed_decides() -> None:
    torch.manual_seed(0)
    net = One(nn.Conv2d(6, 24, 3)).eval()
    program = gw.trace(net, (torch.randn(2, 6, 8, 8),))
    result = Cp(ratio=0.4).run(program, Context(seed=1))
    rank = int(0.6 * 24 * 6 * 9 / (24 + 6 + 3 + 3))
    assert result.program.state["layer.axis0.weight"].shape == (rank, 1, 3, 1)
    again = Cp(ratio=0.4).run(program, Context(seed=1)).program
    for name, tensor in result.program.state.items():
        assert torch.equal(tensor, again.state[name])
    assert "would store" in Cp(rank=40).run(program, Context()).actions[0].reason


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_it_lowers(backend: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    program = gw.trace(net, (torch.randn(2, 8, 9, 9),), {"input": {0: "batch"}})
    x = torch.randn(3, 8, 9, 9)
    coder = gw.passes.quantize.Int8(activations="static")
    made = coder(Cp(ratio=0.4)(program), calibration=[(x,)])
    compiled = gw.lower(made, backend)
    assert gw.compare(made(x).detach(), compiled(x).detach()).relative < 0.05
