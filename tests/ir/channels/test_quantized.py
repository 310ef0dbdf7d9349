"""Quantized weights and optimizer state are sliced with the channels they belong to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.channels import cut_tensors
from graphwright.ir.errors import ArgumentError
from graphwright.passes.prune.zig import Zig
from graphwright.passes.quantize.int8 import Int8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, o, 3, 1, 1) for i, o in ((3, 6), (6, 7), (7, 6)))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x)


def quantized(activations: str) -> tuple[Any, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    if activations == "static":
        data = [{"x": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(3)]
        program = gw.trace(Residual().eval(), (data[0]["x"],), dynamic="batch")
        return Int8(activations="static")(program, calibration=data), tuple(data[1].values())
    ids = torch.randint(0, 20, (3, 7), generator=generator)
    program = gw.trace(Mixer().eval(), (ids,), dynamic="batch")
    return Int8(activations="dynamic", embeddings=True)(program), (ids,)


@pytest.mark.parametrize(("activations", "units"), [("static", 6 + 7), ("dynamic", 8 + 12)])
def test_codes_and_scales_are_cut_together(activations: str, units: int) -> None:
    program, inputs = quantized(activations)
    free = [g for g in gw.channel_groups(program) if g.prunable]
    assert sum(g.units for g in free) == units
    draw = np.random.default_rng(0)
    picks = {g: draw.choice(g.units, g.units // 2, replace=False).tolist() for g in free}
    masked, smaller = gw.zero(program, picks), gw.cut(program, picks)
    expected, actual = masked(*inputs), smaller(*inputs)
    assert (expected - program(*inputs)).norm() > 1e-2 * expected.norm()
    assert (expected - actual).norm() <= 1e-6 * expected.norm()
    for name, tensor in smaller.state.items():
        if name.endswith("scale"):
            codes = smaller.state[name.removesuffix("scale") + "codes"]
            assert len(tensor) in codes.shape
    left = sum(t.numel() for t in smaller.state.values())
    assert left < 0.7 * sum(t.numel() for t in program.state.values())


def test_codes_around_a_zero_point_are_cut_or_kept_exactly() -> None:
    """A code of 0 is not the value 0 then, so a product of two such weights keeps its channels."""
    program, inputs = quantized("dynamic")
    editor = gw.Editor(program, by="test")
    for node in list(editor.graph.nodes):
        if "dequantize" in str(node.target):
            scale = editor.state[str(node.args[1].target)]
            points = torch.full(scale.shape, 3, dtype=torch.int8)
            name = editor.add_state(str(node.args[1].target) + "_points", points)
            editor.set_args(node, *node.args[:2], editor.get(name), node.args[3])
    shifted = editor.finish()
    groups = gw.channel_groups(shifted)
    assert any("no" in g.reason or "summed over" in g.reason for g in groups if not g.prunable)
    picks = {g: [0] for g in groups if g.prunable}
    if picks:
        expected, actual = gw.zero(shifted, picks)(*inputs), gw.cut(shifted, picks)(*inputs)
        assert torch.allclose(expected, actual, atol=1e-6)


def test_zig_scores_codes_by_what_they_stand_for() -> None:
    """Rows of the smallest weights go, although no parameter holds them any more."""
    torch.manual_seed(1)
    model = Residual().eval()
    with torch.no_grad():
        model.a.weight[[1, 4]] *= 1e-3
        model.a.bias[[1, 4]] *= 1e-3
        model.b.weight[:, [1, 4]] *= 1e-3
    data = [{"x": torch.randn(4, 3, 8, 8)} for _ in range(3)]
    program = gw.trace(model, (data[0]["x"],), dynamic="batch")
    program = Int8(activations="static")(program, calibration=data)
    smaller = Zig(sparsity=2 / 13)(program)
    kept = [t for n, t in smaller.state.items() if n.startswith("a.") and n.endswith("codes")]
    full = [t for n, t in program.state.items() if n.startswith("a.") and n.endswith("codes")]
    wanted = [0, 2, 3, 5, 6]
    assert all(torch.equal(k, f[wanted]) for k, f in zip(kept, full, strict=True))


def test_adam_goes_on_after_a_cut_as_if_the_rest_had_never_been() -> None:
    """Steps of the smaller model equal the kept part of steps of the masked one."""
    torch.manual_seed(2)
    model, x = Residual().eval().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    program = gw.trace(model, (x,), dynamic="batch")
    parameters = program.parameters()
    optimizer = torch.optim.Adam(list(parameters.values()), lr=0.01)
    _step(program, optimizer, x)
    free = [g for g in gw.channel_groups(program) if g.prunable]
    picks = {g: list(range(0, g.units - 1, 2)) for g in free}
    smaller = own(gw.cut(program, picks))
    state = {name: optimizer.state[p] for name, p in parameters.items()}
    new = torch.optim.Adam(list(smaller.parameters().values()), lr=0.01)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        given = {name: entry[key] for name, entry in state.items()}
        for name, value in cut_tensors(program, picks, given).items():
            p = smaller.state[name]
            assert value.shape in (p.shape, ())
            new.state[p][key] = value.clone()
    masked = gw.zero(program, picks)
    for name, p in masked.parameters().items():
        twin = parameters[name]
        if p is not twin:
            optimizer.state[p] = optimizer.state.pop(twin)
    optimizer.param_groups[0]["params"] = list(masked.parameters().values())
    _step(masked, optimizer, x)
    _step(smaller, new, x)
    expected = cut_tensors(program, picks, masked.parameters())
    for name, p in smaller.parameters().items():
        torch.testing.assert_close(expected[name], p, rtol=1e-6, atol=1e-9)


def own(program: Any) -> Any:
    """With parameters that no other program shares."""
    return program.replace(
        state={n: torch.nn.Parameter(t.detach().clone()) for n, t in program.state.items()}
    )


def _step(program: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    with torch.enable_grad():
        program(x).square().mean().backward()
    optimizer.step()


def test_tensors_that_are_no_parameter_are_refused() -> None:
    program, _ = quantized("dynamic")
    groups = [g for g in gw.channel_groups(program) if g.prunable]
    with pytest.raises(ArgumentError, match="no tensor nothing"):
        cut_tensors(program, {groups[0]: [0]}, {"nothing": torch.zeros(3)})
    with pytest.raises(ArgumentError, match=r"has shape \(3,\)"):
        cut_tensors(program, {groups[0]: [0]}, {"norm.weight": torch.zeros(3)})
