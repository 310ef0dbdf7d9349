"""quantize.int8: 8-bit weights and activations, in the forms that integer kernels compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize and its kin
from graphwright.ir.calibration.observe import bound_batches, observe
from graphwright.ir.calibration.ranges import RangeObserver, range_observer
from graphwright.ir.context import Batch
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.kinds import (
    CODABLE,
    CONVOLUTIONS,
    EXPERTS,
    INPUT_ARGUMENT,
    OUTPUT_AXIS,
    STORED,
    TABLES,
    TRANSPOSED_CONVOLUTIONS,
    TURNED,
    put_at,
)
from graphwright.ir.layers.products import geometry, input_node, weight_node
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.layers.transposed import even_sub_pixel
from graphwright.ir.options import Bounded, Targets
from graphwright.ir.program import Program
from graphwright.ir.stored.insert import matrix_of
from graphwright.ir.work import ROUNDED, SEARCHED, Load, Work
from graphwright.passes.base import Action, Context, Need, Pass, Result
from graphwright.passes.quantize._activations.integers import Inserter, Quantized, conv_bias
from graphwright.passes.quantize._activations.sites import Sites, find_sites
from graphwright.passes.quantize._math import int8 as int8_math

ops = torch.ops.graphwright

WINDOWED = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)

GROUPS = 6
"""Position of a convolution's groups."""

MEASURED_BATCHES = 2
"""Batches that the error of every layer is measured on."""


class Int8Options(Bounded, Targets):
    """Options of quantize.int8."""

    activations: Literal["dynamic", "static"] = "dynamic"
    """`dynamic` finds the range of every activation as it runs; `static` fixes it by calibration
    (faster, the same for every batch, and what convolutions need)."""

    activation_range: Literal["min_max", "moving_average", "percentile", "entropy", "mse"] = (
        "min_max"
    )
    """The estimator of ranges for `static`: extremes, their moving average, percentile, least KL
    divergence, or least squared error."""

    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Share of the values, in percent, that the estimator `percentile` keeps."""

    weight_range: Literal["min_max", "mse"] = "min_max"
    """The scale of a weight's channel: from its largest value, or of least squared error."""

    any_cpu: bool = True
    """Keep weight codes where CPUs without VNNI instructions (AVX2, older AVX-512) compute
    them exactly: their 16-bit sums of two products saturate otherwise. Pairs of codes beyond it
    are moved, and scales are searched for channels that have any: docs/benchmarks.md says what
    this costs."""

    embeddings: bool = True
    """Store embedding tables as int8 too, one scale per row."""


