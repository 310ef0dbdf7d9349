"""Blind spots: gradients that are exactly zero in the middle and nowhere else in reach."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ModelError

CHAIN = ("filter", [("insert.blind_spot", {})])


class Denoiser(nn.Module):
    """The published form at toy width: two branches of plain convolutions, joined by pointwise."""

    def __init__(self, width: int = 4, skip: bool = False) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, width, 1)
        self.first = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2) for k in (3, 5))
        self.deep = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
                          nn.Conv2d(width, width, 1)) for _ in range(2)
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(2 * width)
        self.out = nn.Conv2d(2 * width, 2, 1)
        self.skip = skip

    def forward(self, image: Tensor) -> Tensor:
        x = F.silu(self.enter(image))
        found = []
        for first, deep in zip(self.first, self.deep, strict=True):
            y = F.silu(first(x))
            found.append(y + deep(y))
        y = self.out(self.norm(torch.cat(found, 1)))
        return y + image if self.skip else y


def denoiser(**options: bool) -> gw.Program:
    torch.manual_seed(0)
    free = {"image": {0: "batch", 2: "height", 3: "width"}}
    return gw.trace(Denoiser(**options).eval(), (torch.randn(2, 2, 12, 13),), free)


def seen(program: gw.Program, place: tuple[int, int], size: tuple[int, int] = (15, 14)) -> Tensor:
    """(height, width): where the output at a place depends on the image."""
    image = torch.randn(1, 2, *size, requires_grad=True)
    output = program.run_flat((image,))[0]
    (gradient,) = torch.autograd.grad(output[:, :, *place].square().sum(), image)
    return gradient.abs().sum((0, 1))


@cache
def both() -> tuple[gw.Program, gw.Program]:
    """A denoiser, and what is made of it."""
    plain = denoiser()
    return plain, gw.passes.insert.BlindSpot()(plain)


@pytest.mark.parametrize("place", [(7, 6), (0, 0), (14, 5)])
def test_a_place_does_not_see_itself_and_sees_its_neighbours(place: tuple[int, int]) -> None:
    plain, blind = both()
    gradient = seen(blind, place)
    assert gradient[place] == 0
    assert seen(plain, place)[place] > 0
    row, column = place
    for i in range(max(0, row - 1), min(15, row + 2)):
        for j in range(max(0, column - 1), min(14, column + 2)):
            assert (gradient[i, j] > 0) == ((i, j) != place)


def test_dilations_are_those_of_the_paper() -> None:
    _, blind = both()
    found = {
        str(node.args[1].target): list(node.args[5])
        for node in blind.graph.nodes
        if node.target is torch.ops.aten.conv2d.default and len(node.args) > 5
        and node.args[1].op == "get_attr" and max(node.args[1].meta["val"].shape[2:]) > 1
    }  # fmt: skip
    assert found == {"deep.0.0.weight": [2, 2], "deep.1.0.weight": [3, 3]}


def test_taken_away_the_weights_have_their_middle_again() -> None:
    plain, blind = both()
    again = gw.passes.insert.BlindSpot(blind=False)(blind)
    assert seen(again, (7, 6))[7, 6] > 0
    assert set(again.state) == set(plain.state)
    for name, tensor in plain.state.items():
        assert torch.equal(tensor, again.state[name])
    with pytest.raises(ModelError, match="no masks to take away"):
        gw.passes.insert.BlindSpot(blind=False)(again)


def test_the_mask_is_a_kernel_without_its_middle() -> None:
    plain, blind = both()
    weight = plain.state["first.1.weight"].detach().clone()
    weight[:, :, 2, 2] = 0
    masked = dict(blind.state)
    masked["first.1.weight"] = nn.Parameter(weight)
    image = torch.randn(1, 2, 9, 9)
    assert torch.equal(blind.replace(state=masked)(image), blind(image))


def test_training_keeps_it_blind_and_the_middle_as_it_was() -> None:
    _, blind = both()
    x = torch.randn(8, 2, 10, 10)
    data = [{"image": x, "labels": x}]
    tune = {"epochs": 2, "lr": 0.01, "loss": "mse"}
    tuned = gw.passes.tune.Finetune(tune=tune)(blind, training=data)
    assert seen(tuned, (7, 6))[7, 6] == 0
    moved = (tuned.state["first.0.weight"] - blind.state["first.0.weight"]).abs()
    assert moved[:, :, 0, 0].max() > 0
    assert moved[:, :, 1, 1].max() == 0


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_artifacts_have_plain_convolutions_and_stay_blind(backend: str, tmp_path: Path) -> None:
    _, blind = both()
    x = torch.randn(2, 2, 11, 12)
    small = gw.passes.quantize.Int8(activations="static")(blind, calibration=[{"image": x}])
    for program, bound in ((blind, 1e-5), (small, 2e-2)):
        found, wanted = gw.lower(program, backend)(x).detach(), program(x).detach()
        assert (found - wanted).norm() < bound * wanted.norm()
    changed = x.clone()
    changed[:, :, 5, 5] += 3
    compiled = gw.lower(blind, backend)
    assert torch.equal(compiled(changed)[:, :, 5, 5], compiled(x)[:, :, 5, 5])
    if backend == "onnxruntime":
        stored_kernels = gw.passes.cleanup.FoldConstants()(blind)
        gw.lower(stored_kernels, backend).save(tmp_path)
        graph = onnx.load(tmp_path / "model.onnx").graph
        stored = {value.name for value in graph.initializer}
        convolutions = [node for node in graph.node if "Conv" in node.op_type]
        assert convolutions
        assert all(node.input[1] in stored for node in convolutions)


def test_what_would_see_its_pixel_is_refused() -> None:
    with pytest.raises(ModelError, match="brings it back with a dilation"):
        gw.passes.insert.BlindSpot(dilate=False)(denoiser())
    with pytest.raises(ModelError, match="beside every masked convolution"):
        gw.passes.insert.BlindSpot()(denoiser(skip=True))
    with pytest.raises(ModelError, match="would see its own pixel"):
        gw.passes.insert.BlindSpot(targets=["first.0"])(denoiser())
    with pytest.raises(ModelError, match="blind already"):
        gw.passes.insert.BlindSpot()(both()[1])


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image) * image.mean((2, 3), keepdim=True)


def test_what_mixes_places_is_refused() -> None:
    program = gw.trace(Pooled().eval(), (torch.randn(1, 1, 6, 6),))
    with pytest.raises(ModelError, match="mixes places"):
        gw.passes.insert.BlindSpot()(program)
