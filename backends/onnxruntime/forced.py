"""Comparing quantized models, whose rounding would drown every other difference.

A difference of one float32 rounding in front of a quantizer moves some codes by one, and a few
layers later two runs of one model are as far apart as either is from the float model. So the
program is run on the codes that the runtime found: at every quantizer its own value has to lie
within one code of the runtime's, and takes it over. What is left at the outputs is float32
rounding, and is held to the bound of float32.

The codes are those of the session that is handed over (`optimized.py`). A quantizer that it fused
with the product behind it shows its input instead, which the program quantizes itself; one that is
left without codes of its own only moved some, and the program rounds to the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from graphwright.backends.onnxruntime.check import Case, Differs
from graphwright.backends.onnxruntime.optimized import OptimizedGraph
from graphwright.backends.onnxruntime.runtime import SessionSettings
from graphwright.ir.check.precision import ROUNDOFF, run_in_double
from graphwright.ir.ops.quantize_cache import cache_step, quantize_cache
from graphwright.ir.program import Program

ONE_CODE = 1.001
"""Largest difference at a quantizer, in codes: one, and the rounding of the scale."""

MOST_MOVED = 0.02
"""Largest share of codes that may differ by one, in front of which all is computed in float32."""

MOST_MOVED_HALF = 0.1
"""The same where the grid is that of half precision: its steps are 2**13 roundings of float32, of
which some hundred add up in front of it."""

HALF = ("float16", "bfloat16")

SMALL_MULTIPLE = 8.0
"""Roundings of half precision that may add up in front of a quantizer."""

MOST_AXES = 5
"""Tensors with more axes are taken to be in the order of the program."""


@dataclass(frozen=True)
class Found:
    """The values of one quantizer that the runtime shows.

    Attributes:
        value: codes; without a scale, the float tensor that is quantized, or the result of that.
        scale, zero_point: of the codes.
        is_result: whether `value` is what the quantizer gives.
    """

    value: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    is_result: bool = False


Part = str | Tensor
"""A value of the optimized graph by its name, or a stored tensor."""


class Taps:
    """The places of the codes of a program's quantizers in an optimized graph.

    Args:
        quantizers: quantizer -> its codes, scale and zero point in the model as it was written;
            its result alone where no step took it apart.
        state: tensors of the lowered program, for scales that are stored.
        graph: what the session runs.
    """

    def __init__(
        self,
        quantizers: Mapping[str, Sequence[ir.Value]],
        state: Mapping[str, Tensor],
        graph: OptimizedGraph,
    ) -> None:
        self.graph = graph
        self.parts: dict[str, list[Part]] = {}
        self.results = {quantizer for quantizer, values in quantizers.items() if len(values) == 1}
        for quantizer, values in quantizers.items():
            if quantizer in self.results:
                parts: list[Part] = [str(v.name) for v in values if v.name in graph.values]
            else:
                parts = _codes(values, state, graph) or _input(values[0], graph)
            if parts:
                self.parts[quantizer] = parts
        self.names = [p for parts in self.parts.values() for p in parts if isinstance(p, str)]

    def run(
        self, program: Program, settings: SessionSettings, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], dict[str, Found]]:
        """Flat outputs, and what every quantizer that can be seen shows."""
        found, outputs = self.graph.read(self.names, settings, program.signature, inputs)
        shown = {}
        for quantizer, parts in self.parts.items():
            tensors = [found[part] if isinstance(part, str) else part for part in parts]
            # A layer that was not fused with the quantizer behind it gives floats, no codes.
            if tensors[0].is_floating_point() == (len(tensors) == 1):
                scale, zero_point = ([*tensors[1:], None, None])[:2]
                shown[quantizer] = Found(tensors[0], scale, zero_point, quantizer in self.results)
        return outputs, shown


def _codes(
    values: Sequence[ir.Value], state: Mapping[str, Tensor], graph: OptimizedGraph
) -> list[Part]:
    """Codes, scale and zero point; empty when one of them is not in the graph."""
    parts: list[Part] = []
    for value in values:
        stored = state.get(str(value.name)) if value.producer() is None else None
        part = graph.value(value) if stored is None else stored
        if part is None:
            return []
        parts.append(part)
    return parts


def _input(codes: ir.Value, graph: OptimizedGraph) -> list[Part]:
    """The float tensor that a product quantizes itself; empty where none does."""
    for use in codes.uses():
        if graph.kernel(use.node) == "DynamicQuantizeMatMul":
            return [graph.nodes[str(use.node.name)].input[0]]
    return []


def on_codes(program: Program, case: Case, codes: Mapping[str, Found]) -> Case:
    """The case with the outputs of the program whose quantizers take over the runtime's codes.

    Raises:
        Differs: at a quantizer the runtime is further away than rounding explains; names it.
    """
    forced = _Forced(program, codes)
    with torch.no_grad():
        expected = tuple(forced.run(*case.inputs))
    taken = {name: partial(_instead, value.double()) for name, value in forced.taken.items()}
    reference = partial(run_in_double, program, case.inputs, taken)
    return replace(case, expected=expected, reference=reference, losses=None)


def _instead(theirs: Tensor, value: Tensor) -> Tensor:
    return theirs


class _Forced(fx.Interpreter):
    """Attributes: taken: what was put in the place of each quantizer's own value."""

    def __init__(self, program: Program, codes: Mapping[str, Found]) -> None:
        super().__init__(program.module)
        self.codes = codes
        self.taken: dict[str, Tensor] = {}
        self.units = _units(program.graph, codes)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        found = self.codes.get(n.name)
        if found is None or not isinstance(value, Tensor):
            return value
        if found.scale is None or found.zero_point is None:
            self.taken[n.name] = self._whole(n, value, found)
        else:
            codes = found.value.to(torch.float32) - found.zero_point.to(torch.float32)
            self.taken[n.name] = self._accepted(n, value, codes * found.scale, found.scale)
        return self.taken[n.name]

    def _whole(self, n: fx.Node, value: Tensor, found: Found) -> Tensor:
        """The runtime's own result, or its own input, quantized as the program does."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        theirs = found.value.reshape(value.shape)
        if not found.is_result:
            theirs = n.target(theirs, *args[1:], **kwargs)  # type: ignore[operator]
        most_moved = MOST_MOVED
        if n.target is quantize_cache:
            step = cache_step(*args)
            most_moved = MOST_MOVED_HALF if args[2] == 16 else MOST_MOVED
        elif len(args) == 1:
            step = (theirs.amax().clamp(min=0) - theirs.amin().clamp(max=0)) / 255  # as it is coded
        else:
            step = torch.tensor(args[1])
        return self._accepted(n, value, theirs, step, most_moved)

    def _accepted(
        self,
        n: fx.Node,
        value: Tensor,
        theirs: Tensor,
        scale: Tensor,
        most_moved: float = MOST_MOVED,
    ) -> Tensor:
        """The runtime's value in the program's order of axes, if it is one code away at most."""
        step = scale.clamp(min=torch.finfo(torch.float32).tiny)
        theirs, off = min(
            ((turned, (turned - value).abs() / step) for turned in _orders(theirs, value)),
            key=lambda pair: float(pair[1].mean()) if pair[1].numel() else 0.0,
        )
        if not off.numel():
            return theirs
        moved = float((off > 0.5).double().mean())
        # In half precision a value is off by a share of the size of what it is a sum of.
        rounding, size = SMALL_MULTIPLE * self.units[n.name] / 2, value.abs() / step
        most_moved = max(most_moved, rounding * float(size.square().mean().sqrt()))
        if not float(off.max()) <= ONE_CODE + rounding * float(size.max()) or moved > most_moved:
            raise Differs(
                f"quantizer {n.name}: codes differ by up to {float(off.max()):.2f}, "
                f"{100 * moved:.2g}% of them"
            )
        return theirs


def _units(graph: fx.Graph, quantizers: Iterable[str]) -> dict[str, float]:
    """By node name, the roundoff of half precision that it is computed in, behind other quantizers;
    0 where there is none.
    """
    taken, units = set(quantizers), dict[str, float]()
    for node in graph.nodes:
        value = node.meta.get("val")
        name = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
        read = [0.0 if n.name in taken else units[n.name] for n in node.all_input_nodes]
        units[node.name] = max([ROUNDOFF[name] if name in HALF else 0.0, *read])
    return units


def _orders(theirs: Tensor, value: Tensor) -> list[Tensor]:
    """The tensor with its axes in every order that gives the shape wanted."""
    if theirs.dim() != value.dim() or theirs.dim() > MOST_AXES:
        return [theirs.reshape(value.shape)]
    orders = permutations(range(theirs.dim()))
    found = [theirs.permute(order) for order in orders if
             tuple(theirs.shape[i] for i in order) == tuple(value.shape)]  # fmt: skip
    if not found:
        raise Differs(f"the runtime's codes are {tuple(theirs.shape)}, not {tuple(value.shape)}")
    return found
