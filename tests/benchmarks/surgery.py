"""Structural passes that change no result: nodes and ONNX Runtime latency, before and after.

    python tests/benchmarks/surgery.py            all rows
    python tests/benchmarks/surgery.py repvgg     rows whose name begins with it

Random weights; both sessions in turn, call by call, one thread; medians of the processor time of
the calls (the machine may be busy with other things), and their ratio. Every row's
program is compared with the one before it, and the relative error printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import _paths  # noqa: F401  puts tests/ on the path
import torch
import torch.nn.functional as F
from conformance import zoo
from models import branch_nets
from torch import nn

import graphwright as gw
from graphwright.passes.cleanup import FoldBatchNorm
from graphwright.passes.fuse import GateUp, Qkv, SkipScale
from graphwright.passes.reparameterize import Acnet, Dbb, Mobileone, Repvgg, Subpixel

CALLS = 60


class Segmenter(nn.Module):
    """A U-Net on volumes: three levels, transposed convolutions on the way up."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        widths = (c, 2 * c, 4 * c)

        def block(i: int, o: int) -> nn.Module:
            return nn.Sequential(nn.Conv3d(i, o, 3, padding=1), nn.InstanceNorm3d(o), nn.ReLU())

        self.down = nn.ModuleList(map(block, (1, *widths[:2]), widths))
        self.up = nn.ModuleList(nn.ConvTranspose3d(2 * w, w, 2, 2) for w in (2 * c, c))
        self.merge = nn.ModuleList(block(2 * w, w) for w in (2 * c, c))
        self.out = nn.Conv3d(c, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for number, down in enumerate(self.down):
            x = down(x if number == 0 else F.max_pool3d(x, 2))
            kept.append(x)
        for up, merge, skip in zip(self.up, self.merge, kept[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.out(x)


class Block(nn.Module):
    """A decoder's block with a gated unit."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)
        self.one, self.two = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.one(x)
        q, k, v = (f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.two(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def stages(make: Callable[[int], nn.Module], width: int) -> nn.Module:
    """A stem and three blocks."""
    return branch_nets.with_statistics(
        nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), *(make(width) for _ in range(3)))
    ).float()


def unet2d() -> nn.Module:
    """A denoiser of diffusers at the zoo's width."""
    return zoo.load()["unet2d"].build()


Row = tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]], list[gw.Pass]]

IMAGE = lambda: (torch.randn(1, 3, 64, 64),)  # noqa: E731
ROWS: dict[str, Row] = {
    "repvgg, 3 blocks": (lambda: stages(lambda w: branch_nets.repvgg(w, w), 32), IMAGE, [Repvgg()]),
    "mobileone, 3 blocks of 4 copies": (
        lambda: stages(lambda w: branch_nets.mobileone(w, w, 4), 32), IMAGE, [Mobileone()]),
    "acnet, 3 blocks": (lambda: stages(lambda w: branch_nets.acnet(w, w), 32), IMAGE, [Acnet()]),
    "dbb, 3 blocks": (lambda: stages(lambda w: branch_nets.dbb(w, w), 32), IMAGE, [Dbb()]),
    "subpixel, up 2-D (4, 2, 1)": (
        lambda: nn.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU()),
        lambda: (torch.randn(1, 32, 32, 32),), [Subpixel()]),
    "subpixel, 3-D segmentation net": (
        Segmenter, lambda: (torch.randn(1, 1, 16, 32, 32),), [Subpixel()]),
    "qkv and gate_up, a block of width 256, 1 token": (
        Block, lambda: (torch.randn(1, 1, 256),), [Qkv(), GateUp()]),
    "qkv and gate_up, a block of width 256, 64 tokens": (
        Block, lambda: (torch.randn(1, 64, 256),), [Qkv(), GateUp()]),
    "skip_scale by an input, unet2d of diffusers": (
        unet2d, lambda: (torch.randn(1, 3, 16, 16), torch.tensor([7])),
        [SkipScale(rho=1.0, as_input=True)]),
}  # fmt: skip
"""A net, its inputs, and the passes."""


def milliseconds(models: list[Callable[[], object]]) -> list[float]:
    """Median processor time of each, called in turn."""
    found: list[list[float]] = [[] for _ in models]
    for _ in range(CALLS):
        for model, times in zip(models, found, strict=True):
            start = time.process_time()
            model()
            times.append(1e3 * (time.process_time() - start))
    return [median(times) for times in found]


def nodes(program: gw.Program) -> int:
    """Calls of the graph."""
    return sum(node.op == "call_function" for node in program.graph.nodes)


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [""]
    print("| net and pass | nodes | after | relative error | ms | after | speed-up |")
    print("| --- |" + " ---: |" * 6)
    for name, (make, inputs, passes) in ROWS.items():
        if not any(name.startswith(part) for part in wanted):
            continue
        torch.manual_seed(0)
        x = inputs()
        before = FoldBatchNorm()(gw.trace(make().eval(), x))
        after = before
        for one in passes:
            after = one(after)
        error = gw.compare(before(*x), after(*x)).relative
        plain, changed = (gw.lower(program, "onnxruntime") for program in (before, after))
        given = after.filled(x)  # an artifact has no defaults
        old, new = milliseconds([partial(plain, *x), partial(changed, *given)])
        print(f"| {name} | {nodes(before)} | {nodes(after)} | {error:.1e} | {old:.2f} | {new:.2f} "
              f"| {old / new:.2f}x |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
