"""Comparing quantized models, whose rounding would drown every other difference.

A difference of one float32 rounding in front of a quantizer moves some codes by one, and a few
layers later two runs of one model are as far apart as either is from the float model. So the
program is run on the codes that the runtime found: at every quantizer its own value has to lie
within one code of the runtime's, and takes it over. What is left at the outputs is float32
rounding, and is held to the bound of float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from graphwright.backends.onnxruntime.check import Differs
from graphwright.backends.onnxruntime.runtime import SessionSettings, open_session
from graphwright.backends.onnxruntime.steps.int8 import TAPS
from graphwright.backends.onnxruntime.translate import translate_with_values
from graphwright.ir.program import Program

ONE_CODE = 1.001
"""Largest difference at a quantizer, in codes: one, and the rounding of the scale."""

MOST_MOVED = 0.02
"""Largest share of codes that may differ by one."""

Codes = tuple[Tensor, Tensor, Tensor]


class TappedModel:
    """The translated program with its codes, scales and zero points as further outputs."""

    def __init__(self, lowered: Program, opset: int, settings: SessionSettings) -> None:
        self.taps: Mapping[str, list[str]] = lowered.facts.get(TAPS, {})
        model, values = translate_with_values(lowered, opset)
        by_name = {node.name: value for node, value in values.items()}
        self.outputs = [str(value.name) for value in model.graph.outputs]
        self.names: dict[str, list[str | Tensor]] = {
            quantizer: [_tap(model, by_name, lowered, node) for node in nodes]
            for quantizer, nodes in self.taps.items()
        }
        self.order = [str(value.name) for value in model.graph.outputs]
        self.session = open_session(ir.to_proto(model).SerializeToString(), settings)

    def run(
        self, program: Program, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], dict[str, Codes]]:
        """Flat outputs, and what every quantizer produced."""
        feeds = {
            spec.name: tensor.detach().cpu().contiguous().numpy()
            for spec, tensor in zip(program.signature.inputs, inputs, strict=True)
        }
        wanted = {item.name for item in self.session.get_inputs()}
        feeds = {name: array for name, array in feeds.items() if name in wanted}
        arrays = self.session.run(self.order, feeds)
        found = {n: torch.from_numpy(a) for n, a in zip(self.order, arrays, strict=True)}
        codes = {
            quantizer: tuple(part if isinstance(part, Tensor) else found[part] for part in parts)
            for quantizer, parts in self.names.items()
        }
        return tuple(found[name] for name in self.outputs), codes  # type: ignore[return-value]


def _tap(model: ir.Model, values: Mapping[str, Any], lowered: Program, node: str) -> str | Tensor:
    """Name of a further output for `node`; its tensor where it is stored."""
    stored = next((n for n in lowered.graph.nodes if n.name == node and n.op == "get_attr"), None)
    if stored is not None:
        return lowered.state[str(stored.target)]
    value = values[node]
    if str(value.name) not in {str(v.name) for v in model.graph.outputs}:
        model.graph.outputs.append(value)
    return str(value.name)


def run_on_codes(
    program: Program, inputs: tuple[Tensor, ...], codes: Mapping[str, Codes]
) -> tuple[Tensor, ...]:
    """Flat outputs of the program, every quantizer replaced by the runtime's codes.

    Raises:
        Differs: at a quantizer the runtime is further away than rounding explains; names it.
    """
    with torch.no_grad():
        return tuple(_Forced(program, codes).run(*inputs))


class _Forced(fx.Interpreter):
    def __init__(self, program: Program, codes: Mapping[str, Codes]) -> None:
        super().__init__(program.module)
        self.codes = codes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.codes:
            return value
        codes, scale, zero_point = self.codes[n.name]
        theirs = (codes.to(torch.float32) - zero_point.to(torch.float32)) * scale
        off = (theirs - value).abs() / scale.clamp(min=torch.finfo(torch.float32).tiny)
        moved = float((off > 0.5).double().mean()) if off.numel() else 0.0
        if not float(off.max() if off.numel() else 0.0) <= ONE_CODE or moved > MOST_MOVED:
            raise Differs(
                f"quantizer {n.name}: codes differ by up to {float(off.max()):.2f}, "
                f"{100 * moved:.2g}% of them"
            )
        return theirs
