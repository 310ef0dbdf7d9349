"""A denoiser of scikit-learn's digits: a U-Net of v predictions, trained on a CPU in minutes.

python tests/models/digit_denoiser.py        # trains it, once; kept under out/models/
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from models import digits

import graphwright as gw
from graphwright.ir.sampling.schedule import NoiseSchedule

NONE = 10
"""The label of no digit."""

STEPS, BATCH, LR, DROPPED = 2500, 64, 3e-3, 0.15
SCHEDULE = NoiseSchedule(beta_schedule="squaredcos_cap_v2")
FILE = digits.CACHE / "digit_denoiser.pt"


class Block(nn.Module):
    """Two convolutions, told the step and the label, with a sum past them."""

    def __init__(self, inputs: int, outputs: int, told: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(i, outputs, 3, padding=1) for i in (inputs, outputs))
        self.norm = nn.GroupNorm(4, outputs)
        self.told = nn.Linear(told, outputs)
        self.short = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        h = nn.functional.silu(self.norm(self.first(x)) + self.told(at)[:, :, None, None])
        return self.short(x) + self.second(h)


class DigitDenoiser(nn.Module):
    """8x8 images in [-1, 1] at three sizes; returns v."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        told = 4 * width
        self.label = nn.Embedding(NONE + 1, told)
        self.time = nn.Sequential(nn.Linear(32, told), nn.SiLU(), nn.Linear(told, told))
        self.enter = Block(1, width, told)
        self.down = Block(width, 2 * width, told)
        self.deep = Block(2 * width, 2 * width, told)
        self.up = Block(4 * width, 2 * width, told)
        self.leave = Block(3 * width, width, told)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(16, device=sample.device) * (-math.log(1000.0) / 15))
        waves = timestep[:, None] * rates
        at = self.time(torch.cat([waves.sin(), waves.cos()], 1)) + self.label(label)
        x1 = self.enter(sample, at)
        x2 = self.down(nn.functional.avg_pool2d(x1, 2), at)
        x3 = self.deep(nn.functional.avg_pool2d(x2, 2), at)
        u2 = self.up(torch.cat([nn.functional.interpolate(x3, scale_factor=2.0), x2], 1), at)
        u1 = self.leave(torch.cat([nn.functional.interpolate(u2, scale_factor=2.0), x1], 1), at)
        return self.last(nn.functional.silu(u1))


def images() -> tuple[Tensor, Tensor]:
    """All training images in [-1, 1], and their labels."""
    x, labels, _, _ = digits.data()
    return 2 * x - 1, labels


def trained() -> nn.Module:
    """The denoiser, trained the first time that it is asked for."""
    model = DigitDenoiser()
    if FILE.is_file():
        model.load_state_dict(torch.load(FILE))
        return model.eval()
    torch.manual_seed(0)
    model = DigitDenoiser()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    x, labels = images()
    table = torch.from_numpy(SCHEDULE.alphas_cumprod()).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    g = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=g)
        t = torch.randint(len(table), (BATCH,), generator=g)
        noise = torch.randn(BATCH, 1, 8, 8, generator=g)
        dropped = torch.rand(BATCH, generator=g) < DROPPED
        told = torch.where(dropped, NONE, labels[rows])
        a, s = (level.sqrt()[:, None, None, None] for level in (table[t], 1 - table[t]))
        out = model(a * x[rows] + s * noise, t.float(), told)
        loss = (out - (a * noise - s * x[rows])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(model)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    torch.save(average.module.state_dict(), FILE)
    model.load_state_dict(average.module.state_dict())
    return model.eval()


def traced(model: nn.Module) -> gw.Program:
    """It behind sample.denoiser, with a free batch."""
    inputs = {
        "sample": torch.randn(4, 1, 8, 8),
        "timestep": torch.tensor([900.0, 500.0, 100.0, 7.0]),
        "label": torch.tensor([0, 3, 9, 5]),
    }
    program = gw.trace(
        model, inputs, {name: {0: "batch"} for name in inputs},
        ranges={"label": (0, NONE + 1), "timestep": (0, 1000)},
    )  # fmt: skip
    return gw.passes.sample.Denoiser(
        parameterization="v", schedule=SCHEDULE.model_dump(mode="json"),
        grid={"spacing": "trailing"}, solver="dpmpp_2m", unconditional={"label": NONE},
    )(program)  # fmt: skip


if __name__ == "__main__":
    trained()