class Int8(Pass[Int8Options]):
    """Quantizes weights to int8, one symmetric scale per output channel, and activations to uint8.

    A weight becomes codes in [-127, 127] and `graphwright::dequantize`; the input of its layer
    goes through `graphwright::fake_quantize` (static) or `graphwright::fake_quantize_dynamic`,
    once per tensor. In static programs the results of convolutions, and sums and concatenations
    of them, are quantized too, behind their ReLU, and their biases are int32 codes: integer
    convolutions exist in no other form. Biases of matrix products stay in float32. A transposed
    convolution is computed on integers where it can be written as a plain one (two dimensions, one
    group, one stride, no dilation); any other stores an int8 weight and is computed in float32.
    Recurrent, bilinear and einsum weights are stored in int8 as well; in ONNX Runtime an LSTM
    multiplies on integers (DynamicQuantizeLSTM), the others in float32.
    Padding tokens of calibration data (0 in `attention_mask`) have no part in the ranges.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference".
    """

    contract = "lossy"
    stored_bits = 8
    takes = ("linear", "conv", "embedding")
    stores_weights = True
    after = ("cleanup.*", "quantize.smoothquant")
    lowers_to = ("onnxruntime", "triton")
    computes_in = ("float64", "float32")  # layers in float64 are named and left as they are
    needs_with: ClassVar[Mapping[tuple[str, Any], Need]] = {
        ("activations", "static"): "calibration"
    }

    def cost(self, load: Load) -> Work:
        # scales are searched for channels whose pairs of codes would be too large, or for all
        size = sum(layer.bytes for layer in load.targeted(self.options.targets))
        searched = self.options.any_cpu or self.options.weight_range == "mse"
        return super().cost(load) + Work(moved=ROUNDED * size * (SEARCHED if searched else 1))

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        is_static = options.activations == "static"
        if is_static and context.calibration is None:
            raise ArgumentError(
                f"{self.id} with static activations needs calibration data",
                fix="Give the spec a `calibration` section, or use activations: dynamic.",
            )
        chosen = select(program, options.targets, CODABLE)
        refused = {layer: why for layer in chosen if (why := refusal(layer, program, options))}
        layers = [layer for layer in chosen if layer not in refused]
        if not layers:
            reasons = sorted({f"{layer.name}: {refused[layer]}" for layer in chosen})
            raise ModelError(f"{self.id} can quantize none of its targets", details=tuple(reasons))
        computed = {n.node: n.kind for n in layers if not is_storage(n, options)}
        sites = find_sites(program.graph, computed, outputs=is_static)
        ranges = self._ranges(program, sites, context) if is_static else {}
        weights = quantize_weights(program, layers, sites, ranges, options)
        errors = layer_errors(program, layers, weights, sites, ranges, context.calibration)
        edited = Inserter(program, self.id, sites, ranges, is_static).run(layers, weights)
        return Result(edited, self._actions(chosen, refused, errors), _metrics(errors))

    def _ranges(
        self, program: Program, sites: Sites, context: Context
    ) -> dict[fx.Node, tuple[float, int]]:
        """Scale and zero point of every quantized tensor, by calibration."""
        options = self.options
        observers: dict[str, RangeObserver] = {
            node.name: range_observer(options.activation_range, options.percentile)
            for node in sites.observed()
        }
        observe(program, observers, context.batches, context.progress, padding=False)
        found: dict[fx.Node, tuple[float, int]] = {}
        for node in sites.observed():
            try:
                found[node] = int8_math.activation_parameters(*observers[node.name].range())
            except ArgumentError as error:
                raise ArgumentError(error.message, where=node.name, fix=error.fix) from None
        found.update({moved: found[root] for moved, root in sites.same.items()})
        return found

    def _actions(
        self, chosen: list[Layer], refused: dict[Layer, str], errors: dict[fx.Node, float]
    ) -> tuple[Action, ...]:
        actions = []
        for layer in chosen:
            if layer in refused:
                actions.append(Action.left(layer.name, refused[layer], "float32"))
                continue
            how = f"int8 {self.options.activations}"
            if layer.kind in TABLES:
                how = "int8 weight"
            elif layer.kind == "lstm":
                how = "int8 weight, inputs and states rounded as they come in ONNX Runtime's kernel"
            elif is_storage(layer, self.options):
                how = f"int8 weight, stored only: {layer.kind} like this is computed in float32"
            error = errors[layer.node]
            actions.append(Action(layer.name, f"{how}, relative error {error:.2e}"))
        return tuple(actions)


def refusal(layer: Layer, program: Program, options: Int8Options) -> str:
    """The reason why a layer stays in float32; empty when it can be quantized."""
    if not layer.weight:
        return "its weight is computed in the graph (compressed or adapted before)"
    weight = program.state[layer.weight]
    if weight.dtype != torch.float32:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float32"
    if layer.kind in TABLES:
        return "" if options.embeddings else "embeddings: false"
    if layer.kind in TURNED and weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions, not 2"
    if layer.kind == "addmm" and (len(layer.node.args) > 3 or layer.node.kwargs):
        return "addmm with factors alpha or beta"
    if layer.kind in WINDOWED and options.activations == "dynamic":
        return "no fast integer convolution with dynamic ranges; use activations: static"
    if not bool(torch.isfinite(weight).all()):
        return "its weight holds NaN or infinity"
    return ""


def is_storage(layer: Layer, options: Int8Options) -> bool:
    """Whether only the weight of a layer is quantized, for no runtime has an integer kernel.

    A transposed convolution that can be written as a plain one has a kernel; with an odd number of
    input channels its sums pair places of the window, which depends on how it is written. The
    rows of a stack's experts are found as it runs. An LSTM rounds its inputs itself.
    """
    if layer.kind not in TRANSPOSED_CONVOLUTIONS:
        return layer.kind in (*EXPERTS, *STORED)
    weight = weight_node(layer)
    is_odd = options.any_cpu and weight.meta["val"].shape[0] % 2 == 1
    return is_odd or even_sub_pixel(layer.node) is None


