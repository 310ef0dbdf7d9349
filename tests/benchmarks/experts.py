"""Sizes of a small Mixtral and of recurrent models of text, and what quantizing does to them.

python tests/benchmarks/experts.py
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  finds the models of the tests
import torch
from models.gpt import sequences, text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphwright as gw
from graphwright.ir.graph.cost import cost
from graphwright.ir.layers.kinds import EXPERTS

WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "float32": ("", {}),
    "rtn, 4 bits": ("Rtn", {"bits": 4, "block": 32}),
    "gptq, 4 bits": ("Gptq", {"bits": 4, "block": 32}),
    "nf4": ("Nf4", {}),
    "int8": ("Int8", {}),
}


class Writer(nn.Module):
    """Bytes to logits of the next one, by two recurrent layers."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 128)
        self.recurrent = kind(128, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(input_ids))[0])


Run = Callable[[Tensor], Any]


def trained(kind: type[nn.Module], steps: int = 400) -> Writer:
    """One that has read some of Python's library."""
    torch.manual_seed(0)
    net, (data, _) = Writer(kind), text()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        batch = sequences(data, torch.randint(len(data) - 65, (32,)), 65)
        loss = cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval()


def bits(run: Run) -> str:
    """Bits per byte on files that were held out."""
    _, data = text()
    generator = torch.Generator().manual_seed(5)
    batch = sequences(data, torch.randint(len(data) - 129, (64,), generator=generator), 129)
    loss = cross_entropy(run(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    return f"{float(loss) / math.log(2):.4f} bits per byte"


def programs() -> Iterator[tuple[str, gw.Program, list[tuple[Tensor, ...]], Callable[[Run], str]]]:
    """Name, program, calibration data, and what is measured of a model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    ids = [(torch.randint(0, 1024, (4, 32)),) for _ in range(4)]
    dims = {0: "batch", 1: "seq"}
    model = MixtralForCausalLM(config).eval()
    program = gw.trace(model, {"input_ids": ids[0][0]}, dynamic={"input_ids": dims})
    held_out = torch.randint(0, 1024, (8, 32))
    with torch.no_grad():
        expected = program(held_out)["logits"]

    def error(run: Run) -> str:
        found = run(held_out)["logits"]
        return f"logits {float((found - expected).norm() / expected.norm()):.1%} off"

    yield "mixtral", program, ids, error
    for kind in (nn.LSTM, nn.GRU):
        x = [(sequences(text()[0], torch.arange(16) * 9973 + i),) for i in range(4)]
        program = gw.trace(trained(kind), {"input_ids": x[0][0][:4]}, {"input_ids": dims})
        yield kind.__name__.lower(), program, x, bits


def main() -> None:
    """Prints one row per model and pass."""
    print("| model | pass | ONNX MB | share of the parameters in codes | of those in experts | |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for name, program, data, measure in programs():
        for title, (way, options) in WAYS.items():
            made = program
            if way:
                made = getattr(gw.passes.quantize, way)(**options)(
                    program, calibration=data, check=False
                )
            compiled = gw.lower(made, "onnxruntime")
            with tempfile.TemporaryDirectory() as folder:
                compiled.save(folder)
                size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
            layers = cost(made).layers
            whole = sum(layer.parameters for layer in layers)
            coded = [x for x in layers if x.weight_bytes < 2 * x.parameters]
            experts = sum(x.parameters for x in coded if x.kind in EXPERTS)
            share = sum(x.parameters for x in coded)
            part = f"{experts / share:.0%}" if share else "-"
            print(
                f"| {name} | {title} | {size / 1e6:.2f} | {share / whole:.0%} | {part} | "
                f"{measure(compiled)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
