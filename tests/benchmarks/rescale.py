"""Steps of gradient descent in front of and behind a downscaler, on scikit-learn's photographs.

    python tests/benchmarks/rescale.py

A pair that halves the sides of 32 x 32 pieces is trained on the upper halves of two photographs and
measured on the lower ones, stored in 8 bits: three draws of pieces and of initial weights.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import _paths  # noqa: F401
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import graphwright as gw

SIDE, TRAIN, TEST, STEPS = 32, 256, 64, 400
ROWS = {
    "the pair": (0, 0),
    "4 behind": (0, 4),
    "8 behind": (0, 8),
    "2 in front": (2, 0),
    "2 in front, 4 behind": (2, 4),
}


def pieces(count: int, lower: bool, g: torch.Generator) -> Tensor:
    """Pieces of the upper or of the lower halves, [count, 3, SIDE, SIDE] in [0, 1]."""
    photographs = [
        torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images
    ]
    found = []
    for index in range(count):
        image = photographs[index % len(photographs)]
        half = image.shape[1] // 2
        row = int(torch.randint(half - SIDE, (1,), generator=g)) + half * lower
        column = int(torch.randint(image.shape[2] - SIDE, (1,), generator=g))
        found.append(image[:, row : row + SIDE, column : column + SIDE])
    return torch.stack(found)


class Down(nn.Module):
    """A quarter of the pixels, by a mean and a learned part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) + self.second(F.relu(self.first(F.pixel_unshuffle(x, 2))))


class Up(nn.Module):
    """All pixels again, by repetition and a learned part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.last = nn.Conv2d(24, 12, 3, padding=1)

    def forward(self, y: Tensor) -> Tensor:
        more = self.last(F.relu(self.second(F.relu(self.first(y)))))
        return F.interpolate(y, scale_factor=2.0, mode="nearest") + F.pixel_shuffle(more, 2)


def trained(x: Tensor, g: torch.Generator) -> tuple[Down, Up]:
    """A pair, trained together by the squared error."""
    down, up = Down(), Up()
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=2e-3)
    for _ in range(STEPS):
        batch = x[torch.randint(len(x), (16,), generator=g)]
        optimizer.zero_grad()
        (up(down(batch)) - batch).square().mean().backward()
        optimizer.step()
    return down.eval().requires_grad_(False), up.eval().requires_grad_(False)


def psnr(made: Tensor, x: Tensor) -> float:
    """Mean over images, in dB."""
    return float((-10 * (made.clamp(0, 1) - x).square().mean((1, 2, 3)).log10()).mean())


def draw(seed: int, folder: Path) -> dict[str, float]:
    """PSNR by row, of one draw."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    down, up = trained(pieces(TRAIN, False, g), g)
    x = pieces(TEST, True, g)
    small = F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)
    small = (255 * small.clamp(0, 1)).round() / 255
    found = {"bicubic both ways": psnr(F.interpolate(small, scale_factor=2.0, mode="bicubic"), x)}
    program = gw.trace(down, (x[:2],), "batch")
    gw.trace(up, (program(x[:2]),), "batch").save(folder / "up.pt2")
    for name, (front, behind) in ROWS.items():
        made = gw.passes.resize.Rescale(up=str(folder / "up.pt2"), hr_steps=front, lr_steps=behind)(
            program, check=False
        )
        with torch.no_grad():
            found[name] = psnr(up(made(x)), x)
    return found


def main() -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        draws = [draw(seed, Path(folder)) for seed in range(3)]
    print("| encoder | PSNR of three draws, dB | gain over the pair, dB |")
    print("| --- | --- | --- |")
    for name in draws[0]:
        values = ", ".join(f"{d[name]:.2f}" for d in draws)
        gains = ", ".join(f"{d[name] - d['the pair']:+.2f}" for d in draws)
        print(f"| {name} | {values} | {gains} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
