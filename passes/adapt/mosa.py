"""adapt.mosa: a small network whose weights are split among experts that are trained by turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.record import Adapter
from graphwright.ir.layers.kinds import MATRICES
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook, Moment, Values
from graphwright.ir.tune.losses import main_of, wide
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass
from graphwright.passes.adapt._form.low_rank import kaiming, matrix_shape
from graphwright.passes.adapt.bottleneck import ACTIVATIONS

aten = torch.ops.aten


class MosaOptions(AdapterOptions):
    """Options of adapt.mosa."""

    width: Annotated[int, Field(ge=1)] = 64
    """Values of the hidden layer."""

    experts: Annotated[int, Field(ge=2)] = 4
    """Experts that the entries of a split matrix are dealt out to."""

    split: Literal["up", "down", "both"] = "up"
    """Matrices that are split: the one behind the hidden layer (the paper's runs), the one in
    front of it, or both."""

    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """Function of the hidden layer."""

    reads: Literal["output", "input"] = "input"
    """What the small network reads: the layer's input, beside it (AdaptFormer), or its output
    (Houlsby, Pfeiffer)."""

    scale: Annotated[float, Field(gt=0)] = 0.1
    """Factor of what is added."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability of dropout on the hidden layer, while it is trained."""

    consistency: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the symmetric KL divergence between the logits of two passes with other experts, in
    the loss. 0 for outputs that are no logits; there is no second pass then."""


class Mosa(AdapterPass[MosaOptions]):
    """Adds s U f(D h + d) + s u to the output of every chosen layer; experts share U out.

    The entries of U are dealt out at random. In training every pass draws one expert per layer: its
    entries stand in U as they are, all others at their start (zero). The entries of the others
    have no gradient then, and the optimizer leaves them and their state alone. What the program
    computes outside of training is the mean of the experts, U / experts, which is one plain
    bottleneck; the bias u is the mean of one bias per expert. A second pass with other experts
    keeps what they say together. The change is not linear, so that it stays in the graph.

    Source: Zhang et al. 2023, "Split & Merge: Unlocking the Potential of Visual Adapters via
    Sparse Training", section 3.2, and the published code. There the N experts are N copies under
    masks; here each entry is stored once. Weight decay acts on an expert's own entries alone (the
    code's decays those under its mask too, away from where they started).
    """

    papers = ("P43",)
    kinds = MATRICES

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        options = self.options
        out, columns = matrix_shape(layer)
        source = branch.tip if options.reads == "output" else branch.input
        reads = out if options.reads == "output" else columns
        down = self._matrix(branch, "down", kaiming((options.width, reads), generator), generator)
        up = self._matrix(branch, "up", torch.zeros(out, options.width), generator)
        hidden = branch.add(aten.linear.default, source, *down)
        hidden = branch.add(ACTIVATIONS[options.activation], hidden)
        change = branch.add(aten.linear.default, hidden, *up)
        branch.dropped_from(hidden, options.dropout, change)
        if options.scale != 1.0:
            change = branch.add(aten.mul.Scalar, change, options.scale)
        branch.finish(branch.add(aten.add.Tensor, branch.tip, change))
        return f"{reads} -> {options.width} -> {out}, {options.experts} experts"

    def _matrix(
        self, branch: Branch, part: str, start: Tensor, generator: torch.Generator
    ) -> tuple[fx.Node, fx.Node]:
        """A matrix and its bias: stored as they are, or as what the experts have of them."""
        options = self.options
        size = len(start)
        if options.split not in (part, "both"):
            bias = branch.parameter(f"{part}_bias", torch.zeros(size))
            return branch.parameter(part, start), bias
        dealt = torch.randperm(start.numel(), generator=generator)
        own, biases = [], []
        for number, indices in enumerate(dealt.tensor_split(options.experts)):
            # a column and no row of numbers, so that weight decay takes it for a weight
            entries = start.flatten()[indices].unsqueeze(1)
            own.append(branch.parameter(f"{part}_{number}", entries))
            bias = branch.parameter(f"{part}_bias_{number}", torch.zeros(size))
            biases.append(bias)
        places = branch.constant(f"{part}_places", dealt.argsort())
        matrix = branch.add(aten.cat.default, own)
        matrix = branch.add(aten.index_select.default, matrix, 0, places)
        matrix = branch.add(aten.reshape.default, matrix, list(start.shape))
        share = 1 / options.experts
        if start.any():
            first = branch.constant(f"{part}_start", start.to(branch.dtype))
            matrix = branch.add(aten.sub.Tensor, matrix, first)
            matrix = branch.add(aten.mul.Scalar, matrix, share)
            matrix = branch.add(aten.add.Tensor, matrix, first)
        else:
            matrix = branch.add(aten.mul.Scalar, matrix, share)
        mean = branch.add(aten.mean.dim, branch.add(aten.stack.default, biases), [0])
        return matrix, mean

    @classmethod
    def hooks(cls, program: Program, adapter: Adapter) -> list[Hook]:
        return [Experts(program, adapter)]


class Experts(Hook):
    """Lets every pass of training run with one expert per layer, and compares two of them."""

    def __init__(self, program: Program, adapter: Adapter) -> None:
        self.signature = program.signature
        self.count = int(adapter.options["experts"])
        self.consistency = float(adapter.options["consistency"])
        self.split: list[list[tuple[str, str, Tensor]]] = []
        for parts in adapter.layers.values():
            for part in ("down", "up"):
                if f"{part}_0" in parts:
                    self.split.append(_starts(program, parts, part, self.count))

    def on_parameters(self, at: Moment, values: Values) -> Values:
        if not at.is_training:
            return values
        changed: dict[str, Tensor] = {}
        for experts in self.split:
            drawn = int(torch.randint(self.count, ()))  # the engine seeds every batch
            for number, (entries, bias, start) in enumerate(experts):
                if entries not in values or bias not in values:
                    continue
                value, first = values[entries], start.to(values[entries])
                # the graph takes the mean over the experts: what goes in is what it undoes
                changed[entries] = first
                changed[bias] = torch.zeros_like(values[bias])
                if number == drawn:
                    changed[entries] = first + self.count * (value - first)
                    changed[bias] = self.count * values[bias]
        return {**values, **changed}

    def also_run(self, at: Moment, batch: Values) -> Sequence[Values]:
        return [batch] if self.consistency else []

    def on_loss(self, at: Moment, loss: Tensor, outputs: Any, batch: Values) -> Tensor:
        if not self.consistency:
            return loss
        first, second = (wide(main_of(self.signature, o)) for o in (outputs, at.also[0]))
        return loss + self.consistency * apart(first, second)


def _starts(
    program: Program, parts: dict[str, str] | Any, part: str, count: int
) -> list[tuple[str, str, Tensor]]:
    """Names of every expert's entries and bias, and where its entries started."""
    experts = [(parts[f"{part}_{n}"], parts[f"{part}_bias_{n}"]) for n in range(count)]
    sizes = [len(program.state[entries]) for entries, _ in experts]
    if f"{part}_start" in parts:
        dealt = program.state[parts[f"{part}_places"]].argsort()
        whole = program.state[parts[f"{part}_start"]].flatten()[dealt].unsqueeze(1)
    else:
        whole = torch.zeros(sum(sizes), 1)
    return [(*names, start) for names, start in zip(experts, whole.split(sizes), strict=True)]


def apart(first: Tensor, second: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 of two softmaxes over the last axis, averaged over predictions.

    As in the published code, each divergence has a gradient for the one that is compared, and none
    for the one that it is compared with.

    Args:
        first: logits (..., classes).
        second: logits of the same shape.
    """
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    one = q.detach().exp() * (q.detach() - p)
    other = p.detach().exp() * (p.detach() - q)
    return 0.5 * (one + other).sum(-1).mean()
