"""Kernels of adapters on sizes beside the tiles. The reference is the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from graphwright.ir.kernels import adapted_linear, routed_low_rank
from graphwright.ir.ops import OPS

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=DEVICE, dtype=dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value."""
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("m", "n", "k", "rank"),
    [(1, 37, 1100, 3), (17, 129, 75, 16), (130, 37, 70, 70), (600, 8, 9, 2)],
)
@pytest.mark.parametrize("dtype", BOUND)
def test_adapted_linear(m: int, n: int, k: int, rank: int, dtype: torch.dtype) -> None:
    x, weight = randn(m, k, dtype=dtype), randn(n, 2 * k, seed=1, dtype=dtype)[:, :k]
    low, b = randn(m, rank, seed=2, dtype=dtype), randn(n, rank, seed=3, dtype=dtype)
    bias, added = randn(n, seed=4, dtype=dtype), randn(m, n, seed=5, dtype=dtype)
    y = adapted_linear.adapted_linear.launch(x, weight, bias, low, b, added, "silu")
    total = x.double() @ weight.double().T + low.double() @ b.double().T + bias + added
    assert error(y, torch.nn.functional.silu(total)) <= BOUND[dtype]


def test_the_inner_dimension_is_split_for_few_tokens() -> None:
    tiles = adapted_linear.tiles_for(1)
    assert adapted_linear.split_for(1, 37, 1100, tiles) > 1


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("dtype", BOUND)
def test_every_sample_has_its_own_adapter(tokens: int, dtype: torch.dtype) -> None:
    x, added = randn(4, tokens, 300, dtype=dtype), randn(4, tokens, 37, seed=1, dtype=dtype)
    a, b = randn(3, 140, 300, seed=2, dtype=dtype), randn(3, 37, 140, seed=3, dtype=dtype)
    which = torch.tensor([2, -1, 0, 2], device=DEVICE)
    y = routed_low_rank.routed_low_rank.launch(x, a, b, which, added)
    for sample, adapter in enumerate(which.tolist()):
        expected = added[sample].double()
        if adapter >= 0:
            expected = expected + x[sample].double() @ a[adapter].double().T @ b[adapter].double().T
        else:
            assert torch.equal(y[sample], added[sample])
        assert error(y[sample], expected) <= BOUND[dtype]


@pytest.mark.parametrize("wrong", [3, -2])
def test_an_adapter_that_does_not_exist_is_no_other_one(wrong: int) -> None:
    x, added = randn(2, 5, 30), randn(2, 5, 7, seed=1)
    a, b = randn(3, 4, 30, seed=2), randn(3, 7, 4, seed=3)
    which = torch.tensor([1, wrong], device=DEVICE)
    y = routed_low_rank.routed_low_rank.launch(x, a, b, which, added)
    assert y[1].isnan().all()
    assert not y[0].isnan().any()
    if DEVICE == "cpu":
        with pytest.raises(IndexError):
            OPS["routed_low_rank"].eager(x, a, b, which, added)
