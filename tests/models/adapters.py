"""Programs that adapters are put into, and what every adapter is held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import graphwright as gw
from graphwright.ir.program import Program


class Layers(nn.Module):
    """A linear layer, convolutions of two ranks, and a stored matrix that is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv1d(8, 8, 3, stride=2, padding=2, dilation=2)
        self.deep = nn.Conv2d(1, 8, (3, 1), padding="same")
        self.wide = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), bias=False)
        self.fc = nn.Linear(8, 12)
        self.turned = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(x).relu().unsqueeze(1)
        x = self.wide(self.deep(x).relu()).mean(1).transpose(1, 2)
        return self.fc(x).relu() @ self.turned


def layers_program() -> Program:
    """A program of every kind of product, with a free batch."""
    torch.manual_seed(0)
    example = torch.randn(3, 8, 10)
    program: Program = gw.trace(Layers().eval(), {"x": example}, dynamic={"x": {0: "batch"}})
    return program


def moved(adapted: Program, seed: int = 1, size: float = 0.3) -> Program:
    """The program with other values in all that can be trained."""
    torch.manual_seed(seed)
    state: dict[str, Any] = dict(adapted.state)
    for name, p in adapted.trainable().items():
        state[name] = nn.Parameter(p.detach() + size * torch.randn_like(p))
    return adapted.replace(state=state)


def check_merge(before: Program, adapted: Program, inputs: torch.Tensor) -> Program:
    """Moves an adapter, merges it, and compares: values, nodes, names, trainable parameters."""
    changed = moved(adapted)
    with torch.no_grad():
        wanted = changed(inputs)
        plain = before(inputs)
        assert float((wanted - plain).norm()) > 0.02 * float(plain.norm())
        merged: Program = gw.passes.adapt.Merge()(changed)
        torch.testing.assert_close(merged(inputs), wanted, rtol=1e-4, atol=1e-5)
    names = [[node.name for node in p.graph.nodes] for p in (before, merged)]
    assert names[0] == names[1]
    assert set(merged.state) == set(before.state)
    assert set(merged.trainable()) == set(before.trainable())
    return merged


def gradients(program: Program, *inputs: torch.Tensor, **named: torch.Tensor) -> dict[str, Any]:
    """Gradients of the sum of squares, by parameter."""
    for p in program.parameters().values():
        p.grad = None
    given = [*inputs, *(named[s.name] for s in program.signature.inputs if s.name in named)]
    program.module(*given)[0].square().sum().backward()
    return {n: p.grad for n, p in program.parameters().items() if p.grad is not None}


def made_ids(
    seeds: dict[str, torch.Tensor], count: int, random: torch.Generator
) -> dict[str, torch.Tensor]:
    """Token ids below 32 in the shape of the seeds, as a generator of adapt.transfer."""
    return {"ids": torch.randint(0, 32, (count, seeds["ids"].shape[1]), generator=random)}
