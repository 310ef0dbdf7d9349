"""Training under sparse optimizers in processes of their own.

python otov2_job.py FOLDER    each process writes what it got to FOLDER/<rank>.pt
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.data.batches import Batches, Rows
from graphwright.passes.prune import Otov2

METHODS = ("hesso", "hesso_cric", "dhspg")
SHARED = {"sparsity": 0.5, "tune": {"steps": 80, "lr": 0.05, "optimizer": "sgd"}}
OWN = {"dhspg": {"penalty": 3.0, "epsilon": 0.9}, "hesso": {"pruning_periods": 3}}


def fresh() -> gw.Program:
    """Without batch norm, whose statistics are those of a process."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    return gw.trace(net.eval(), (torch.randn(4, 12),), dynamic="batch")


def data(program: gw.Program, size: int) -> Batches:
    """Points and the class that a linear map gives them; `size` per process and step."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 12, generator=generator)
    labels = (x @ torch.randn(12, 3, generator=generator)).argmax(1)
    name = program.signature.inputs[0].name

    def take(indices) -> dict[str, torch.Tensor]:
        return {name: x[list(indices)], "labels": labels[list(indices)]}

    def read():
        return (take(range(i, i + size)) for i in range(0, len(x), size))

    return Batches("table", program.signature, read, "labels", rows=Rows(len(x), size, take))


def together(folder: Path, size: int) -> None:
    found = {}
    for method in METHODS:
        program = fresh()
        options = {**SHARED, "method": method, **OWN.get(method, {})}
        context = Context(seed=3, training=data(program, size))
        result = Otov2(**options).execute(program, context)
        found[method] = {"state": dict(result.program.state), "metrics": dict(result.metrics),
                         "actions": [str(action) for action in result.actions]}  # fmt: skip
    torch.save(found, folder / f"{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    together(Path(sys.argv[1]), 8)
