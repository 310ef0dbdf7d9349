"""The curriculum of crops, and that views are what torchvision makes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphwright.ir.synthesis.options import SynthesisOptions
from graphwright.ir.synthesis.views import crop_box, jitter, least_area, view

PLAIN = SynthesisOptions(flip=False, jitter=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("curriculum", ["cosine", "linear"])
def test_the_curriculum_goes_from_the_whole_image_to_its_least(curriculum):
    found = [least_area(curriculum, t, 400, 0.5) for t in (0, 100, 200, 399)]
    assert found == pytest.approx([1.0, 0.54, 0.08, 0.08])


def test_a_step_stays_at_the_whole_image():
    found = [least_area("step", t, 10, 0.5) for t in range(10)]
    assert found == [1.0] * 5 + [0.08] * 5


def test_without_a_milestone_every_crop_may_be_small():
    assert least_area("cosine", 0, 10, 0.0) == 0.08


@pytest.mark.parametrize("low", [0.08, 0.5, 1.0])
@pytest.mark.parametrize("size", [(8, 8), (24, 32)])
def test_crops_lie_within_the_image_and_are_large_enough(low, size):
    height, width = size
    for seed in range(200):
        top, left, rows, columns = crop_box(height, width, low, generator(seed))
        assert 0 <= top <= height - rows
        assert 0 <= left <= width - columns
        # sides are rounded to whole pixels: half a pixel of either side
        least = (rows + 0.5) * (columns + 0.5)
        assert least >= low * height * width or (rows, columns) in ((height, width), size)


def test_the_areas_of_crops_are_uniform():
    """Of an image so large that hardly any draw is refused; by its mean and its quartiles."""
    low, areas = 0.1, []
    for seed in range(1500):
        _, _, rows, columns = crop_box(1000, 1000, low, generator(seed))
        areas.append(rows * columns / 1e6)
    small = torch.tensor([a for a in areas if a < 0.7])  # larger ones often do not fit
    below = float((small < 0.4).float().mean())
    assert abs(below - 0.5) < 3 * (0.25 / len(small)) ** 0.5


def test_a_view_of_the_whole_image_is_the_image():
    x = torch.randn(2, 3, 8, 8, generator=generator())
    boxes = [crop_box(8, 8, 1.0, generator(seed)) for seed in range(20)]
    seed = boxes.index((0, 0, 8, 8))
    assert torch.equal(view(x, 1.0, PLAIN, generator(seed)), x)


def test_a_view_is_the_crop_in_the_size_of_the_image():
    x = torch.randn(2, 3, 12, 12, generator=generator())
    top, left, rows, columns = crop_box(12, 12, 0.3, generator(5))
    part = x[:, :, top : top + rows, left : left + columns]
    expected = F.interpolate(part, (12, 12), mode="bilinear", antialias=True)
    assert torch.allclose(view(x, 0.3, PLAIN, generator(5)), expected)


def test_shifts_are_circular_and_flips_mirror():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    seen = set()
    for seed in range(150):
        found = view(x, 1.0, SynthesisOptions(jitter=2), generator(seed))
        for flipped in (False, True):
            for down in range(3):
                for right in range(3):
                    base = x.flip(-1) if flipped else x
                    if torch.equal(base.roll((down, right), (-2, -1)), found):
                        seen.add((flipped, down, right))
    assert len(seen) == 18


def test_gradients_flow_through_a_view():
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    view(x, 0.5, PLAIN, generator(3)).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())


def test_shifts_are_the_published_ones_when_none_are_asked_for():
    options = SynthesisOptions()
    assert [jitter(options, side, side) for side in (224, 64, 8)] == [32, 4, 0]
    assert jitter(SynthesisOptions(jitter=9), 64, 64) == 9
