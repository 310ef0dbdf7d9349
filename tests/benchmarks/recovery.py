"""Accuracy that training gives back to a pruned and to a quantized digits net, recipe by recipe.

    python tests/benchmarks/recovery.py [--net resnet] [--seeds 3] [--epochs 6] [--images 256]

Accuracy on 500 held-out images in percent, mean and range over seeds (another net each). All
recipes have the same images, batches and steps. `pruned` sets 80% of the convolutions' weights to
zero; `2 bits` stores them as 2-bit codes, which stay, so that norms, biases and the last layer
learn. The second teacher of P33 is the net of the next seed. `--images` are trained on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import digits

from graphwright.ir.context import Context
from graphwright.passes.registry import find_pass

DAMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "pruned": ("prune.magnitude", {"sparsity": 0.8, "targets": ["kind:conv2d"]}),
    "2 bits": ("quantize.rtn", {"bits": 2, "block": 16, "targets": ["kind:conv2d"]}),
}
ADAM = {"lr": 2e-3}
SGD = {"optimizer": "sgd", "lr": 0.01}
P33 = {"discriminator": {"reduction": 3}, "teachers": ["reference", "second.pt2"], "tune": SGD}

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tune.finetune": ("tune.finetune", {"tune": ADAM}),
    "tune.distill": ("tune.distill", {"tune": ADAM}),
    "tune.distill with features": ("tune.distill", {"features": 1.0, "tune": ADAM}),
    "P33": ("tune.distill", P33),
    "P33 as released": (
        "tune.distill", {**P33, "discriminator": {"reduction": 3, "mode": "as_released"}},
    ),
}  # fmt: skip


def accuracies(net: str, seed: int, seeds: int, epochs: int, images: int) -> dict[str, float]:
    """Held-out accuracy in percent, by damage and recipe."""
    program = digits.traced(digits.trained(net, seed))
    found = {"trained": digits.accuracy(program)}
    with tempfile.TemporaryDirectory() as folder:
        second = digits.traced(digits.trained(net, (seed + 1) % seeds))
        second.save(Path(folder) / "second.pt2")
        context = Context(
            seed=seed, training=digits.training(program, images=images), teacher=program,
            folder=Path(folder),
        )  # fmt: skip
        for damage, (name, options) in DAMAGE.items():
            harmed = find_pass(name)(**options).execute(program, context).program
            found[damage] = digits.accuracy(harmed)
            for recipe, (step, given) in RECIPES.items():
                tune = {**given["tune"], "epochs": epochs}
                result = find_pass(step)(**{**given, "tune": tune}).execute(harmed, context)
                found[f"{damage}: {recipe}"] = digits.accuracy(result.program)
    return {what: 100 * value for what, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--net", default="resnet", choices=list(digits.NETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = [accuracies(given.net, seed, given.seeds, given.epochs, given.images)
            for seed in range(given.seeds)]  # fmt: skip

    def cell(what: str) -> str:
        values = [run[what] for run in runs]
        return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    print(f"The trained {given.net}: {cell('trained')}.\n")
    print(f"| behind it, {given.epochs} epochs | {' | '.join(DAMAGE)} |")
    print("| --- | --- | --- |")
    print(f"| nothing | {' | '.join(cell(damage) for damage in DAMAGE)} |")
    for recipe in RECIPES:
        print(f"| {recipe} | {' | '.join(cell(f'{d}: {recipe}') for d in DAMAGE)} |")


if __name__ == "__main__":
    main()
