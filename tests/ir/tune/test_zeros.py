"""Masks through training: zeros stay, and count in nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import tune_net as lab
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches
from graphwright.ir.tune import TuneOptions, tune

Data = Callable[[int], Batches]


def masked(program: gw.Program, share: float = 0.75, *names: str) -> gw.Program:
    """The program with the smallest weights set to zero."""
    state = dict(program.state)
    for name in names or ("conv.weight", "fc.weight"):
        w = state[name].detach()
        limit = w.abs().flatten().kthvalue(int(share * w.numel())).values
        state[name] = nn.Parameter(w * (w.abs() > limit))
    return program.replace(state=state)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "mfac"])
def test_zeros_stay_and_the_rest_trains(program: gw.Program, data: Data, optimizer: str) -> None:
    pruned = masked(program)
    options = TuneOptions(
        steps=8, lr=0.01, optimizer=optimizer, weight_decay=0.1, fisher_gradients=4
    )
    tuned = tune(pruned, data(8), options, Context())
    for name in ("conv.weight", "fc.weight"):
        before, after = pruned.state[name], tuned.program.state[name]
        assert torch.equal(after == 0, before == 0), f"{name} has other zeros"
        assert not torch.equal(after, before)
        assert tuned.history.zeros[name] == pytest.approx(0.75, abs=0.05)
    assert set(tuned.history.zeros) == {"conv.weight", "fc.weight"}
    assert (tuned.program.state["norm.bias"] != 0).all(), "biases start at zero and train"


def test_equals_a_plain_loop_with_masked_gradients(program: gw.Program, data: Data) -> None:
    """Clipping included: the norm of the gradients is that of the weights that are there."""
    pruned = masked(program)
    options = TuneOptions(epochs=2, lr=0.01, optimizer="adam", clip_norm=0.05, shuffle=False,
                          schedule="constant")  # fmt: skip
    tuned = tune(pruned, data(8), options, Context())
    model = lab.fresh().train()
    model.load_state_dict(pruned.state, strict=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    keep = {n: p.detach() != 0 for n, p in model.named_parameters() if p.dim() > 1}
    x, labels = lab.images()
    for _ in range(2):
        for rows in torch.arange(48).split(8):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows]).backward()
            for name, p in model.named_parameters():
                if name in keep:
                    p.grad *= keep[name]
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(tuned.program.state[name], p, rtol=1e-5, atol=1e-6)


def test_auto_tells_a_mask_from_a_dense_weight(program: gw.Program, data: Data) -> None:
    def zeros(program: gw.Program, **options) -> set[str]:
        tuned = tune(program, data(8), TuneOptions(steps=2, **options), Context())
        return set(tuned.history.zeros)

    assert zeros(program) == set()
    assert zeros(masked(program), keep_zeros=False) == set()
    state = dict(program.state)
    state["fc.weight"] = nn.Parameter(torch.zeros_like(state["fc.weight"]))
    empty = program.replace(state=state)
    assert zeros(empty) == set(), "a weight that begins at zero is there to be trained"
    assert zeros(empty, keep_zeros=True) == {"fc.weight"}
    assert zeros(masked(empty, 0.5, "conv.weight")) == {"conv.weight"}
    single = dict(program.state)
    single["fc.weight"] = nn.Parameter(single["fc.weight"].detach().clone())
    single["fc.weight"].data[0, 0] = 0.0  # one of 192
    lonely = program.replace(state=single)
    assert zeros(lonely) == set()
    assert zeros(masked(lonely, 0.5, "conv.weight")) == {"conv.weight", "fc.weight"}


def test_mfac_leaves_zeros_out_of_its_window(program: gw.Program, data: Data) -> None:
    """A window over dense gradients steps otherwise, and takes four times the memory."""
    from graphwright.ir.tune.optimizers import make_optimizer

    pruned = masked(program)
    parameters = {n: p for n, p in pruned.state.items() if isinstance(p, nn.Parameter)}
    options = TuneOptions(optimizer="mfac", fisher_gradients=4)
    optimizer = make_optimizer(parameters, options, ("conv.weight", "fc.weight"))
    left = sum(
        int((p != 0).sum()) if n in ("conv.weight", "fc.weight") else p.numel()
        for n, p in parameters.items()
    )
    assert optimizer.window.gradients.shape == (4, left)
