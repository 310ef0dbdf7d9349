"""P31's contrast beside plain training of a super-resolver, on scikit-learn's two photographs, x2.

    python tests/benchmarks/contrastive_sr.py [--seeds 3] [--steps 400]

The network and the patches of `issp_sr.py`, from fresh weights, the same number of optimizer steps
for every row. Prints PSNR in dB over held-out patches, and the energy in the outputs' high Haar
bands as a share of that in the photographs', mean and standard deviation over seeds (of weights and
data order).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time

import torch
from issp_sr import BATCH, Net, photographs
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.passes.tune._images.bands import high_bands
from graphwright.passes.tune.contrastive_sr import ContrastiveSr
from graphwright.passes.tune.finetune import Finetune

TUNE = {"optimizer": "adam", "lr": 2e-3, "schedule": "cosine"}


def measured(made: Tensor, wanted: Tensor) -> tuple[float, float]:
    """PSNR in dB, and the share of high-frequency energy in percent."""
    psnr = -10 * math.log10(float((made.clamp(0, 1) - wanted).square().mean()))
    energy = [float(high_bands(x).square().mean()) for x in (made, wanted)]
    return psnr, 100 * energy[0] / energy[1]


def one_seed(seed: int, steps: int) -> dict[str, tuple[float, float]]:
    """What is measured, by the name of the row."""
    (small, large), (shown, wanted) = photographs()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(small), generator=generator)[: len(small) // BATCH * BATCH]
    data = [(small[rows], large[rows]) for rows in order.split(BATCH)]
    torch.manual_seed(seed)
    free = {"x": {0: "batch", 2: "height", 3: "width"}}
    plain = gw.trace(Net().eval(), (small[:2],), free)
    context = Context(training=data, seed=seed)
    tune = {**TUNE, "steps": steps}
    rows: dict[str, gw.Program] = {
        "`tune.finetune`, mean absolute difference": Finetune(
            tune={**tune, "loss": "issp_sr:l1"}
        ).execute(plain, context).program
    }  # fmt: skip
    for form in ("cross_entropy", "ratio"):
        for factor in (0.1, 1.0):
            step = ContrastiveSr(form=form, factor=factor, embedding={"width": 16}, tune=tune)
            rows[f"`form: {form}`, `factor: {factor:g}`"] = step.execute(plain, context).program
    bicubic = nn.functional.interpolate(shown, scale_factor=2, mode="bicubic")
    found = {"bicubic": measured(bicubic, wanted)}
    with torch.no_grad():
        return found | {name: measured(p(shown), wanted) for name, p in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    seeds = [one_seed(seed, given.steps) for seed in range(given.seeds)]
    print("| row | PSNR dB | high frequencies % |\n| --- | ---: | ---: |")
    for row in seeds[0]:
        columns = list(zip(*(found[row] for found in seeds), strict=True))
        shown = [f"{statistics.mean(c):.2f} ± {statistics.stdev(c) if len(c) > 1 else 0.0:.2f}"
                 for c in columns]  # fmt: skip
        print(f"| {row} | {shown[0]} | {shown[1]} |")
    print(f"\n{time.process_time() - begin:.0f} s of processor time")


if __name__ == "__main__":
    sys.exit(main())
