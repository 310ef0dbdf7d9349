"""Training runs in processes of their own.

python tune_jobs.py resume FOLDER    trains slowly and keeps its state in FOLDER/work: to be killed
python tune_jobs.py together FOLDER  trains with the other processes, each writes its result
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from models.tune_net import fresh, images, table, traced
from torch import Tensor, nn

from graphwright.ir.context import Context
from graphwright.ir.tune import Hook, TuneOptions, tune


class Slow(Hook):
    """Takes its time, and has a state: a running mean that the weight is pulled to."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None

    @torch.no_grad()
    def after_step(self, at) -> None:
        time.sleep(0.02)
        weight = at.parameters["fc.weight"]
        self.mean = weight.clone() if self.mean is None else 0.9 * self.mean + 0.1 * weight
        weight.lerp_(self.mean, 0.5)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state) -> None:
        self.mean = state["mean"]


def resume(folder: Path) -> None:
    program = traced(fresh(dropout=0.3), 4, 1, 4, 4)
    x, labels = images()
    options = TuneOptions(steps=40, lr=0.01, accumulate=2, hold_out=0.25, evaluate_every=7)
    context = Context(seed=3, work=folder / "work", checkpoint_seconds=0.0)
    tuned = tune(program, table(program.signature, x, labels, 4), options, context, hooks=[Slow()])
    tuned.program.save(folder / "result.pt2")
    (folder / "history.txt").write_text(repr(tuned.history))


class Rows(nn.Module):
    """Without batch norm, whose statistics are those of a process, and with a dead end."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.b = nn.Linear(8, 3)
        self.other = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(torch.tanh(self.a(x.flatten(1))))
        return self.b(h), self.other(h)


def together(folder: Path, size: int = 4) -> None:
    torch.manual_seed(0)
    program = traced(Rows().eval(), 4, 1, 4, 4)
    x, labels = images()
    options = TuneOptions(epochs=3, lr=0.01, accumulate=2, clip_norm=1.0, hold_out=1 / 6)
    context = Context(seed=3, work=folder / "work", checkpoint_seconds=0.0)
    tuned = tune(program, table(program.signature, x, labels, size), options, context)
    norm = traced(fresh(), 4, 1, 4, 4)
    still = TuneOptions(epochs=3, lr=1e-9, optimizer="sgd")  # only the statistics move
    statistics = tune(norm, table(norm.signature, x, labels, size), still, context).program
    rank = os.environ.get("RANK", "0")
    found = {"program": dict(tuned.program.state), "losses": tuned.history.losses,
             "evaluations": tuned.history.evaluations, "norm": dict(statistics.state)}  # fmt: skip
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    {"resume": resume, "together": together}[sys.argv[1]](Path(sys.argv[2]))
