"""Every pass on a small network that it changes, with the passes that it needs in front of it.

The chain of a pass is `CHAIN` in the pass's own test file.
"""

from __future__ import annotations

import importlib.util
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import torch
from models import denoisers
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context

TUNE = {"epochs": 1, "lr": 0.001, "loss": "teacher_mse"}
LABELLED = {**TUNE, "loss": "next_token"}
UNTIED = ["kind:linear", "!head"]

Steps = list[tuple[str, dict[str, Any]]]


@cache
def chain(name: str) -> tuple[str, Steps]:
    """`CHAIN` in the test file of a pass: a net by its name below, and steps to the pass."""
    family, method = name.split(".")
    file = Path(__file__).parents[1] / "passes" / family / f"test_{method}.py"
    spec = importlib.util.spec_from_file_location(f"chain_of_{family}_{method}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind, steps = module.CHAIN
    assert steps[-1][0] == name, f"CHAIN in {file.name} has to end with {name}"
    return kind, steps


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


class StagesNet(nn.Module):
    """Stages of an encoder, each at half the size of the one before it."""

    def __init__(self) -> None:
        super().__init__()
        widths = (2, 4, 6, 8)
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=1 if i == 2 else 2, padding=1)
            for i, o in itertools.pairwise(widths)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = torch.relu(stage(x))
        return x


class FilterNet(nn.Module):
    """Convolutions that keep the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class ResidualNet(nn.Module):
    """A residual block between a stem and a layer, with ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.last(torch.relu(x + self.second(torch.relu(self.first(x)))))


class UpNet(nn.Module):
    """A net with two levels, a transposed convolution on the way up, and a long skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.merge, self.last = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.first(x))
        up = self.up(torch.relu(self.down(first)))
        return self.last(torch.relu(self.merge(torch.cat([up, first], 1))))


class GatedNet(nn.Module):
    """A norm that two projections of a gated unit alone read."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(32, 16), nn.LayerNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 32)
        nn.init.normal_(self.norm.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.table(ids))
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h))


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


class ChainNet(nn.Module):
    """A chain of equal blocks, with an embedding in front and a head behind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(2)
        )
        self.head = nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class ClassesNet(nn.Module):
    """A classifier that halves its image once, by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.third, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.relu(layer(x))
        return self.last(x.mean((2, 3)))


IMAGE_NETS: dict[str, type[nn.Module]] = {
    "classes": ClassesNet, "conv": ConvNet, "filter": FilterNet, "residual": ResidualNet,
    "stages": StagesNet, "unet": UpNet,
}  # fmt: skip


class EnergyNet(nn.Module):
    """One number per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.inner(x)))


class TrunkNet(nn.Module):
    """Four residual blocks, of which each can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


VECTOR_NETS: dict[str, type[nn.Module]] = {
    "classifier": TrunkNet, "energy": EnergyNet, "generator": TrunkNet, "trunk": TrunkNet,
}  # fmt: skip
"""`classifier` comes with labels, `generator` with real samples."""

TEXT_NETS: dict[str, type[nn.Module]] = {
    "chain": ChainNet, "gated": GatedNet, "text": TextNet,
}  # fmt: skip


def _decoder() -> gw.Program:
    """A decoder with its cache as inputs and outputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from graphwright.ir.generation.trace import trace_decoder

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    return trace_decoder(LlamaForCausalLM(config).eval(), check=False)


DENOISERS = {
    "denoiser": denoisers.conv, "neighbours": denoisers.around, "pair": denoisers.pair,
    "token_denoiser": denoisers.token,
}  # fmt: skip
"""Networks of the passes of sample."""


@cache
def traced(kind: str) -> gw.Program:
    """The network of a kind, with free dimensions."""
    torch.manual_seed(0)
    if kind in IMAGE_NETS:
        net = IMAGE_NETS[kind]().eval()
        return gw.trace(net, (torch.randn(4, 2, 6, 6),), {"x": {0: "batch"}})
    if kind == "restorer":
        free = {"x": {0: "batch", 2: "height", 3: "width"}}
        return gw.trace(FilterNet().eval(), (torch.randn(4, 2, 12, 12),), free)
    if kind == "decoder":
        return _decoder()
    if kind in VECTOR_NETS:
        net = VECTOR_NETS[kind]().eval()
        return gw.trace(net, (torch.randn(4, 6),), {"x": {0: "batch"}})
    if kind in DENOISERS:
        return DENOISERS[kind]()
    ids = torch.randint(0, 32, (4, 8))
    net = TEXT_NETS[kind]().eval()
    return gw.trace(net, (ids,), {"ids": {0: "batch", 1: "length"}})


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    """Calibration batches."""
    generator = torch.Generator().manual_seed(1)
    if kind in IMAGE_NETS:
        return [{"x": torch.randn(4, 2, 6, 6, generator=generator)} for _ in range(2)]
    if kind == "restorer":
        return [{"x": torch.randn(4, 2, 12, 12, generator=generator)} for _ in range(2)]
    if kind in VECTOR_NETS:
        return [{"x": torch.randn(4, 6, generator=generator)} for _ in range(2)]
    if kind in DENOISERS:
        specs = traced(kind).signature.inputs
        rows = (x.repeat(10, *[1] * (x.dim() - 1)) for x in traced(kind).examples)
        found = dict(zip((s.name for s in specs), rows, strict=True))
        first = specs[0].name  # the sample, of normal numbers
        return [{**found, first: torch.randn(found[first].shape, generator=generator)}]
    name = "input_ids" if kind == "decoder" else "ids"
    return [{name: torch.randint(0, 32, (4, 8), generator=generator)} for _ in range(2)]


def before_last(name: str) -> gw.Program:
    """The program that the pass is given."""
    kind, steps = chain(name)
    program = traced(kind)
    for index, (step, options) in enumerate(steps[:-1]):
        program = run(step, options, program, kind, index)
    return program


def run_last(name: str, program: gw.Program) -> gw.Program:
    """The pass on a program."""
    kind, steps = chain(name)
    return run(*steps[-1], program, kind, len(steps) - 1)


def run(
    step: str, options: dict[str, Any], program: gw.Program, kind: str, index: int
) -> gw.Program:
    """One pass of a chain, as the main job runs it."""
    data = batches(kind)
    labelled = [{**batch, **_labels(kind, batch)} for batch in data]
    teacher = traced(kind)
    context = Context(
        calibration=data,
        training=labelled,
        teacher=teacher,
        uncompressed=teacher,
        scope=(index, step),
    )
    return gw.passes.registry.find_pass(step)(**options).execute(program, context).program


def _labels(kind: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text itself, classes, images or samples; none for other nets."""
    if "ids" in batch:
        return {"labels": batch["ids"]}
    if kind == "classifier":
        return {"labels": torch.arange(4) % 3}
    if kind == "generator":
        return {"labels": batch["x"][:, :3].clamp(-1, 1)}
    if kind == "restorer":
        return {"labels": batch["x"].clamp(-1, 1)}
    if kind == "classes":
        return {"labels": (batch["x"].sum((1, 2, 3)) > 0).long()}
    return {}
