"""quantize.fp8: float8 e4m3 weights and activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize_float8
from graphwright.ir.calibration.observe import observe
from graphwright.ir.calibration.ranges import MinMax
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.kinds import CODABLE, STORED
from graphwright.ir.layers.products import input_node, weight_node, weight_value
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.ops.float8 import LARGEST, bytes_of
from graphwright.ir.options import Bounded, Targets
from graphwright.ir.program import Program
from graphwright.ir.stored.insert import Insertion, Make, matrix_of, replace_weight
from graphwright.ir.stored.refusals import refusals
from graphwright.passes.base import MATRICES, Action, Context, Need, Pass, Result

ours = torch.ops.graphwright


class Fp8Options(Bounded, Targets):
    """Options of quantize.fp8."""

    activations: Literal["none", "dynamic", "static"] = "dynamic"
    """`dynamic`: one scale per row of an activation (token), found as it runs. `static`: one scale
    per tensor, by calibration. `none`: weights alone are float8."""

    scales: Literal["channel", "tensor"] = "channel"
    """One scale per output channel of a weight, or one for all of it."""

    embeddings: bool = False
    """Store embedding tables as float8 too."""


class Fp8(Pass[Fp8Options]):
    """Stores weights as float8 e4m3 (3 mantissa bits, up to 448) and rounds activations to it.

    A weight becomes the bytes of its float8 values with scales max|w| / 448
    (`graphwright::dequantize_float8`). The input of its layer goes through
    `graphwright::fake_quantize_float8`, once per tensor. Products are computed in the program's own
    type: this is what float8 hardware would give, up to the order of sums; it saves memory, not
    time. Convolutions and embedding tables have their weights rounded, and convolutions their
    inputs with one scale per row of the last axis.

    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
    """

    contract = "lossy"
    stored_bits = 8
    takes = MATRICES
    codes = MATRICES
    stores_weights = True
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")
    needs_with: ClassVar[Mapping[tuple[str, Any], Need]] = {
        ("activations", "static"): "calibration"
    }

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        if options.activations == "static" and context.calibration is None:
            raise ArgumentError(
                f"{self.id} with static activations needs calibration data",
                fix="Give the spec a `calibration` section, or use activations: dynamic.",
            )
        chosen = select(program, options.targets, CODABLE)
        refused = refusals(program, chosen, embeddings=options.embeddings)
        layers = [layer for layer in chosen if layer not in refused]
        if not layers:
            reasons = sorted({f"{layer.name}: {refused[layer]}" for layer in chosen})
            raise ModelError(f"{self.id} can quantize none of its targets", details=tuple(reasons))
        scales = self._activation_scales(program, layers, context)
        editor = Editor(program, by=self.id)
        twin = dict(zip(program.graph.nodes, editor.graph.nodes, strict=True))
        errors: dict[fx.Node, float] = {}
        for layer in layers:
            weight = weight_node(layer)
            if weight not in errors:
                make, errors[weight] = self._weight(program, layer)
                replace_weight(editor, layer, make)
        _round_inputs(editor, twin, layers, scales)
        actions = []
        for layer in chosen:
            if layer in refused:
                actions.append(Action.left(layer.name, refused[layer]))
                continue
            how = "weight" if layer.kind in STORED else f"activations {options.activations}"
            error = errors[weight_node(layer)]
            actions.append(Action(layer.name, f"float8, {how}, weight error {error:.2e}"))
        values = list(errors.values())
        metrics = {
            "weights": float(len(values)),
            "weight_error_mean": sum(values) / len(values),
            "weight_error_max": max(values),
        }
        return Result(editor.finish(), tuple(actions), metrics)

    def _activation_scales(
        self, program: Program, layers: Sequence[Layer], context: Context
    ) -> dict[fx.Node, float]:
        """Scale of every activation that is rounded, 0 for one per row."""
        inputs = {input_node(layer): 0.0 for layer in layers if layer.kind not in STORED}
        if self.options.activations == "none":
            return {}
        if self.options.activations == "dynamic" or not inputs:
            return inputs
        observers = {node.name: MinMax() for node in inputs}
        observe(program, observers, context.batches, context.progress)
        for node in inputs:
            low, high = observers[node.name].range()
            largest = max(abs(low), abs(high))
            inputs[node] = largest / LARGEST if largest > 0 else 1.0
        return inputs

    def _weight(self, program: Program, layer: Layer) -> tuple[Make, float]:
        """The nodes of a weight, and its relative error."""
        weight = weight_value(program, layer)
        matrix = matrix_of(layer.kind, weight).contiguous()
        codes, scale = float8_weight(matrix, self.options.scales == "channel")

        def make(place: Insertion) -> fx.Node:
            stored, factors = place.store("codes", codes), place.store("scale", scale)
            return place.call(ours.dequantize_float8.default, stored, factors, 0)

        value = ours.dequantize_float8(codes, scale, 0).double()
        size = float(matrix.double().norm())
        error = float((value - matrix.double()).norm())
        return make, error / size if size > 0 else error


def float8_weight(matrix: Tensor, by_channel: bool) -> tuple[Tensor, Tensor]:
    """Bytes of float8 e4m3 (out, columns) and scales: (out,), or 0-dim; in the matrix's type.

    The largest value of a channel, or of all, becomes 448. A channel of zeros has the scale 1.
    """
    size = matrix.float().abs()
    largest = size.amax(1) if by_channel else size.amax()
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    # Codes are those of the scale that is stored.
    stored = scale.clamp(min=torch.finfo(matrix.dtype).tiny).to(matrix.dtype)
    return bytes_of(matrix.float() / stored.float().reshape(-1, 1)), stored


def _round_inputs(
    editor: Editor,
    twin: Mapping[fx.Node, fx.Node],
    layers: Sequence[Layer],
    scales: Mapping[fx.Node, float],
) -> None:
    """One rounding per activation, read by the layers alone."""
    for x, scale in scales.items():
        readers = [twin[layer.node] for layer in layers
                   if layer.kind not in STORED and input_node(layer) is x]  # fmt: skip
        node = twin[x]
        before = node.next
        while before.op in ("placeholder", "get_attr"):
            before = before.next
        rounded = editor.call(
            ours.fake_quantize_float8.default, node, scale, before=before, like=readers[0]
        )
        for reader in readers:
            reader.replace_input_with(node, rounded)
