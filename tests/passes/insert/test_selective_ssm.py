"""The projector: the network at the start, the published recurrence when trained, one Scan each."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.modules.selective_ssm import ProjectorBranch, SelectiveScan
from graphwright.ir.ops.selective_scan import recurrence

CHAIN = ("conv", [("insert.selective_ssm", {"states": 4})])


class Classifier(nn.Module):
    """Two convolutions, a global average, a head."""

    def __init__(self, keep: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1) if keep else None
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.one(x))))
        return self.head(x.mean((2, 3)) if self.pool is None else self.pool(x).flatten(1))


def classifier(keep: bool = False) -> gw.Program:
    torch.manual_seed(0)
    return gw.trace(Classifier(keep).eval(), (torch.randn(2, 3, 11, 9),), {"x": {0: "batch"}})


def moved(program: gw.Program) -> gw.Program:
    """As training would leave it: every inserted tensor is somewhere else."""
    g = torch.Generator().manual_seed(3)
    state = {
        name: nn.Parameter(t + 0.2 * torch.randn(t.shape, generator=g))
        if name.startswith("projector.") else t
        for name, t in program.state.items()
    }  # fmt: skip
    return program.replace(state=state)


@pytest.mark.parametrize(("keep", "block"), [(False, "ss2d"), (True, "mamba")])
def test_both_branches_start_as_the_network(keep: bool, block: str) -> None:
    before = classifier(keep)
    base = gw.passes.insert.SelectiveSsm(states=6, rank=3, block=block)(before)
    both = gw.passes.insert.SelectiveSsm(states=6, rank=3, block=block, branch="new")(base)
    x = torch.randn(3, 3, 11, 9)
    torch.testing.assert_close(both(x), before(x), rtol=1e-5, atol=1e-6)
    # the gate's half is what keeps the new branch silent: moved, it speaks
    gate = "projector.new.block.in_proj.weight"
    heard = both.replace(state={**both.state, gate: nn.Parameter(both.state[gate] + 0.1)})
    assert (heard(x) - before(x)).abs().max() > 1e-3


def by_hand(module: ProjectorBranch, feature: Tensor) -> Tensor:
    """The branch from its published description, with the sequential recurrence."""
    first, norm, _, last = module.mlp_proj
    x = F.leaky_relu(norm(first(feature)), 0.1)
    tokens = last(x).permute(0, 2, 3, 1) + module.pos_embed
    block = module.block
    width = tokens.shape[-1]
    both = tokens @ block.in_proj.weight.T
    x, z = both[..., :width], both[..., width:]
    x = F.silu(block.conv(x.permute(0, 3, 1, 2)))  # (B, C, H, W)
    total = torch.zeros_like(x)
    for index, scan in enumerate(block.scans):
        turned = x if index < 2 else x.mT
        sequence = turned.flatten(2).mT
        if index % 2:
            sequence = sequence.flip(1)
        y = scanned(scan, sequence)
        if index % 2:
            y = y.flip(1)
        y = y.mT.reshape(turned.shape)
        total = total + (y if index < 2 else y.mT)
    y = block.out_norm(total.permute(0, 2, 3, 1))
    return (y * F.silu(z)).flatten(1, 2).mean(1)


def scanned(scan: SelectiveScan, u: Tensor) -> Tensor:
    rank = scan.dt_proj.in_features
    states = scan.a_log.shape[1]
    found = u @ scan.x_proj.weight.T
    delta = F.softplus(found[..., :rank] @ scan.dt_proj.weight.T + scan.dt_proj.bias)
    b, c = found[..., rank : rank + states], found[..., rank + states :]
    return recurrence(u, delta, -scan.a_log.exp(), b, c) + scan.skip * u


def test_a_branch_is_its_description_in_float64() -> None:
    torch.manual_seed(1)
    module = ProjectorBranch(5, 4, 3, 6, states=7, rank=2).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    feature = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(module(feature), by_hand(module, feature), rtol=1e-9, atol=1e-10)


def test_time_steps_start_between_their_bounds() -> None:
    scan = SelectiveScan(500, 4, 3)
    steps = F.softplus(scan.dt_proj.bias).detach()
    assert 0.00099 < float(steps.min()) < 0.002
    assert 0.05 < float(steps.max()) < 0.101
    torch.testing.assert_close(-scan.a_log.exp()[0].detach(), -torch.arange(1.0, 5.0))


def test_the_new_branch_sends_no_gradient_into_the_network() -> None:
    base = gw.passes.insert.SelectiveSsm(states=4)(classifier())
    both = moved(gw.passes.insert.SelectiveSsm(states=4, branch="new")(base))
    x = torch.randn(2, 3, 11, 9)
    # the derivative of the output alone: linear in it, so that the new branch's value has no part
    one = both.module.get_parameter("one.weight")
    (with_new,) = torch.autograd.grad(both.run_flat((x,))[0].sum(), one)
    without = base.replace(state={**base.state, **{n: both.state[n] for n in base.state}})
    one = without.module.get_parameter("one.weight")
    (expected,) = torch.autograd.grad(without.run_flat((x,))[0].sum(), one)
    torch.testing.assert_close(with_new, expected)


def test_freezing_leaves_the_branch_to_learn() -> None:
    made = gw.passes.insert.SelectiveSsm(states=4, freeze=True)(classifier())
    assert made.trainable()
    assert all(name.startswith("projector.") for name in made.trainable())


def test_artifacts_are_the_program_behind_pruning_and_int8(tmp_path: Path) -> None:
    made = moved(gw.passes.insert.SelectiveSsm(states=4, rank=2)(classifier(keep=True)))
    x = torch.randn(5, 3, 11, 9)
    pruned = gw.passes.prune.Magnitude(sparsity=0.3)(made)
    small = gw.passes.quantize.Int8()(pruned, calibration=[{"x": x}])
    for program in (made, small):
        for backend in ("onnxruntime", "triton"):
            compiled = gw.lower(program, backend)
            wanted = program(x).detach()
            torch.testing.assert_close(compiled(x).detach(), wanted, rtol=2e-3, atol=2e-3)
    gw.lower(made, "onnxruntime").save(tmp_path)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Scan") == 4  # a direction each


def test_what_it_cannot_take_is_said() -> None:
    with pytest.raises(ModelError, match="no projector to add a branch to"):
        gw.passes.insert.SelectiveSsm(branch="new")(classifier())
    base = gw.passes.insert.SelectiveSsm(states=4)(classifier())
    with pytest.raises(ModelError, match="a projector already"):
        gw.passes.insert.SelectiveSsm(states=4)(base)
    free = gw.trace(
        Classifier().eval(), (torch.randn(2, 3, 11, 9),), {"x": {0: "batch", 2: "h", 3: "w"}}
    )
    with pytest.raises(ModelError, match="free height or width"):
        gw.passes.insert.SelectiveSsm()(free)
    plain = gw.trace(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    with pytest.raises(ModelError, match="0 global averages"):
        gw.passes.insert.SelectiveSsm()(plain)
