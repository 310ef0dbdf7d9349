from __future__ import annotations

import pytest
import torch
from models import digits
from models.every_pass import TrunkNet, traced
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.graph.skips import find_skips
from graphwright.passes.fuse import SkipRemoval

TUNE = {"epochs": 1, "lr": 0.001, "loss": "teacher_mse"}
CHAIN = ("trunk", [("fuse.skip_removal", {"targets": ["blocks.0.2"], "tune": TUNE})])


def data(rows: int = 256) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(32, 6, generator=generator)} for _ in range(rows // 32)]


def test_the_result_is_the_network_without_the_chosen_sums() -> None:
    """Its own weights in the plain module without two of four skips give the same outputs."""
    made = SkipRemoval(targets=["blocks.1.2", "blocks.3.2"], tune=TUNE).execute(
        traced("trunk"), Context(training=data())
    )
    net = TrunkNet().eval()
    net.load_state_dict(made.program.state)
    x = torch.randn(5, 6)
    h = net.stem(x)
    for number, block in enumerate(net.blocks):
        h = block(h) + (0 if number in (1, 3) else h)
    torch.testing.assert_close(made.program(x), net.head(h), rtol=1e-5, atol=1e-6)
    assert made.metrics["skips_removed"] == 2
    assert len(find_skips(made.program)) == len(find_skips(traced("trunk"))) - 2
    assert set(made.program.state) == set(traced("trunk").state)


class Odd(nn.Module):
    """Sums with a factor, the skip in front and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor, with_skips: float = 1.0) -> torch.Tensor:
        x = torch.add(self.first(x), x, alpha=2) if with_skips else self.first(x)
        return torch.add(x, self.second(x), alpha=3) if with_skips else 3 * self.second(x)


def test_factors_of_sums_stay_with_the_body() -> None:
    net = Odd().eval()
    program = gw.trace(net, (torch.randn(4, 6),), {"x": {0: "batch"}})
    tune = {**TUNE, "lr": 1e-9, "steps": 1}
    made = SkipRemoval(tune=tune).execute(program, Context(training=data(32)))
    x = torch.randn(3, 6)
    torch.testing.assert_close(made.program(x), net(x, 0.0), rtol=1e-4, atol=1e-5)


def test_training_makes_up_for_the_skips() -> None:
    """Digits: without its identity skips an untuned net guesses, a tuned one does not."""
    model = digits.trained("resnet")
    program = digits.traced(model)
    layers = [skip.body[-1] for skip in find_skips(program) if not skip.projection]
    names = [la.name for la in gw.ir.layers.selectors.layers(program) if la.node in layers]
    training = digits.training(program)
    untuned, tuned = (
        SkipRemoval(targets=names, tune={"lr": lr, "steps": steps, "loss": "teacher_mse"})
        .execute(program, Context(training=training)).program
        for lr, steps in ((1e-9, 1), (2e-3, 40))
    )  # fmt: skip
    before, after = digits.accuracy(untuned), digits.accuracy(tuned)
    assert after > digits.accuracy(program) - 0.05
    assert before < after - 0.05
    adds = [n for n in tuned.graph.nodes if n.op == "call_function" and op_name(n) == "add"]
    assert len(adds) == len(find_skips(program)) - len(layers)


def test_a_net_without_skips_is_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    program = gw.trace(net, (torch.randn(4, 6),))
    with pytest.raises(ModelError, match="no skip that is added"):
        SkipRemoval(tune=TUNE).execute(program, Context(training=data(32)))
