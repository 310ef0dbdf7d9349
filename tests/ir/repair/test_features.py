"""prune.udfc, the repair `features`: mixtures that are fitted to Gaussian activations."""

from __future__ import annotations

import pytest
import torch
from models.udfc_pair import Pair, channels, ran, traced
from torch import Tensor

import graphwright as gw
from graphwright.ir.channels import channel_groups
from graphwright.ir.repair.chains import Chain, find_chain
from graphwright.ir.repair.closed_form import (
    Channels,
    feature_candidates,
    gaussian_activations,
)
from graphwright.ir.repair.walk import _affine


def shifted(seed: int) -> gw.Program:
    """A pair that reads what a ReLU gave, of mean 1: its norm's running means are far from zero."""
    torch.manual_seed(seed)
    model = Pair(24)
    model.norm.momentum = None
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.normal_(0, 0.3)
        model.train()(torch.randn(64, 3, 10, 10) + 1.0)
    return traced(model)


@pytest.mark.parametrize("rounded", [False, True])
def test_features_are_the_least_squares_fit_of_activations(rounded: bool) -> None:
    c, share = channels(rounded), 0.02

    def stream() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    ((name, found),) = feature_candidates(c, torch.relu, share, stream())
    assert name == "features 0.02"
    whole, damaged = gaussian_activations(c, torch.relu, stream())
    strength = (share * len(whole) * damaged.square().mean()) ** 0.5
    a = torch.cat([damaged, strength * torch.eye(6).double()])
    b = torch.cat([whole, strength * c.nothing])
    wanted = torch.linalg.lstsq(a, b).solution
    if not rounded:
        wanted[:, c.kept] = torch.eye(6).double()
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_gaussian_pre_activations_are_what_the_batch_norm_says() -> None:
    """Mean beta, deviation |gamma|, correlated as the filters; offsets are not the means."""
    program = shifted(0)
    group = next(g for g in channel_groups(program) if g.prunable)
    chain = find_chain(program, group, program.state)
    assert isinstance(chain, Chain)
    weight = program.state["a.weight"].detach().double().flatten(1)
    gain, offsets, deviations, means = _affine(program, program.state, chain, weight)
    beta, gamma = program.state["norm.bias"].detach(), program.state["norm.weight"].detach()
    torch.testing.assert_close(means, beta.double())
    torch.testing.assert_close(deviations, gamma.abs().double())
    assert float((offsets - means).abs().max()) > 0.5
    filters = weight * gain[:, None]
    c = Channels(filters, offsets, deviations, torch.arange(24), filters, means)
    z, _ = gaussian_activations(c, lambda x: x, torch.Generator().manual_seed(0), 20000)
    assert float(((z.mean(0) - means) / deviations).abs().max()) < 0.05
    torch.testing.assert_close(z.std(0), deviations, rtol=0.05, atol=0)
    torch.testing.assert_close(torch.corrcoef(z.T), cosines(filters), rtol=0, atol=0.05)


def cosines(rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=1, keepdim=True)
    return unit @ unit.T


def test_features_beat_mixtures_of_filters_behind_an_activation() -> None:
    x = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(9)) + 1.0
    errors: dict[str, list[float]] = {}
    for seed in range(4):
        program = shifted(seed)
        for repair in ("none", "ridge", "nonneg", "features", "auto"):
            result = ran(program, ratio=0.4, repair=repair).program
            with torch.no_grad():
                gap = (result(x) - program(x)).norm() / program(x).norm()
            errors.setdefault(repair, []).append(float(gap))
    mean = {repair: sum(values) / len(values) for repair, values in errors.items()}
    assert mean["features"] < 0.95 * min(mean["ridge"], mean["nonneg"])
    assert all(a < b for a, b in zip(errors["features"], errors["none"], strict=True))
    assert mean["auto"] <= 1.02 * mean["features"]
