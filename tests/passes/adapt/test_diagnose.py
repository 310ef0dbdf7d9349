from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.passes.adapt._math.taylor_attention import (
    approximate_gradients,
    exact_gradients,
    feature_count,
    features,
    needed_degree,
)
from graphwright.passes.adapt.diagnose import crossing_factor
from graphwright.passes.base import Context, Result

CHAIN = ("text", [("adapt.diagnose", {})])


def drawn(length: int, width: int, largest: float) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of the output, float64, with scores of that size at most."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(length, width, generator=generator).double() for _ in range(4))
    k = k - k.mean(0)
    factor = math.sqrt(largest / float((q @ k.T).abs().max()))
    return q * factor, k * factor, v, g


def test_features_are_the_series_and_keep_its_bound() -> None:
    q, k, _, _ = drawn(40, 3, 1.7)
    scores = q @ k.T
    for degree in range(6):
        f = features(q, degree), features(k, degree)
        assert f[0].shape == (40, feature_count(3, degree))
        series = sum(scores**t / math.factorial(t) for t in range(degree + 1))
        torch.testing.assert_close(f[0] @ f[1].T, series)
        bound = 1.7 ** (degree + 1) / math.factorial(degree + 1) * math.exp(1.7)
        assert float((series - scores.exp()).abs().max()) <= bound
    degree = needed_degree(1.7, 1e-3)
    rest = [1.7 ** (g + 1) / math.factorial(g + 1) * math.exp(1.7) for g in (degree - 2, degree)]
    assert degree % 2 == 0
    assert rest[1] <= 1e-3 < rest[0]


# largest score; error of the gradient of queries for series of degree 1, 2, 3 and 5, L = 256, d = 4
TABLE = {
    0.26: (2.8e-3, 1.5e-4, 8e-6, 1e-8), 0.77: (1.4e-2, 2e-3, 3e-4, 4e-6),
    1.74: (0.15, 3.7e-2, 1.5e-2, 9e-4),
}  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("largest", TABLE)
def test_the_chain_of_low_rank_products_nears_autograd(largest: float, causal: bool) -> None:
    given = drawn(256, 4, largest)
    exact = exact_gradients(*given, causal=causal)
    before = [float("inf")] * 4
    for degree, known in zip((1, 2, 3, 5), TABLE[largest], strict=True):
        near = approximate_gradients(*given, degree, causal=causal)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(near, exact, strict=True)]
        assert all(now < then for now, then in zip(errors, before, strict=True))
        assert errors[1] < 3 * known
        before = errors


def test_the_mean_key_changes_no_probability_and_work_grows_with_the_length() -> None:
    q, k, v, g = drawn(64, 4, 1.0)
    moved = exact_gradients(q, k + 3.0, v, g)
    for a, b in zip(moved, exact_gradients(q, k, v, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    work = {}
    for length in (256, 1024):
        given = drawn(length, 4, 0.5)
        for name, run in (("near", lambda g=given: approximate_gradients(*g, 2)),
                          ("exact", lambda g=given: exact_gradients(*g))):  # fmt: skip
            with FlopCounterMode(display=False) as counter:
                run()
            work[name, length] = counter.get_total_flops()
    assert work["near", 1024] == 4 * work["near", 256]
    assert work["exact", 1024] == 16 * work["exact", 256]


def test_a_crossing_is_the_nearest_one() -> None:
    assert crossing_factor(lambda s: 0.25 * s, 1.0) == pytest.approx(4.0)
    assert crossing_factor(lambda s: 0.5 + 4 * s, 1.0) == pytest.approx(0.125)
    assert crossing_factor(lambda s: 2.0, 1.0) is None
    assert crossing_factor(lambda s: 0.5, 1.0) is None


class Attention(nn.Module):
    """One attention of narrow heads."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        with torch.no_grad():
            for layer in (self.q, self.k):
                layer.weight.mul_(size)
                layer.bias.mul_(size)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(f(x).unflatten(-1, (4, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)


def traced(size: float, length: int) -> tuple[Attention, Program, torch.Tensor]:
    torch.manual_seed(0)
    net, x = Attention(size).eval(), torch.randn(2, length, 8)
    return net, gw.trace(net, {"x": x}, dynamic={"x": {0: "batch", 1: "length"}}), x


def diagnosed(program: Program, x: torch.Tensor, **options: Any) -> Result:
    made = gw.passes.adapt.Diagnose(**options)
    result: Result = made.run(program, Context(calibration=[{"x": x}]))
    assert result.program is program
    return result


def test_the_norms_are_those_of_the_heads() -> None:
    net, program, x = traced(1.0, 12)
    result = diagnosed(program, x)
    q, k, _ = (t.detach() * 2**-0.25 for t in net.heads(x))
    k = k - k.mean(-2, keepdim=True)
    rho = float(max(q.abs().max(), k.abs().max())) / math.sqrt(math.log(12))
    assert result.metrics["largest_rho"] == pytest.approx(rho, rel=1e-5)
    score = float((q @ k.transpose(-1, -2)).abs().max())
    assert f"largest score {score:.3g}" in result.actions[0].what
    assert "without" not in result.actions[0].what


def test_the_crossing_factor_brings_rho_to_the_limit() -> None:
    _, program, x = traced(0.3, 12)
    lora = gw.passes.adapt.Lora(rank=2, targets=["q"])(program)

    def scaled(factor: float) -> Program:
        state = dict(lora.state)
        name = "q.lora_b.default"
        b = 0.05 * torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
        state[name] = nn.Parameter(factor * b)
        return lora.replace(state=state)

    text = diagnosed(scaled(1.0), x).actions[0].what
    factor = float(text.split(", 1 at ")[1].split(" times")[0])
    assert factor > 1
    found = [diagnosed(scaled(f), x).metrics["largest_rho"] for f in (factor, 10 * factor)]
    assert found[0] == pytest.approx(1.0, rel=0.02)
    assert found[1] > 1
    without = diagnosed(program, x).metrics["largest_rho"]
    assert f"without the adapter rho {without:.3g}" in text


def test_it_runs_the_fast_gradient_where_it_may_and_says_why_it_may_not() -> None:
    _, program, x = traced(0.3, 200)
    result = diagnosed(program, x)
    assert result.metrics["fast_gradients"] == 1
    assert 0 < result.metrics["largest_gradient_error"] < 0.01
    assert "fast gradient of degree" in result.actions[0].reason
    few = diagnosed(program, x[:, :6])
    assert few.metrics["fast_gradients"] == 0
    assert "features, and there are 6 tokens" in few.actions[0].reason
    _, loud, x = traced(9.0, 50)
    assert diagnosed(loud, x).metrics["within_limit"] == 0
    assert "rho is above 1" in diagnosed(loud, x).actions[0].reason
    plain = gw.trace(nn.Linear(8, 8), {"input": torch.ones(2, 8)})
    with pytest.raises(ModelError, match="has no scaled dot product attention"):
        gw.passes.adapt.Diagnose()(plain, calibration=[{"input": torch.ones(2, 8)}])
