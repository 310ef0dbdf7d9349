"""quantize.adaquant: layers that learn, each by itself, to compute the same from codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

import graphwright.ir.ops  # noqa: F401  registers graphwright::dequantize_blocks
from graphwright.ir.calibration.experts import is_stack, part_names
from graphwright.ir.calibration.padding import without_padding
from graphwright.ir.calibration.site import Site, Solved, Task
from graphwright.ir.calibration.walk import sweep
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.layers.bias import can_set_bias, set_bias
from graphwright.ir.layers.kinds import INPUT_ARGUMENT, PRODUCTS, TRANSPOSED_CONVOLUTIONS
from graphwright.ir.layers.products import from_matrix, geometry, weight_key
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Bounded, Targets, also, only_with
from graphwright.ir.program import Program
from graphwright.ir.stored.blocks import Blocks, block_for, pack
from graphwright.ir.stored.insert import Insertion, Make, rebuild_blocks, replace_weight
from graphwright.ir.stored.refusals import refusals
from graphwright.ir.work import BACKWARD, CALLS_OF_A_STEP, FORWARD, ROUNDED, Load, Work
from graphwright.passes.base import MATRICES, Action, Context, Pass, Result
from graphwright.passes.quantize._low_bit.rounding import blocks_of
from graphwright.passes.quantize._math import adaquant

aten = torch.ops.aten
ours = torch.ops.graphwright

DEPTHWISE_BITS = 8
"""Bits of depthwise convolutions, whatever is asked for (P47, the released code)."""

ONLY_ADAM = ("batch_size", "lr", "bias_lr", "range_lr", "input_lr")
"""Options that only `adam` reads."""

MOST_ROWS = 8192
"""Rows of a layer without windows that are kept to learn from."""


class AdaquantOptions(Bounded, Targets):
    """Options of quantize.adaquant."""

    rules = tuple(only_with(name, "method", ["adam"]) for name in ONLY_ADAM)

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Bits of a weight's code."""

    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Bits of a code of the layers' inputs, one range per layer; absent: inputs stay in float.
    Below 8 no runtime has kernels: the artifact then computes the rounding, at float speed."""

    block: Annotated[int, Field(ge=-1, validation_alias=also("block", "group_size"))] = -1
    """Weights of a row that share a range; 0 or -1 for one range per row, as in the paper."""

    symmetric: Annotated[bool, Field(validation_alias=also("symmetric", "sym"))] = False
    """Weight ranges around zero. With 8 bits, 8-bit inputs and one range per row, layers then run
    on integer kernels."""

    sequential: bool = True
    """Learn from what the quantized layers before really give; else from the float inputs."""

    method: adaquant.How = "adam"
    """The optimizer of a layer: `adam`, weight, bias and ranges by gradients; `nelder_mead`, a
    search for the ranges alone, the weight and bias as they are: one scale and one shift for all
    rows of the weight, one of each for the input. It is meant for 8 bits, where rounding to nearest
    is good and the ranges are what can be wrong."""

    iterations: Annotated[int, Field(ge=0)] = 1000
    """Steps per layer; with 0 the result is plain rounding to nearest. Of `nelder_mead`, the most:
    it mostly ends after one or two hundred, each of which reads all samples."""

    batch_size: Annotated[int, Field(ge=1)] = 50
    """Samples of a step of `adam`: images, or, for layers on tokens, sequences' worth of rows."""

    lr: Annotated[float, Field(gt=0)] = 1e-5
    """Learning rate of the weights (`adam`)."""

    bias_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the biases (`adam`)."""

    range_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the weights' ranges (`adam`)."""

    input_lr: Annotated[float, Field(gt=0)] = 1e-1
    """Learning rate of the inputs' ranges, as a share of the range they begin with (`adam`)."""


