"""resize.neumeta: P48's smooth order, its coordinates, and widths that training never saw."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from models import digits
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.channels import cut, permute
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.passes.resize import Neumeta
from graphwright.passes.resize._manifold.coordinates import coordinates, encode
from graphwright.passes.resize._manifold.layout import last_units, layouts
from graphwright.passes.resize._manifold.learning import Learning
from graphwright.passes.resize._manifold.manifold import load_manifold
from graphwright.passes.resize._manifold.smoothing import distances, path_length, short_path
from graphwright.passes.resize.neumeta import chosen_groups

CHAIN = (
    "text",
    [
        (
            "resize.neumeta",
            {
                "targets": ["up"],
                "hidden": 8,
                "frequencies": 2,
                "draws": 2,
                "tune": {"epochs": 1, "lr": 0.001, "loss": "teacher_mse"},
            },
        )
    ],
)


class Plain(nn.Module):
    """No skips: what a layer lacks, nothing brings past it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.second = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))


@cache
def trained() -> gw.Program:
    torch.manual_seed(0)
    model = Plain()
    x, labels, *_ = digits.data()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(12):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
    return digits.traced(model.eval())


def neumeta(**options: object) -> Neumeta:
    small = {"hidden": 48, "layers": 3, "frequencies": 4, "draws": 8, "width": 0.5, "noise": 0.5,
             "reconstruction": 4.0}  # fmt: skip
    return Neumeta(**{**small, **options})


def test_coordinates_are_relative_positions_and_sizes() -> None:
    """By hand; and relative position 0.5 is the same point at two widths."""
    found = coordinates(1, 4, (6, 3, 5, 5))
    assert found.shape == (18, 6)
    expected = torch.tensor([1 / 4, 4 / 6, 2 / 3, 4 / 64, 6 / 64, 3 / 64])
    torch.testing.assert_close(found[4 * 3 + 2], expected)
    torch.testing.assert_close(coordinates(0, 2, (8,))[4, :3], coordinates(0, 2, (16,))[8, :3])
    generator = torch.Generator().manual_seed(0)
    noisy = coordinates(1, 4, (6, 3), 1.0, generator)
    shifted = noisy[:, 1] * noisy[:, 4] * 64 - torch.arange(6).repeat_interleave(3)
    assert float(shifted.abs().max()) <= 0.5 + 1e-5
    assert float(shifted.abs().max()) > 0.2


def test_encoding_equals_the_formula() -> None:
    points = torch.tensor([[0.25, 0.5]])
    flat = points[0].tolist()
    angles = [2**f * math.pi * v for f in range(3) for v in flat]
    expected = [*flat, *(math.sin(a) for a in angles), *(math.cos(a) for a in angles)]
    torch.testing.assert_close(encode(points, 3)[0], torch.tensor(expected), rtol=0, atol=2e-6)


def test_a_shuffled_line_is_put_in_order_again() -> None:
    order = np.random.default_rng(0).permutation(40)
    distance = np.abs(order[:, None] - order[None, :]).astype(float)
    path = [int(order[i]) for i in short_path(distance)]
    assert path in (list(range(40)), list(range(39, -1, -1)))


def test_the_order_is_smoother_and_the_function_the_same() -> None:
    program = trained()
    groups, _ = chosen_groups(program, ("*",), ())
    orders = {group: short_path(distances(group)) for group in groups}
    for group in groups:
        distance = distances(group)
        start = list(range(group.units))
        assert path_length(distance, orders[group]) < 0.98 * path_length(distance, start)
    moved = permute(program, orders)
    x = digits.data()[2][:50]
    torch.testing.assert_close(moved(x), program(x), rtol=1e-5, atol=1e-5)
    for name, dim in (("first.weight", 0), ("second.weight", 0), ("second.weight", 1)):
        before, after = (p.state[name].detach().diff(dim=dim).abs().sum() for p in (program, moved))
        assert after < before


