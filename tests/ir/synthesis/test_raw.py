"""P68's way from RGB to a sensor's values, back again by a pipeline written here."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.synthesis.raw import (
    atoms,
    drawn_camera,
    inverse_tone,
    mixed,
    mosaic,
    to_raw,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_rgb(raw: torch.Tensor, camera) -> torch.Tensor:
    """Gains, inverse matrix, gamma, tone curve: the camera's own direction."""
    balanced = raw * camera.gains.view(-1, 1, 1)
    linear = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(camera.colours), balanced)
    encoded = linear ** (1 / 2.2)
    return 3 * encoded**2 - 2 * encoded**3


@pytest.mark.parametrize("seed", range(5))
def test_the_camera_undoes_it(seed):
    """Grey-ish colours in the middle: nothing of them is clipped on the way."""
    x = 0.3 + 0.3 * torch.rand(2, 1, 4, 4, dtype=torch.float64, generator=generator(seed))
    x = x + 0.05 * torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=generator(seed + 9))
    camera = drawn_camera(generator(seed))
    raw = to_raw(x, camera)
    assert float(raw.min()) > 0
    assert float(raw.max()) < 1
    assert torch.allclose(to_rgb(raw, camera), x, atol=1e-4)


def test_weights_on_one_atom_are_that_atom():
    matrices, gains = atoms()
    for index in range(4):
        one = torch.eye(4, dtype=torch.float64)[index]
        camera = mixed(one, one)
        assert torch.equal(camera.colours, matrices[index])
        assert torch.equal(camera.gains, gains[index])


def test_rows_of_every_mixture_sum_to_1():
    for seed in range(10):
        camera = drawn_camera(generator(seed))
        assert torch.allclose(camera.colours.sum(1), torch.ones(3, dtype=torch.float64))
        assert bool((camera.gains > 0).all())


def test_gains_and_matrix_are_one_matrix():
    camera = drawn_camera(generator(1))
    x = 0.3 + 0.1 * torch.rand(1, 3, 4, 4, dtype=torch.float64, generator=generator())
    linear = inverse_tone(x) ** 2.2
    folded = camera.colours / camera.gains[:, None]
    expected = torch.einsum("ij,bjhw->bihw", folded, linear)
    assert torch.allclose(to_raw(x, camera), expected, atol=1e-6)


def test_the_tone_curve_and_its_inverse():
    x = torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    y = inverse_tone(x)
    assert torch.allclose(3 * y**2 - 2 * y**3, x, atol=1e-6)


def test_a_mosaic_keeps_every_sensors_own_colour():
    x = torch.rand(2, 3, 4, 6, generator=generator())
    whole, packed = mosaic(x, 1), mosaic(x, 4)
    assert whole.shape == (2, 1, 4, 6)
    assert packed.shape == (2, 4, 2, 3)
    pattern = ((0, 1), (1, 2))  # red green, green blue
    for i in range(4):
        for j in range(6):
            colour = pattern[i % 2][j % 2]
            assert torch.equal(whole[:, 0, i, j], x[:, colour, i, j])
            plane = 2 * (i % 2) + j % 2
            assert torch.equal(packed[:, plane, i // 2, j // 2], x[:, colour, i, j])