class Adaquant(Pass[AdaquantOptions]):
    """Quantizes weights, and inputs if wanted, and lets every layer learn its rounding.

    For each layer by itself, weight, bias, and the ranges of weight and input are trained with
    straight-through rounding until the quantized layer computes what the float layer computed
    (mean squared error of the outputs, behind the ReLU where one follows). No labels, no gradient
    through the network, a few hundred samples. Ranges hold zero, and zero is exactly a code. A
    layer whose learned form is no better than plain rounding keeps the plain one. Depthwise
    convolutions stay at 8 bits.

    With `method: nelder_mead` weights and biases are frozen, and only ranges are searched for: the
    released code's way where it may not change weights. Its scripts do not take it by themselves,
    at 8 bits neither, so it is no default here. The code searches on each hundred samples alone,
    takes the mean of the points, and shifts by absolute amounts, from first steps of 0.00025, less
    than a code; here one search lowers the error over all samples, of which a mean of minima need
    not be one, and shifts are shares of the range, from first steps of a quarter.

    The released code gives the quantized inputs of its sequential form to the first batch only;
    here all are. Its input-range rate of 0.1 is absolute and here a share of the range, for
    activations are not of one size. Biases stay in float.

    Source: Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets",
    section 3.
    """

    contract = "lossy"
    stored_bits = "bits"
    takes = MATRICES
    codes = MATRICES
    computes_in = ("float64", "float32")
    stores_weights = True
    needs = "calibration"
    papers = ("P47",)
    after = ("cleanup.*", "prune.*", "tune.*", "quantize.smoothquant")

    def cost(self, load: Load) -> Work:
        # every layer is trained by itself, forward and backward, on batches of its inputs
        options, data = self.options, load.calibration
        share = 0.0 if data is None else min(options.batch_size / max(data.samples, 1), 1.0)
        runs = 0.0 if data is None else data.runs * share
        layers = [layer for layer in load.targeted(options.targets) if layer.rows]
        step = Work(
            macs=sum(layer.rows * runs * layer.inner * layer.outer for layer in layers),
            moved=ROUNDED * sum(layer.bytes for layer in layers),
            calls=CALLS_OF_A_STEP * len(layers),
        ).times(FORWARD + BACKWARD)
        return super().cost(load) + step.times(options.iterations)

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        chosen = select(program, options.targets, {*PRODUCTS, *TRANSPOSED_CONVOLUTIONS})
        refused = refusals(program, chosen, embeddings=False)
        refused |= {x: f"{x.kind} is no product of rows and a matrix" for x in chosen
                    if x.kind in TRANSPOSED_CONVOLUTIONS}  # fmt: skip
        if options.activation_bits is not None:
            refused |= {x: "experts have no input range in common" for x in chosen
                        if is_stack(x)}  # fmt: skip
        kept = [layer for layer in chosen if layer not in refused]
        if not kept:
            reasons = sorted({f"{layer.name}: {refused[layer]}" for layer in chosen})
            raise ModelError(f"{self.id} can quantize none of its targets", details=tuple(reasons))
        actions = [Action.left(x.name, refused[x]) for x in chosen
                   if x in refused]  # fmt: skip
        names = {layer: part_names(layer, geometry(program, layer).groups) for layer in kept}
        method = _Method(
            options,
            {name: _is_rectified(x) for x in kept for name in names[x]},
            {name: can_set_bias(x) for x in kept for name in names[x]},
        )
        found = sweep(
            program, kept, context.batches, method, context,
            follow="solved" if options.sequential else "program", both=options.sequential,
        )  # fmt: skip
        editor = Editor(program, by=self.id)
        errors = []
        done: set[str] = set()
        for layer in kept:
            solved = found[layer.node.name]
            _insert(editor, layer, solved, is_first=weight_key(layer) not in done)
            done.add(weight_key(layer))
            actions.append(_action(layer, solved))
            errors.append((solved.info["before"], solved.info["after"]))
        before, after = (sum(part) / len(errors) for part in zip(*errors, strict=True))
        metrics = {"layers": float(len(errors)), "layer_error_rounded": before,
                   "layer_error_learned": after}  # fmt: skip
        return Result(editor.finish(), tuple(actions), metrics)


def _is_rectified(layer: Layer) -> bool:
    users = list(layer.node.users)
    return len(users) == 1 and users[0].target in (aten.relu.default, aten.relu_.default)


