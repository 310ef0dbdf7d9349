"""P52's lights and noise against closed forms."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.synthesis.night import noise_of_iso, noisy, relit, spot
from graphwright.ir.synthesis.options import ShiftOptions


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, 6, 8, generator=generator(9))


def test_no_light_and_no_dimming_is_the_identity():
    options = ShiftOptions(dim=(1.0, 1.0), lights=0, saturated=0)
    x = image()
    assert torch.equal(relit(x, options, generator()), x)


@pytest.mark.parametrize("channels", [3, 4])
def test_the_one_light_that_is_everywhere_scales_channels(channels):
    colour, std = (0.9, 0.5, 0.3), (0.0, 0.0, 0.0)
    options = ShiftOptions(dim=(0.6, 0.6), lights=1, saturated=0, night_mean=colour, night_std=std)
    x = image(channels)
    places = [0, 1, 1, 2] if channels == 4 else [0, 1, 2]
    scale = torch.tensor(colour)[places].view(-1, 1, 1)
    assert torch.allclose(relit(x, options, generator()), 0.05 * 0.6 * scale * x, atol=1e-6)


def test_images_are_dimmed_by_a_factor_of_their_own():
    x = image()
    found = relit(x, ShiftOptions(lights=0, saturated=0), generator())
    factors = (found / x).flatten(1)
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-5)
    assert bool((factors[:, 0] >= 0.55).all())
    assert bool((factors[:, 0] <= 0.9).all())
    assert factors[0, 0] != factors[1, 0]


def test_several_lights_are_an_average_weighted_by_their_masks():
    """Colours that are all white and a dim image: the average lies between the weakest light, 0.05
    of the image, and the image; near the middle of a spot it is the image."""
    options = ShiftOptions(dim=(1.0, 1.0), lights=4, saturated=0, night_mean=(1.0, 1.0, 1.0),
                           night_std=(0.0, 0.0, 0.0))  # fmt: skip
    x = 0.5 * torch.ones(1, 3, 32, 32)
    found = relit(x, options, generator())
    assert float(found.min()) >= 0.05 * 0.5 - 1e-6
    assert 0.2 < float(found.max()) < 0.5


def test_saturated_lights_reach_white_and_nothing_is_above_it():
    x = image()
    found = relit(x, ShiftOptions(), generator())
    assert float(found.max()) == 1.0
    assert float(found.min()) >= 0.0


def test_the_mask_of_a_light_has_its_peak_at_1():
    for seed in range(20):
        mask = spot(24, 40, 1.0, generator(seed))
        assert float(mask.max()) == pytest.approx(1.0)
        assert float(mask.min()) >= 1e-7
        row, column = divmod(int(mask.argmax()), 40)
        assert 1 <= row <= 22
        assert 3 <= column <= 36


def test_the_variance_of_the_noise_is_a_line():
    """On a ramp with 4000 draws per value, by least squares in float64; away from the clipping."""
    shot, read = 0.004, 2e-4
    ramp = torch.linspace(0.15, 0.8, 40, dtype=torch.float64)
    found = noisy(ramp.expand(1, 1, 20000, 40), shot, read, generator())
    variance = found[0, 0].var(0)
    rows = torch.stack([ramp, torch.ones_like(ramp)], 1)
    fit = torch.linalg.lstsq(rows, variance[:, None]).solution[:, 0]
    assert float(fit[0]) == pytest.approx(shot, rel=0.05)
    assert float(fit[1]) == pytest.approx(read, rel=0.2)  # 5% of the line's value at its foot
    assert torch.allclose(rows @ fit, shot * ramp + read, rtol=0.05)
    assert torch.allclose(found[0, 0].mean(0), ramp, atol=3e-3)


def test_more_sensitivity_is_more_noise():
    assert noise_of_iso(1600)[0] == pytest.approx(0.004)
    assert noise_of_iso(3200)[0] == pytest.approx(0.008)
    assert noise_of_iso(3200)[1] > noise_of_iso(1600)[1] > 0


def test_the_same_seed_gives_the_same_night():
    x = image()
    first = relit(x, ShiftOptions(), generator(3))
    assert torch.equal(first, relit(x, ShiftOptions(), generator(3)))
    assert not torch.equal(first, relit(x, ShiftOptions(), generator(4)))
