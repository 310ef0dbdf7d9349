"""Every pass on a small network that it changes, with the passes that it needs in front of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context

TUNE = {"epochs": 1, "lr": 0.001, "loss": "teacher_mse"}
LABELLED = {**TUNE, "loss": "next_token"}
UNTIED = ["kind:linear", "!head"]

CHAINS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    **{
        f"adapt.{method}": ("text", [(f"adapt.{method}", {"targets": UNTIED, **options})])
        for method, options in {
            "allora": {"rank": 2}, "bottleneck": {}, "dora": {"rank": 2}, "ia3": {},
            "krona": {"factor_out": 4}, "sara": {}, "s2ft": {}, "wta_crs": {}, "loldu": {"rank": 2},
            "lora": {"rank": 2}, "lora_sb": {"rank": 2, "gradient": LABELLED},
            "lora_xs": {"rank": 2}, "pego": {"rank": 2}, "pissa": {"rank": 2},
        }.items()
    },
    "adapt.merge": ("text", [("adapt.lora", {"rank": 2, "targets": UNTIED}), ("adapt.merge", {})]),
    "adapt.unmerge": (
        "text", [("adapt.lora", {"rank": 2, "targets": UNTIED}),
                 ("tune.finetune", {"tune": LABELLED}), ("adapt.merge", {}),
                 ("adapt.unmerge", {})]),
    "cast.dtype": ("conv", [("cast.dtype", {"to": "float16"})]),
    "cleanup.canonicalize": ("text", [("cleanup.canonicalize", {})]),
    "cleanup.eliminate_common_subexpressions": (
        "text", [("cleanup.eliminate_common_subexpressions", {})]),
    "cleanup.fold_batch_norm": ("conv", [("cleanup.fold_batch_norm", {})]),
    "cleanup.fold_constants": ("text", [("cleanup.fold_constants", {})]),
    "cleanup.merge_linear": ("text", [("cleanup.merge_linear", {})]),
    "cleanup.remove_identities": ("conv", [("cleanup.remove_identities", {})]),
    "compensate.bias_correction": (
        "conv", [("quantize.rtn", {"block": 16}), ("compensate.bias_correction", {})]),
    "compensate.eora": (
        "text", [("quantize.rtn", {"block": 16}), ("compensate.eora", {"rank": 2})]),
    "compensate.svd": ("text", [("quantize.rtn", {"block": 16}), ("compensate.svd", {"rank": 2})]),
    "prune.compress": (
        "text", [("prune.magnitude", {"pattern": "2:4"}), ("prune.compress", {})]),
    "prune.dsnot": ("text", [("prune.dsnot", {"sparsity": 0.5})]),
    "prune.gradual": ("text", [("prune.gradual", {"sparsity": 0.5, "rounds": 2, "tune": TUNE})]),
    "prune.issp": ("text", [("prune.issp", {"sparsity": 0.5, "tune": TUNE})]),
    "prune.magnitude": ("conv", [("prune.magnitude", {"sparsity": 0.5})]),
    "prune.mfac": ("text", [("prune.mfac", {"sparsity": 0.5, "steps": 2, "gradients": 4,
                                            "loss": "energy"})]),
    "prune.nm": ("text", [("prune.nm", {"tune": TUNE})]),
    "prune.otov2": ("conv", [("prune.otov2", {"sparsity": 0.25, "tune": TUNE})]),
    "prune.sparsegpt": ("text", [("prune.sparsegpt", {"sparsity": 0.5})]),
    "prune.udfc": ("conv", [("prune.udfc", {"ratio": 0.25, "weight_bits": 8})]),
    "prune.wanda": ("text", [("prune.wanda", {"sparsity": 0.5})]),
    "prune.zig": ("conv", [("prune.zig", {"sparsity": 0.25})]),
    "quantize.adaquant": ("text", [("quantize.adaquant", {"iterations": 2})]),
    "quantize.awq": ("text", [("quantize.awq", {"block": 16})]),
    "quantize.bit_allocation": (
        "text", [("quantize.bit_allocation", {"quantizer": "quantize.rtn"})]),
    "quantize.bn_tuning": (
        "conv", [("cleanup.fold_batch_norm", {}), ("quantize.rtn", {"block": 16}),
                 ("quantize.bn_tuning", {})]),
    "quantize.fp8": ("text", [("quantize.fp8", {})]),
    "quantize.gptq": ("text", [("quantize.gptq", {"block": 16})]),
    "quantize.int8": ("conv", [("cleanup.fold_batch_norm", {}),
                               ("quantize.int8", {"activations": "static"})]),
    "quantize.nf4": ("text", [("quantize.nf4", {})]),
    "quantize.pv": (
        "text", [("quantize.vptq", {"centroids": 16}), ("quantize.pv", {"tune": TUNE})]),
    "quantize.rtn": ("text", [("quantize.rtn", {"block": 16})]),
    "quantize.smoothquant": ("text", [("quantize.smoothquant", {})]),
    "quantize.udfc": ("conv", [("quantize.udfc", {})]),
    "quantize.vptq": ("text", [("quantize.vptq", {"centroids": 16})]),
    "tune.finetune": ("conv", [("tune.finetune", {"tune": TUNE})]),
}  # fmt: skip


class ConvNet(nn.Module):
    """Convolutions with norms, a residual sum, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.norm(self.first(x)))
        return self.last((first + torch.relu(self.second(first))).mean((2, 3)))


class TextNet(nn.Module):
    """One block of an encoder, with two layers that read one tensor and a tied table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.full((16,), 2.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table(ids) * self.scale.sqrt()
        q, k, v = (f(h).unflatten(-1, (2, 8)).transpose(1, 2)
                   for f in (self.query, self.key, self.value))  # fmt: skip
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.norm(h + a)
        return self.head(h + self.down(nn.functional.gelu(self.up(h))))


@cache
def traced(kind: str) -> gw.Program:
    """The network of a kind, with free dimensions."""
    torch.manual_seed(0)
    if kind == "conv":
        net: nn.Module = ConvNet().eval()
        return gw.trace(net, (torch.randn(4, 2, 6, 6),), {"x": {0: "batch"}})
    ids = torch.randint(0, 32, (4, 8))
    return gw.trace(TextNet().eval(), (ids,), {"ids": {0: "batch", 1: "length"}})


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    """Calibration batches."""
    generator = torch.Generator().manual_seed(1)
    if kind == "conv":
        return [{"x": torch.randn(4, 2, 6, 6, generator=generator)} for _ in range(2)]
    return [{"ids": torch.randint(0, 32, (4, 8), generator=generator)} for _ in range(2)]


def before_last(name: str) -> gw.Program:
    """The program that the pass is given."""
    kind, chain = CHAINS[name]
    program = traced(kind)
    for index, (step, options) in enumerate(chain[:-1]):
        program = run(step, options, program, kind, index)
    return program


def run_last(name: str, program: gw.Program) -> gw.Program:
    """The pass on a program."""
    kind, chain = CHAINS[name]
    return run(*chain[-1], program, kind, len(chain) - 1)


def run(
    step: str, options: dict[str, Any], program: gw.Program, kind: str, index: int
) -> gw.Program:
    """One pass of a chain, as the main job runs it."""
    data = batches(kind)
    labelled = [{**batch, "labels": batch["ids"]} if kind == "text" else batch for batch in data]
    teacher = traced(kind)
    context = Context(
        calibration=data,
        training=labelled,
        teacher=teacher,
        uncompressed=teacher,
        scope=(index, step),
    )
    return gw.passes.registry.find_pass(step)(**options).execute(program, context).program
