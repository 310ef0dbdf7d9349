"""Few labelled digits: every sample by itself against the batch together, on raw pixels.

    python tests/benchmarks/transductive.py

Accuracy on the 500 held-out digits, labelled as one batch from 1 or 5 images of each class, three
draws of these: nearest prototype (no neighbours), and the transductive head's settings.
"""

from __future__ import annotations

from typing import Any

import _paths  # noqa: F401  puts tests/ on the path
import torch
import torch.nn.functional as F
from models import digits
from torch import Tensor

from graphwright.ir.modules.transductive import PrototypeAssignment

WAYS: dict[str, dict[str, Any]] = {
    "nearest prototype": {"weight": 0.0},
    "defaults": {},
    "`sharpness: 10`": {"sharpness": 10.0},
    "`refine: true`": {"refine": True},
    "both": {"sharpness": 10.0, "refine": True},
}


def accuracy(shots: int, seed: int, **settings: Any) -> float:
    x, y, x_test, y_test = digits.data()
    g = torch.Generator().manual_seed(seed)
    rows = []
    for k in range(10):
        of_class: Tensor = torch.nonzero(y == k)[:, 0]
        rows.append(of_class[torch.randperm(len(of_class), generator=g)[:shots]])
    support = x[torch.cat(rows)].flatten(1)
    mean = support.mean(0)
    sums = F.normalize(support - mean).unflatten(0, (10, shots)).sum(1)
    head = PrototypeAssignment(sums, torch.full((10,), float(shots)), mean, **settings)
    return float((head(x_test.flatten(1)).argmax(1) == y_test).float().mean())


def main() -> None:
    print("| labelled per class | " + " | ".join(WAYS) + " |")
    print("| --- " * (len(WAYS) + 1) + "|")
    for shots in (1, 5):
        cells = []
        for settings in WAYS.values():
            found = [100 * accuracy(shots, seed, **settings) for seed in range(3)]
            cells.append(f"{sum(found) / 3:.1f} ({min(found):.1f} to {max(found):.1f})")
        print(f"| {shots} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