def test_a_width_in_training_is_the_narrow_network(tmp_path: Path) -> None:
    """Zeros beyond the width and the cut program with the same tensors are one function."""
    program = trained()
    run = Context(training=digits.training(program), scope=("resize.neumeta",))
    neumeta(save=str(tmp_path / "m"), tune={"steps": 2}).execute(program, run)
    manifold = load_manifold(tmp_path / "m")
    groups, _ = chosen_groups(program, ("*",), ("residual",))
    base = permute(program, {g: manifold.orders[g.name] for g in groups})
    learning = Learning(manifold, base, groups, (0.5, 1.0), Context(), shown=0.5, decay=0.9,
                        norm=0.0, reconstruction=0.0)  # fmt: skip
    with torch.no_grad():
        whole = learning.on_parameters(None, {})  # type: ignore[arg-type]
        padded = base.replace(state={**base.state, **whole})
        narrow = cut(base, last_units(groups, 0.5))
        half = layouts(base, groups, list(manifold.networks), 0.5)
        made = {n: manifold.make(n, layout) for n, layout in half.items()}
        smaller = narrow.replace(state={**narrow.state, **made})
        x = digits.data()[2][:20]
        torch.testing.assert_close(padded(x), smaller(x), rtol=1e-5, atol=1e-5)
    assert smaller.state["second.weight"].shape == (8, 8, 3, 3)


def test_the_tensors_at_full_width_become_the_pretrained_ones(tmp_path: Path) -> None:
    """Only the distance to them is learned: the loss has a zero gradient."""
    program = trained()
    source = "def silent(outputs, batch):\n    return outputs.sum() * 0\n"
    (tmp_path / "silent_loss.py").write_text(source)
    options = {"widths": (1.0,), "width": 1.0, "noise": 0.0, "draws": 1, "average": 0.0,
               "weight_norm": 0.0, "frequencies": 6, "targets": ("first",)}  # fmt: skip

    def shift(steps: int) -> float:
        tune = {"steps": steps, "lr": 1e-2, "loss": "silent_loss:silent", "weight_decay": 0.0}
        run = Context(training=digits.training(program), scope=("resize.neumeta",),
                      folder=tmp_path)  # fmt: skip
        made = neumeta(**options, tune=tune).execute(program, run).program
        x = digits.data()[2]
        a, b = program(x).detach(), made(x).detach()
        return float((a - b).norm() / a.norm())

    assert shift(500) < 0.15 < 0.5 < shift(1)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[gw.Program, Path]:
    program = trained()
    path = tmp_path_factory.mktemp("manifold") / "m.safetensors"
    run = Context(training=digits.training(program), scope=("resize.neumeta",))
    chosen = neumeta(save=str(path), widths=(0.5, 0.75, 1.0), tune={"epochs": 40, "lr": 3e-3})
    return chosen.execute(program, run).program, path


def test_widths_that_training_never_saw(learned: tuple[gw.Program, Path]) -> None:
    """Better than the same width of the trained network, whose last channels are cut off."""
    program = trained()
    small, path = learned
    assert digits.accuracy(small) > 0.8
    groups, _ = chosen_groups(program, ("*",), ("residual",))
    for width in (0.5625, 0.625, 0.875):
        made = gw.passes.resize.Resample(manifold=str(path), width=width, draws=8)(program)
        assert made.state["second.weight"].shape[0] == round(16 * width)
        cut_off = cut(program, last_units(groups, width))
        assert digits.accuracy(made) > max(0.8, digits.accuracy(cut_off))


def test_draws_without_jitter_are_one(learned: tuple[gw.Program, Path]) -> None:
    manifold = load_manifold(learned[1])
    quiet = replace(manifold, noise=0.0)
    groups, _ = chosen_groups(trained(), ("*",), ("residual",))
    shape = layouts(trained(), groups, ["second.weight"], 0.75)["second.weight"]
    one = quiet.sample("second.weight", shape, 1, torch.Generator())
    torch.testing.assert_close(quiet.sample("second.weight", shape, 5, torch.Generator()), one)
    several = manifold.sample("second.weight", shape, 5, torch.Generator().manual_seed(0))
    assert not torch.allclose(several, one)


def test_both_artifacts_are_the_small_network(learned: tuple[gw.Program, Path]) -> None:
    x = digits.data()[2][:5]
    for backend in ("onnxruntime", "triton"):
        artifact = gw.lower(learned[0], backend)
        torch.testing.assert_close(
            torch.as_tensor(artifact(x)), learned[0](x).detach(), rtol=1e-4, atol=1e-4
        )


def test_a_batch_norm_is_refused() -> None:
    program = digits.traced(digits.vgg().eval())
    data: Batches = digits.training(program)
    with pytest.raises(ModelError, match=r"batch norm .* is left"):
        neumeta()(program, training=data)


def test_widths_beyond_those_of_training_are_refused() -> None:
    with pytest.raises(ArgumentError, match="beyond which a manifold says nothing"):
        Neumeta(width=0.25)
