"""Networks of other sizes on digits: NeuMeta's widths, and students of a trained network.

    python tests/benchmarks/resize_digits.py widths      the residual net at 25% to 100% width
    python tests/benchmarks/resize_digits.py students    fewer blocks, against training from scratch

`widths`: resize.neumeta trains one manifold at widths of 25%, 50%, 75% and 100%; resize.resample
then makes every width, those it never saw (in bold) too. Beside it, at the same width: the trained
net without the channels whose weights are smallest (L2, one shot), and that net tuned for the
epochs in `--tune`. The residual stream keeps its width in all of them.

`students`: the residual net of three stages with four blocks each, and of half of the blocks:
resize.assemble and resize.module_distill (with tune.finetune behind it), the cut-down net tuned
without a teacher, and a net of its size trained from random weights, all for the same number of
passes over the data. Accuracy is on the 500 held-out images, mean and range of the seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import _paths  # noqa: F401  puts tests/ on the path
import torch
from models import digits

import graphwright as gw
from graphwright.ir.channels import ChannelGroup, cut
from graphwright.ir.tune import TuneOptions, tune
from graphwright.passes.base import Context
from graphwright.passes.cleanup import FoldBatchNorm
from graphwright.passes.resize import Assemble, ModuleDistill, Neumeta, Resample
from graphwright.passes.resize._manifold.layout import kept_units
from graphwright.passes.resize.neumeta import chosen_groups
from graphwright.passes.tune import Finetune

SEEN = (0.25, 0.5, 0.75, 1.0)
WIDTHS = (1.0, 0.75, 0.6875, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25)


def in_seeds(values: list[float]) -> str:
    """Mean, and the range where there are several."""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def smallest(program: gw.Program, groups: list[ChannelGroup], width: float) -> gw.Program:
    """Without the units of least L2 norm over all their slices."""
    picks = {}
    for group in groups:
        norms = torch.zeros(group.units)
        for unit in range(group.units):
            for (name, dim), where in group.slices(unit).items():
                part = program.state[name].detach().index_select(dim, torch.as_tensor(where))
                norms[unit] += part.double().square().sum().float()
        gone = group.units - kept_units(group, width)
        picks[group] = norms.argsort()[:gone].tolist()
    return cut(program, picks)


def widths(epochs: int, tuned: int, seeds: int) -> None:
    """Table of accuracy by width."""
    program = FoldBatchNorm()(digits.traced(digits.trained("resnet")))
    groups, _ = chosen_groups(program, ("*",), ("residual",))
    data = digits.training(program)
    rows: dict[float, list[list[float]]] = {width: [[], [], []] for width in WIDTHS}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "manifold.safetensors")
            options = {"widths": SEEN, "width": 1.0, "save": path, "hidden": 64, "noise": 0.5,
                       "frequencies": 8, "draws": 16,
                       "tune": {"epochs": epochs, "lr": 2e-3, "schedule": "cosine"}}  # fmt: skip
            context = Context(training=data, scope=("neumeta", seed), seed=seed)
            Neumeta(**options).execute(program, context)
            for width in WIDTHS:
                made = Resample(manifold=path, width=width, draws=16)(program, check=False)
                rows[width][0].append(digits.accuracy(made))
        for width in WIDTHS:
            small = smallest(program, groups, width)
            rows[width][1].append(digits.accuracy(small))
            again = Finetune(tune={"epochs": tuned, "lr": 2e-3})
            context = Context(training=data, scope=("tune", seed), seed=seed)
            rows[width][2].append(digits.accuracy(again.execute(small, context).program))
    print(f"\nAccuracy of the given net: {digits.accuracy(program):.3f}\n")
    print(f"| width | one manifold | one shot | one shot, {tuned} epochs for each width |")
    print("| ---: | ---: | ---: | ---: |")
    for width, found in rows.items():
        name = f"{width:.2%}" if width in SEEN else f"**{width:.2%}**"
        print(f"| {name} | {' | '.join(map(in_seeds, found))} |", flush=True)


class Deep(torch.nn.Module):
    """A stem, blocks in one trunk, a head."""

    def __init__(self, blocks: int = 12) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(*digits._block(1, 24, stride=2))
        self.blocks = torch.nn.ModuleList(digits._Residual(24, 24, 1) for _ in range(blocks))
        self.head = torch.nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def students(epochs: int, seeds: int) -> None:
    """Table of accuracy of a net of 4 blocks, by the way it was made out of one of 12."""
    torch.manual_seed(0)
    teacher = digits.traced(digits.train(Deep(12).eval()))
    dropped = [f"blocks.{n}" for n in range(12) if n % 3]
    options = {"epochs": epochs, "lr": 2e-3}

    def assembled(context: Context) -> gw.Program:
        made = Assemble(drop=dropped, tune={**options, "loss": "cross_entropy"})
        return made.execute(teacher, context).program

    def by_modules(context: Context) -> gw.Program:
        third = max(1, epochs // 3)
        part = {**options, "epochs": third}
        small = ModuleDistill(modules=4, meta=part, tune=part).execute(teacher, context).program
        return (
            Finetune(tune={**options, "epochs": epochs - 2 * third}).execute(small, context).program
        )

    def cut_down(context: Context) -> gw.Program:
        nothing = {"steps": 1, "lr": 1e-12, "loss": "teacher_mse"}
        small = Assemble(drop=dropped, feature=0.0, tune=nothing).execute(teacher, context).program
        return Finetune(tune=options).execute(small, context).program

    def scratch(context: Context) -> gw.Program:
        torch.manual_seed(context.seed)
        fresh = digits.traced(Deep(4).eval())
        return tune(fresh, data, TuneOptions(**options), context).program

    ways: dict[str, Callable[[Context], gw.Program]] = {
        "resize.assemble": assembled,
        "resize.module_distill, then tune.finetune": by_modules,
        "the teacher's blocks, tune.finetune": cut_down,
        "random weights, trained": scratch,
    }
    data = digits.training(teacher)
    print(f"\nAccuracy of the net with 12 blocks: {digits.accuracy(teacher):.3f}\n")
    print(f"| 4 blocks, {epochs} epochs | accuracy |")
    print("| --- | ---: |")
    for name, way in ways.items():
        found = []
        for seed in range(seeds):
            context = Context(training=data, teacher=teacher, scope=(name, seed), seed=seed)
            found.append(digits.accuracy(way(context)))
        print(f"| {name} | {in_seeds(found)} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("widths", "students"))
    parser.add_argument("--epochs", type=int, help="of the manifold (100), of a student (6)")
    parser.add_argument("--tune", type=int, default=5, help="epochs of the pruned nets")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    if asked.what == "widths":
        widths(asked.epochs or 100, asked.tune, asked.seeds)
    else:
        students(asked.epochs or 6, asked.seeds)


if __name__ == "__main__":
    main()
