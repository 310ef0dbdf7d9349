"""N:M training recipes on a small vision transformer and scikit-learn's digits, at 1:8.

    python tests/benchmarks/nm_vit.py [--seeds 3] [--epochs 20]

Every recipe trains the same fresh transformer for the same steps; the weights of attention and
feed-forward layers end in the pattern. Prints the accuracy on held-out images and the loss on the
training images, mean and standard deviation over seeds (of weights and order of the data).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import digits

import graphwright as gw
from graphwright.passes.prune.nm import Nm
from graphwright.passes.tune.finetune import Finetune

N, M = 1, 8
FINETUNE = 0.2
TARGETS = ("*.qkv", "*.out", "*.up", "*.down")
DEPTH = 2
TUNE = {"lr": 3e-3, "warmup": 20, "weight_decay": 0.01, "clip_norm": 1.0}


def recipes(steps: int) -> dict[str, dict[str, Any]]:
    """Options by the name of the row; decays are over when the fine-tuning begins."""
    span = steps * (1 - FINETUNE)
    exponential = {"decay": "exponential", "decay_rate": 10 / span}
    linear = {"decay": "linear", "decay_rate": 1 / span}
    return {
        "SR-STE": {"method": "sr_ste"},
        "STE": {"method": "ste"},
        "MdGf exponential": {"method": "mask_decay", **exponential},
        "MdGf linear": {"method": "mask_decay", **linear},
        "MdGf exponential, g unscaled": {"method": "mask_decay", **exponential, "grad": "ste"},
        "SdGf stepwise": {"method": "structure_decay"},
        "SdGf geometric": {"method": "structure_decay", "structure": "geometric"},
        "combined": {"method": "combined", **exponential},
    }


def vit(seed: int) -> torch.nn.Module:
    """Fresh weights in the shared transformer, with fewer layers."""
    model: Any = digits.vit()
    model.layers = model.layers[:DEPTH]
    return digits.reset(model, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    x, labels, _, _ = digits.data()
    steps = given.epochs * (len(x) // digits.BATCH)
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in range(given.seeds):
        fresh = digits.traced(vit(seed))
        data = digits.training(fresh)
        tune = {**TUNE, "epochs": given.epochs}
        for name, options in {"dense": None, **recipes(steps)}.items():
            step: gw.Pass = Finetune(tune=tune)
            if options is not None:
                share = {} if options["method"] in ("ste", "sr_ste") else {"finetune": FINETUNE}
                step = Nm(n=N, m=M, targets=TARGETS, **options, **share, tune=tune)
            trained = step(fresh, training=data, seed=seed, check=False)
            with torch.no_grad():
                loss = float(torch.nn.functional.cross_entropy(trained(x), labels))
            rows.setdefault(name, []).append((100 * digits.accuracy(trained), loss))
    print(f"{N}:{M}, {steps} steps, {given.seeds} seeds\n")
    print("| recipe | accuracy % | training loss |\n| --- | ---: | ---: |")
    for name, results in rows.items():
        accuracies, losses = zip(*results, strict=True)
        print(f"| {name} | {_spread(accuracies, 2)} | {_spread(losses, 4)} |")
    print(f"\n{time.process_time() - begin:.0f} s of processor time")


def _spread(values: tuple[float, ...], digits_shown: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits_shown}f} ± {deviation:.{digits_shown}f}"


if __name__ == "__main__":
    main()
