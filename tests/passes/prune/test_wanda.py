"""prune.wanda: rows by |w| ||x||, on the activations that pruned layers give."""

import pytest
import torch
from models.masked_nets import error, images, mixed, tied, tokens

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError
from graphwright.passes.prune.magnitude import Magnitude
from graphwright.passes.prune.wanda import Wanda

CHAIN = ("text", [("prune.wanda", {"sparsity": 0.5})])


def chain(dims=(16, 12, 8)):
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(dims[0], dims[1]), torch.nn.ReLU(), torch.nn.Linear(dims[1], dims[2])
    ).eval()
    scale = torch.logspace(-1, 1, dims[0])[torch.randperm(dims[0])]
    batches = [(torch.randn(20, dims[0]) * scale,) for _ in range(4)]
    return gw.trace(net, batches[0], dynamic={"input": {0: "batch"}}), batches


def test_masks_follow_the_formula_layer_after_layer():
    program, batches = chain()
    pruned = Wanda(sparsity=0.5)(program, calibration=batches)
    x = torch.cat([b[0] for b in batches]).double()
    for name in ("0", "2"):
        w = program.state[f"{name}.weight"].detach()
        score = w.double().abs() * x.square().sum(0).sqrt()
        expected = w.clone()
        for r in range(len(w)):
            expected[r, score[r].argsort()[: w.shape[1] // 2]] = 0
        assert torch.equal(pruned.state[f"{name}.weight"], expected)
        x = torch.relu(x @ expected.double().T + program.state[f"{name}.bias"].double())


def test_convolutions_are_rows_of_windows():
    dense, batches = mixed(), images()
    pruned = Wanda(sparsity=0.5, targets=["conv"])(dense, calibration=batches)
    x = torch.cat([b[0] for b in batches])
    windows = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 36)
    w = dense.state["conv.weight"].detach().flatten(1)
    score = w.abs() * windows.double().square().mean(0).sqrt().float()
    lost = score.argsort(1)[:, :18]
    expected = w.scatter(1, lost, 0.0).reshape(8, 4, 3, 3)
    assert torch.equal(pruned.state["conv.weight"], expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_outputs_are_nearer_than_by_magnitude(pattern):
    program, batches = chain((64, 48, 32))
    wanda = Wanda(pattern=pattern)(program, calibration=batches)
    magnitude = Magnitude(pattern=pattern)(program)
    assert error(program, wanda, batches) < error(program, magnitude, batches)


def test_every_row_keeps_its_share_and_kept_weights_their_bits():
    dense = mixed()
    result = Wanda(sparsity=0.6).execute(dense, Context(calibration=images()))
    for name in ("conv", "grouped", "fc1", "fc2"):
        old, new = (p.state[f"{name}.weight"].detach().flatten(1) for p in (dense, result.program))
        assert bool(((new == 0).sum(1) == int(old.shape[1] * 0.6)).all())
        assert torch.equal(new[new != 0], old[new != 0])
    assert result.metrics["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert {a.layer for a in result.actions} == {"conv", "grouped", "fc1", "fc2"}


def test_padding_tokens_do_not_count():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(8, 4)

        def forward(self, x, attention_mask):
            return self.fc(x) * attention_mask.unsqueeze(-1)

    torch.manual_seed(2)
    x, mask = torch.randn(2, 6, 8), torch.ones(2, 6)
    mask[:, 4:] = 0
    loud = x.clone()
    loud[:, 4:] = 1e3 * torch.randn(2, 2, 8)
    program = gw.trace(Masked().eval(), (x, mask))
    quiet = Wanda()(program, calibration=[(x, mask)])
    same = Wanda()(program, calibration=[(loud, mask)])
    assert torch.equal(quiet.state["fc.weight"], same.state["fc.weight"])


def test_dead_inputs_go_first():
    program, batches = chain()
    dead = [(b[0] * (torch.arange(16) >= 8),) for b in batches]
    w = Wanda(sparsity=0.5)(program, calibration=dead).state["0.weight"]
    assert bool((w[:, :8] == 0).all())
    assert bool((w[:, 8:] != 0).all())


def test_a_tied_embedding_is_left_alone():
    result = Wanda().execute(tied(), Context(calibration=tokens()))
    assert {a.layer: a.what for a in result.actions} == {
        "head": "left alone",
        "twice": "50.0% zeros",
    }


def test_it_needs_calibration_data():
    with pytest.raises(ArgumentError, match="needs calibration data"):
        Wanda()(mixed())
