"""The resampling front end: the image at the start, the published mixture of four, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.modules.resampler import Resampler

CHAIN = ("conv", [("insert.resampler", {"width": 2, "blocks": 1})])


def module(seed: int = 0) -> Resampler:
    """Away from its start, with shifts of a pixel or so."""
    torch.manual_seed(seed)
    made = Resampler(3, 4, 1).double()
    with torch.no_grad():
        made.colour.last.weight.normal_(0, 0.1)
        made.sampler.last.weight.normal_(0, 0.5)
    return made


def published(made: Resampler, image: Tensor, shift: Tensor) -> Tensor:
    """The image function as published: corner after corner, nearest features by grid_sample,
    nine features unfolded into one vector, areas of the opposite corners."""
    batch, _, height, width = image.shape

    def coordinates(n: int) -> Tensor:
        return -1 + (2 * torch.arange(n, dtype=image.dtype) + 1) / n

    grid = torch.stack(torch.meshgrid(coordinates(height), coordinates(width), indexing="ij"), -1)
    coord = grid.reshape(1, -1, 2) + shift
    features = made.encoder((image - 0.5) / 0.5)
    unfolded = F.unfold(features, 3, padding=1).view(batch, -1, height, width)
    weight = made.colour.features.weight.flatten(1)
    predictions, areas = [], []
    size = torch.tensor([height, width], dtype=image.dtype)
    for down in (-1, 1):
        for right in (-1, 1):
            at = coord + torch.tensor([down, right]) / size + 1e-6
            at = at.clamp(-1 + 1e-6, 1 - 1e-6)

            def nearest(values: Tensor, at: Tensor = at) -> Tensor:
                found = F.grid_sample(values, at.flip(-1).unsqueeze(1), mode="nearest",
                                      align_corners=False)  # fmt: skip
                return found[:, :, 0].mT

            places = grid.permute(2, 0, 1)[None].expand(batch, -1, -1, -1)
            way = (coord - nearest(places)) * size
            h = nearest(unfolded) @ weight.T + made.colour.features.bias
            h = torch.relu(h + torch.cat([way, 2 * torch.ones_like(way)], -1)
                           @ made.colour.place.weight.T)  # fmt: skip
            for layer in made.colour.hidden:
                h = torch.relu(layer(h))
            predictions.append(made.colour.last(h) + nearest(image))
            areas.append((way[..., 0] * way[..., 1]).abs() + 1e-9)
    total = sum(areas)
    result = sum(
        p * (a / total).unsqueeze(-1) for p, a in zip(predictions, reversed(areas), strict=True)
    )
    return result.mT.reshape(image.shape)


def test_inside_the_image_it_is_the_published_function() -> None:
    """On an image that is not square; the border, where the released code differs, left out."""
    made = module()
    image = torch.rand(2, 3, 9, 12, dtype=torch.float64)
    shift = 0.3 * (torch.rand(2, 108, 2, dtype=torch.float64) - 0.5)
    found, wanted = made.read(image, shift), published(made, image, shift)
    torch.testing.assert_close(
        found[:, :, 2:-2, 2:-2], wanted[:, :, 2:-2, 2:-2], rtol=1e-6, atol=1e-6
    )


def test_without_shift_and_change_it_is_the_image() -> None:
    image = torch.rand(2, 3, 7, 5)
    assert torch.equal(Resampler(3, 4, 1)(image), image)


def test_the_result_is_continuous_across_pixels() -> None:
    made = module()
    image = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    edge = torch.full((1, 36, 2), 0.25 / 3, dtype=torch.float64)  # a quarter of a pixel
    to_border = edge * 4  # places on the next pixel's own centre
    before, behind = made.read(image, to_border - 1e-9), made.read(image, to_border + 1e-9)
    torch.testing.assert_close(before, behind, rtol=1e-5, atol=1e-6)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.silu(self.conv(image)).mean((2, 3)))


def classifier(size: bool = True) -> gw.Program:
    """With a free image size, or with a free batch alone."""
    torch.manual_seed(0)
    free = {"image": {0: "batch", **({2: "height", 3: "width"} if size else {})}}
    return gw.trace(Classifier().eval(), (torch.rand(2, 3, 10, 8),), free)


def moved(program: gw.Program) -> gw.Program:
    g = torch.Generator().manual_seed(3)
    state: dict[str, Any] = dict(program.state)
    for name, scale in (("colour", 0.1), ("sampler", 0.3)):
        key = f"resampler.{name}.last.weight"
        value = scale * torch.randn(state[key].shape, generator=g)
        state[key] = nn.Parameter(value, requires_grad=state[key].requires_grad)
    return program.replace(state=state)


def test_it_starts_as_the_network_at_every_size() -> None:
    before = classifier()
    made = gw.passes.insert.Resampler(width=4, blocks=1)(before)
    for shape in ((1, 3, 9, 13), (3, 3, 12, 6)):
        image = torch.rand(shape)
        torch.testing.assert_close(made(image), before(image), rtol=1e-6, atol=1e-6)


def test_the_sampler_alone_learns_where_that_is_asked_for() -> None:
    made = moved(gw.passes.insert.Resampler(width=4, blocks=1, trains="sampler", freeze=True)(
        classifier(size=False)
    ))  # fmt: skip
    assert made.trainable()
    assert all(name.startswith("resampler.sampler.") for name in made.trainable())
    made.run_flat((torch.rand(2, 3, 10, 8),))[0].square().sum().backward()
    gradients = {n: made.module.get_parameter(n).grad for n in made.trainable()}
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_artifacts_are_the_program_behind_pruning_and_int8(backend: str) -> None:
    made = moved(gw.passes.insert.Resampler(width=4, blocks=1)(classifier(backend != "triton")))
    image = torch.rand(2, 3, 10, 8)
    small = gw.passes.prune.Magnitude(sparsity=0.3)(made)
    small = gw.passes.quantize.Int8(activations="static")(small, calibration=[{"image": image}])
    for program, bound in ((made, 1e-4), (small, 3e-2)):
        found, wanted = gw.lower(program, backend)(image).detach(), program(image).detach()
        assert (found - wanted).norm() < bound * wanted.norm()
