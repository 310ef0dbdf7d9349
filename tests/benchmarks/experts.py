"""Sizes of a small Mixtral and of an LSTM classifier, and what of them quantizing passes reach.

python tests/benchmarks/experts.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

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


class Classifier(nn.Module):
    """Two layers of LSTM and a linear layer; the recurrent weights stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(128, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def programs() -> Iterator[tuple[str, gw.Program, list[tuple[Tensor, ...]]]]:
    """Name, program, calibration data."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    ids = [(torch.randint(0, 1024, (4, 32)),) for _ in range(4)]
    dims = {0: "batch", 1: "seq"}
    model = MixtralForCausalLM(config).eval()
    yield "mixtral", gw.trace(model, {"input_ids": ids[0][0]}, dynamic={"input_ids": dims}), ids
    x = [(torch.randn(4, 16, 128),) for _ in range(4)]
    net = Classifier().eval()
    yield "lstm", gw.trace(net, {"x": x[0][0]}, dynamic={"x": dims}), x


def main() -> None:
    """Prints one row per model and pass."""
    print("| model | pass | ONNX MB | share of the parameters in codes | of those in experts |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, program, data in programs():
        for title, (way, options) in WAYS.items():
            made = program
            if way:
                made = getattr(gw.passes.quantize, way)(**options)(
                    program, calibration=data, check=False
                )
            with tempfile.TemporaryDirectory() as folder:
                artifact = gw.lower(made, "onnxruntime").save(folder)
                size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
            del artifact
            layers = cost(made).layers
            whole = sum(layer.parameters for layer in layers)
            coded = [x for x in layers if x.weight_bytes < 2 * x.parameters]
            experts = sum(x.parameters for x in coded if x.kind in EXPERTS)
            share = sum(x.parameters for x in coded)
            part = f"{experts / share:.0%}" if share else "-"
            print(
                f"| {name} | {title} | {size / 1e6:.2f} | {share / whole:.0%} | {part} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
