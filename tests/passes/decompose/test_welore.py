from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program
from graphwright.passes.decompose.welore import Welore, below, find_threshold, normalize

CHAIN = ("text", [("decompose.welore", {"ratio": 0.6, "targets": ["kind:linear", "!head"]})])


def spectrum(seed: int, power: float, size: int = 48) -> torch.Tensor:
    """A matrix whose singular values fall as i^-power."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    return u * torch.arange(1.0, size + 1) ** -power @ v


def net(*weights: torch.Tensor) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data = weight.clone()
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers).eval()


def program(*weights: torch.Tensor) -> Program:
    torch.manual_seed(0)
    return gw.trace(net(*weights), (torch.randn(4, weights[0].shape[1]),))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_bisection_hits_the_ratio_within_one_rank(ratio: float) -> None:
    every = [normalize(torch.linalg.svdvals(spectrum(i, p))) for i, p in enumerate((0.1, 0.5, 2))]
    threshold = find_threshold(every, ratio)
    cut = sum(below(each, threshold) for each in every)
    assert abs(cut - ratio * 3 * 48) <= 1


def test_a_low_rank_matrix_is_told_from_an_orthogonal_one() -> None:
    torch.manual_seed(0)
    low = torch.randn(48, 4) @ torch.randn(4, 48)
    flat = torch.linalg.qr(torch.randn(48, 48)).Q
    result = Welore(ratio=0.45).run(program(low, flat), Context())
    told = {action.layer: action for action in result.actions}
    assert told["0"].what.startswith("rank ")
    assert result.program.state["0.v.weight"].shape[0] in range(4, 6)
    assert not told["2"].changed
    assert "0 of 48 are below" in told["2"].reason  # 0 / 0 is no tail


def test_the_error_of_a_matrix_is_its_tail_and_factors_are_balanced() -> None:
    weight = spectrum(1, 1.0)
    made = Welore(ratio=0.7)(program(weight))
    v, u = (made.state[f"0.{part}.weight"].detach().double() for part in "vu")
    tail = torch.linalg.svdvals(weight.double())[v.shape[0] :].norm()
    torch.testing.assert_close((weight.double() - u @ v).norm(), tail, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(u.t() @ u, v @ v.t(), rtol=1e-4, atol=1e-5)
    x = torch.randn(4, 48)
    merged = torch.tanh(x @ (u @ v).float().t() + made.state["0.bias"].detach())
    torch.testing.assert_close(made(x).detach(), merged, rtol=1e-5, atol=1e-5)


def test_non_uniform_ranks_beat_uniform_ones_of_the_same_sum() -> None:
    weights = [spectrum(i, power) for i, power in enumerate((0.6, 1.0, 2.0))]
    values = [torch.linalg.svdvals(weight.double()) for weight in weights]
    normalized = [normalize(s) for s in values]
    threshold = find_threshold(normalized, 0.75)
    kept = [48 - below(each, threshold) for each in normalized]

    def lost(ranks: list[int]) -> float:
        pairs = zip(values, ranks, strict=True)
        return sum(float(s[r:].square().sum() / s.square().sum()) for s, r in pairs)

    even, rest = divmod(sum(kept), 3)
    uniform = [even + (i < rest) for i in range(3)]
    assert sum(uniform) == sum(kept)
    assert max(kept) > 2 * min(kept)
    assert lost(kept) < lost(uniform)


def test_tuning_moves_the_factors_alone() -> None:
    torch.manual_seed(0)
    flat = torch.linalg.qr(torch.randn(48, 48)).Q
    made = Welore(ratio=0.4)(program(spectrum(1, 1.5), flat))
    assert set(made.trainable()) == {"0.v.weight", "0.u.weight"}
    data = [(torch.randn(4, 48), torch.randint(0, 48, (4,))) for _ in range(5)]
    tuned = gw.passes.tune.Finetune(tune={"steps": 5})(made, training=data)
    for name, before in made.parameters().items():
        assert torch.equal(before, tuned.state[name]) == (name not in made.trainable()), name


def test_both_rules_for_wide_matrices() -> None:
    torch.manual_seed(0)
    wide = (spectrum(1, 0.7) @ torch.randn(48, 480)) / 20
    given = program(wide)
    with pytest.raises(ModelError, match="no matrix is low-rank"):
        Welore(ratio=0.3)(given)
    made = Welore(ratio=0.3, rule="break_even")(given)
    rank = made.state["0.v.weight"].shape[0]
    assert 24 < rank < 48 * 480 / (48 + 480)
    assert set(Welore(ratio=0.3, rule="break_even", freeze=False)(given).trainable()) == {
        "0.v.weight", "0.u.weight", "0.bias"}  # fmt: skip