@dataclass(frozen=True)
class _Method:
    options: AdaquantOptions
    rectified: dict[str, bool]
    with_bias: dict[str, bool]

    def gather(self, site: Site) -> adaquant.Samples:
        low, high, count = 0.0, 0.0, 0
        for x, real in zip(site.inputs(), site.real, strict=True):
            flat = self._without_padding(site, x, real).flatten(1)
            low, high = low + float(flat.amin(1).sum()), high + float(flat.amax(1).sum())
            count += len(x)
        now = list(self._parts(site, site.inputs(), site.rows()))
        then = list(self._parts(site, site.original_inputs(), site.original_rows()))
        return adaquant.Samples(now, then, low / max(count, 1), high / max(count, 1))

    def _without_padding(self, site: Site, x: Tensor, real: Tensor | None) -> Tensor:
        """Samples with zeros, which any range holds, in the place of padding tokens."""
        if real is not None and x.dim() >= 3 and x.shape[:2] == real.shape:
            return x.where(real.reshape(*real.shape, *[1] * (x.dim() - 2)), 0.0)
        return without_padding(site.geometry, x, real)

    def _parts(
        self, site: Site, values: Iterator[Tensor], rows: Iterator[Tensor]
    ) -> Iterator[Tensor]:
        """Images as they are; rows (n, k) of the rest, without padding, evenly thinned to a
        bounded number."""
        if site.geometry.is_convolution:
            yield from values
            return
        found = [x[0] for x in rows]
        total = sum(len(x) for x in found)
        step = max(1, -(-total // MOST_ROWS))
        yield torch.cat([x[::step] for x in found])  # none of an expert that no token went to

    def solve(self, task: Task) -> Solved:
        o, g = self.options, task.geometry
        samples: adaquant.Samples = task.stats
        is_depthwise = g.is_convolution and g.groups > 1 and g.shape[1] == 1
        bits = DEPTHWISE_BITS if is_depthwise else o.bits
        inputs = o.activation_bits and (DEPTHWISE_BITS if is_depthwise else o.activation_bits)
        settings = adaquant.AdaquantSettings(
            bits, inputs, block_for(g.depth, o.block), o.symmetric,
            o.iterations if any(len(x) for x in samples.now) else 0, o.batch_size,
            o.lr, o.bias_lr, o.range_lr, o.input_lr, o.method,
        )  # fmt: skip
        if not g.is_convolution:
            settings = replace(settings, batch=_rows_per_step(samples.now, o.batch_size))
        bias = task.bias
        learns_bias = o.method == "adam" and self.with_bias[task.name]
        if bias is None and learns_bias:
            bias = torch.zeros(g.out, device=task.weight.device)
        learned = adaquant.learn(
            g, task.weight, bias, samples, settings, self.rectified[task.name], task.seed
        )
        zero = None if o.symmetric else learned.zero
        blocks = pack(learned.codes, learned.scale, zero, bits, settings.block)
        value = blocks.value()
        state = {"codes": blocks.codes, "scale": blocks.scale}
        if blocks.zero_point is not None:
            state["zero_point"] = blocks.zero_point
        info = {"bits": float(bits), "block": float(blocks.block), "columns": float(blocks.columns),
                "before": learned.before, "after": learned.after}  # fmt: skip
        new_bias = learned.bias if learns_bias else None
        if new_bias is not None:
            new_bias = state["bias"] = new_bias.to(task.weight.dtype)
        if learned.grid is not None:
            state["grid"] = torch.tensor(learned.grid, dtype=torch.float64)
        weight = from_matrix(g, value.reshape(g.groups, -1, g.depth)).to(task.weight.dtype)
        return Solved(weight, new_bias, learned.grid, state, info)


def _rows_per_step(parts: Sequence[Tensor], samples: int) -> int:
    """A step of a layer on tokens reads as many rows as so many samples hold, within reason."""
    return int(min(max(samples, 256), sum(len(part) for part in parts)))


def _insert(editor: Editor, layer: Layer, solved: Solved, *, is_first: bool) -> None:
    state = solved.state
    if is_first:
        blocks = blocks_of(solved)
        is_integer = "grid" in state and blocks.bits == 8 and blocks.scale.shape[1] == 1
        is_integer = is_integer and blocks.zero_point is None
        replace_weight(editor, layer, _integers(blocks) if is_integer else rebuild_blocks(blocks))
    if "bias" in state:
        set_bias(editor, layer, state["bias"])
    if "grid" in state:
        scale, zero, low, high = state["grid"].tolist()
        node = next(n for n in editor.graph.nodes if n.name == layer.node.name)
        place = INPUT_ARGUMENT[layer.kind]
        args = list(node.args)
        args[place] = editor.call(
            ours.fake_quantize.default, args[place], scale, int(zero), int(low), int(high),
            before=node,
        )  # fmt: skip
        editor.set_args(node, *args, **node.kwargs)


def _integers(blocks: Blocks) -> Make:
    """8-bit codes around zero as int8, one scale per row: what integer kernels read."""

    def make(place: Insertion) -> torch.fx.Node:
        signed = (blocks.codes.flatten(1)[:, : blocks.columns].to(torch.int16) - 128).to(torch.int8)
        codes, scale = place.store("codes", signed), place.store("scale", blocks.scale[:, 0])
        return place.call(ours.dequantize.default, codes, scale, None, 0)

    return make


def _action(layer: Layer, solved: Solved) -> Action:
    info = solved.info
    what = f"int{int(info['bits'])}"
    if "grid" in solved.state:
        what += f" on int{int(solved.state['grid'][3] + 1).bit_length() - 1} inputs"
    what += f", relative error {info['before']:.2e} -> {info['after']:.2e}"
    return Action(layer.name, what)