def quantize_weights(
    program: Program,
    layers: Iterable[Layer],
    sites: Sites,
    ranges: dict[fx.Node, tuple[float, int]],
    options: Int8Options,
) -> dict[tuple[str, int], Quantized]:
    """Codes of every weight, by (name, axis): tied layers share them."""
    readers: dict[tuple[str, int], list[Layer]] = {}
    layers = list(layers)
    for layer in layers:
        readers.setdefault((layer.weight, OUTPUT_AXIS[layer.kind]), []).append(layer)
    found: dict[tuple[str, int], Quantized] = {}
    for layer in layers:
        axis = OUTPUT_AXIS[layer.kind]
        if (layer.weight, axis) in found:
            continue
        bias = conv_bias(program, layer)
        floor = None
        if bias is not None and layer.node in sites.layers:
            floor = int8_math.least_scale(bias, ranges[input_node(layer)][0])
        weight = program.state[layer.weight].detach()
        if layer.kind in EXPERTS:
            shape = geometry(program, layer)
            rows = matrix_of(layer.kind, weight)
            made = int8_math.quantize_weight(rows, 0, options.weight_range, False, None)
            found[layer.weight, axis] = Quantized(*made, 0, shape)
            continue
        hold_pairs = options.any_cpu and any(map(can_overflow, readers[layer.weight, axis]))
        codes, scale = int8_math.quantize_weight(
            weight, axis, options.weight_range, hold_pairs, floor
        )
        found[layer.weight, axis] = Quantized(codes, scale, axis)
    return found


def can_overflow(layer: Layer) -> bool:
    """Whether kernels of CPUs without VNNI add neighbouring products of the layer in 16 bits.

    A table is multiplied with nothing, and a depthwise convolution is summed in 32 bits.
    """
    if layer.kind not in CONVOLUTIONS:
        stored_only = {*EXPERTS, *STORED} - {"lstm", *TRANSPOSED_CONVOLUTIONS}
        return layer.kind not in stored_only
    weight = weight_node(layer)
    groups = layer.node.args[GROUPS] if len(layer.node.args) > GROUPS else 1
    return not (weight.meta["val"].shape[1] == 1 and weight.meta["val"].shape[0] == groups)


def layer_errors(
    program: Program,
    layers: list[Layer],
    weights: dict[tuple[str, int], Quantized],
    sites: Sites,
    ranges: dict[fx.Node, tuple[float, int]],
    calibration: Iterable[Batch] | None,
) -> dict[fx.Node, float]:
    """||y_int8 - y|| / ||y|| of every layer by itself, on the float program's own inputs."""
    by_name: dict[str, list[Layer]] = {}
    for layer in layers:
        by_name.setdefault(layer.node.name, []).append(layer)
    totals = dict.fromkeys(by_name, (0.0, 0.0))

    class Measure(fx.Interpreter):
        """Computes every layer a second time, quantized."""

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in by_name:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                changed = list(args)
                for layer in by_name[n.name]:
                    value = weights[layer.weight, OUTPUT_AXIS[layer.kind]].value()
                    put_at(changed, layer.place, value)
                    if layer.node in sites.layers:
                        place = INPUT_ARGUMENT[layer.kind]
                        changed[place] = fake_quantized(args[place], ranges.get(input_node(layer)))
                other = n.target(*changed, **kwargs)  # type: ignore[operator]
                new, old = (y[0] if isinstance(y, list | tuple) else y for y in (other, result))
                error, size = totals[n.name]
                error += float((new - old).double().square().sum())
                totals[n.name] = (error, size + float(old.double().square().sum()))
            return result

    batches: Iterable[tuple[Tensor, ...]] = [program.examples]
    if calibration is not None:
        batches = islice(bound_batches(program, calibration), MEASURED_BATCHES)
    runner = Measure(program.module)
    with torch.no_grad():
        for inputs in batches:
            runner.run(*inputs)
    sizes = {name: (e / s if s > 0 else e) ** 0.5 for name, (e, s) in totals.items()}
    return {layer.node: sizes[layer.node.name] for layer in layers}


def fake_quantized(x: Tensor, parameters: tuple[float, int] | None) -> Tensor:
    """x as the quantized program's layer sees it."""
    if parameters is None:
        return ops.fake_quantize_dynamic(x)  # type: ignore[no-any-return]
    return ops.fake_quantize(x, *parameters, 0, 255)  # type: ignore[no-any-return]


def _metrics(errors: dict[fx.Node, float]) -> dict[str, float]:
    values = list(errors.values())
    return {
        "layers": float(len(values)),
        "layer_error_mean": sum(values) / len(values),
        "layer_error_max": max(values),
    }
