"""Recovery of pruned nets with their masks kept: zeros and accuracy before and after training.

    python tests/benchmarks/mask_recovery.py               4 minutes on a core

Nets in two styles, trained on digits; 90% of the weights of every layer but the first and the last
become zero by magnitude. Then: nothing; five epochs of tune.finetune with its zeros filled
(`keep_zeros: false`), or kept (the default); the M-FAC optimizer, whose Fisher matrix leaves the
zeros out; prune.gradual over five rounds of one epoch; and the same with rewinding to the given
weights (one epoch more, since it trains first). Accuracy is on the 500 held-out images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import digits

import graphwright as gw
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import layers
from graphwright.passes.prune import Gradual, Magnitude
from graphwright.passes.tune import Finetune

SPARSITY, EPOCHS = 0.9, 5
TUNE: dict[str, Any] = {"lr": 2e-3, "epochs": EPOCHS}
MFAC: dict[str, Any] = {"optimizer": "mfac", "lr": 0.02, "epochs": EPOCHS, "fisher_gradients": 64,
                        "fisher_damp": 1e-3}  # fmt: skip


def runs(program: gw.Program, targets: list[str]) -> Iterator[tuple[str, gw.Program]]:
    """Every way in turn."""
    data = digits.training(program)
    pruned = Magnitude(sparsity=SPARSITY, targets=targets)(program, check=False)
    yield "magnitude alone", pruned
    for name, options in (
        ("then finetune, zeros filled", {**TUNE, "keep_zeros": False}),
        ("then finetune, zeros kept", TUNE),
        ("then finetune by M-FAC, zeros kept", MFAC),
    ):
        yield name, Finetune(tune=options)(pruned, training=data, check=False)
    for name, rewind in (("gradual", "none"), ("gradual, weights rewound", "start")):
        step = Gradual(sparsity=SPARSITY, rounds=EPOCHS, rewind=rewind, targets=targets,
                       tune={**TUNE, "epochs": 1})  # fmt: skip
        yield name, step(program, training=data, check=False)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("nets", nargs="*", default=["vgg", "resnet"])
    print("| net | way | zeros | accuracy |")
    print("| --- | --- | ---: | ---: |")
    for net in parser.parse_args().nets:
        program = digits.traced(digits.trained(net))
        inner = [layer for layer in layers(program, PRODUCTS)][1:-1]
        print(f"| {net} | dense | 0.0% | {digits.accuracy(program):.3f} |", flush=True)
        for way, result in runs(program, [layer.name for layer in inner]):
            weights = torch.cat([result.state[layer.weight].flatten() for layer in inner])
            zeros = float((weights == 0).float().mean())
            accuracy = digits.accuracy(result)
            print(f"| {net} | {way} | {zeros:.1%} | {accuracy:.3f} |", flush=True)


if __name__ == "__main__":
    main()
