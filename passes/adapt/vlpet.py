"""adapt.vlpet: sub-layers of an encoder under a gate, and a bypass for a decoder's values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import fx

from graphwright.ir.adapters.branch import Branch, results
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.nodes import adapter_of
from graphwright.ir.layers.heads import attentions
from graphwright.ir.layers.kinds import INPUT_ARGUMENT, KINDS, MATRICES, PRODUCTS
from graphwright.ir.layers.selectors import Layer, layers, select
from graphwright.ir.options import Selector
from graphwright.ir.program import Program
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass
from graphwright.passes.adapt._form.low_rank import matrix_shape
from graphwright.passes.base import Action, Context, Result

aten = torch.ops.aten

DEVIATION = 0.02
"""Of the normal numbers that weights start from, as in the language models that the paper tunes."""

Count = Annotated[int, Field(ge=1)]


class VlpetOptions(AdapterOptions):
    """Options of adapt.vlpet."""

    values: Selector = ()
    """Layers that make the values of a decoder's cross-attention, which get a bypass: selector
    patterns."""

    gate: Literal["large", "middle_x", "middle_y", "small"] = "large"
    """What the gate tells apart: tokens and channels (`large`), tokens (`middle_x`), channels
    (`middle_y`), or samples alone (`small`)."""

    width: Count = 96
    """Values of the hidden layer beside a sub-layer."""

    gate_width: Count = 96
    """Values of the hidden layer of a large gate."""

    value_width: Count = 96
    """Values of the hidden layer of the bypass."""

    mask: str = ""
    """For `small`: input with the attention mask (batch, tokens), 0 where a token is padding, which
    has no part in the mean over tokens then. All tokens count when empty."""


class Vlpet(AdapterPass[VlpetOptions]):
    """Puts a small network and a gate between a sub-layer of an encoder and its residual sum.

    With x what goes around the sub-layer and h what the sub-layer gives, h' = h + U gelu(D h) and
    x + G h' is what the sum becomes. The gate G is sigmoid(W2 gelu(W1 x)) (large),
    sigmoid(w (x + h')) (middle_x), 1 + g (middle_y) or the mean over tokens of sigmoid(w [x; h'])
    (small). In a decoder, the values of cross-attention get V e + U gelu(D e) beside their layer.
    `targets` are the last layers of the encoder's attention and feed-forward blocks, `values` those
    of the decoder's values; the paper trains the encoder's norms too (`also_train`). Gates start at
    about a half, so that the function changes at once (middle_y keeps it nearly). It is no linear
    change, and stays in the graph.

    Source: Hu et al. 2023, "VL-PET: Vision-and-Language Parameter-Efficient Tuning via Granularity
    Control", equations 2 to 10. The heads of D there are its rows: one matrix does the same.
    Padding has no part in the mean of a small gate when `mask` is given (the published code counts
    it).
    """

    papers = ("P36",)
    contract = "lossy"
    weights = "trained"
    kinds = MATRICES

    def run(self, program: Program, context: Context) -> Result:
        """Adapts the chosen sub-layers and values; see the class.

        Raises:
            ModelError: no chosen output goes into a residual sum, or `values` names layers that
                make no values of cross-attention.
            ArgumentError: `mask` is no input with a number per token.
        """
        options = self.options
        values = select(program, options.values, self.kinds) if options.values else []
        for layer in values:
            _check_cross(program, layer, self.id)
        bypassed = frozenset(layer.name for layer in values)
        targets = select(program, options.targets, self.kinds) if options.targets else []
        gated = [layer for layer in targets if layer.name not in bypassed]
        kept = [layer for layer in gated if _residual(_tip(layer), layer.node) is not None]
        left = [Action.left(layer.name, "its output goes into no residual sum")
                for layer in gated if layer not in kept]  # fmt: skip
        if gated and len(left) == len(gated):
            raise ModelError(
                f"{self.id}: no selected layer's output goes into a residual sum",
                fix="Target the last layers of the encoder's attention and feed-forward blocks.",
            )
        self._check_tokens(program, gated)
        chosen, actions = self.sorted_out(program, [*kept, *values])
        return self.insert(program, context, chosen, left + actions, bypassed)

    def _check_tokens(self, program: Program, gated: Sequence[Layer]) -> None:
        """Refuses a gate per sample where there are no tokens, or a mask that is none of them."""
        options = self.options
        if options.mask and options.gate != "small":
            raise ArgumentError(f"{self.id}: mask has no part in a {options.gate} gate")
        sizes = [tuple(layer.node.meta["val"].shape) for layer in gated]
        if options.gate == "small" and any(len(size) != 3 for size in sizes):
            raise ModelError(f"{self.id}: a small gate takes outputs (batch, tokens, channels)")
        if not options.mask:
            return
        inputs = {spec.name: spec for spec in program.signature.inputs}
        if options.mask not in inputs:
            raise ArgumentError(f"{self.id}: the program has no input {options.mask!r}",
                                fix=f"It has {', '.join(inputs)}.")  # fmt: skip
        node = next(n for n in program.graph.nodes if n.name == options.mask)
        shape = tuple(node.meta["val"].shape)
        if any(shape != size[:2] for size in sizes):
            raise ArgumentError(
                f"{self.id}: the input {options.mask!r} has shape "
                f"{inputs[options.mask].shape}, and not a number for every token of the targets"
            )

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        options = self.options
        out, columns = matrix_shape(layer)
        if layer.name in branch.found:
            change = _network(branch, "", branch.input, (columns, options.value_width, out),
                              generator)  # fmt: skip
            branch.finish(branch.add(aten.add.Tensor, branch.tip, change))
            return f"{columns} -> {options.value_width} -> {out} beside the values"
        x = _residual(branch.tip, branch.call)
        assert x is not None  # `run` has left out the others
        sizes = (out, options.width, out)
        change = _network(branch, "", branch.tip, sizes, generator)
        h = branch.add(aten.add.Tensor, branch.tip, change)
        gate = self._gate(branch, x, h, out, generator)
        branch.finish(branch.add(aten.mul.Tensor, h, gate))
        return f"{out} -> {options.width} -> {out}, a {options.gate} gate"

    def _gate(
        self, branch: Branch, x: fx.Node, h: fx.Node, size: int, generator: torch.Generator
    ) -> fx.Node:
        """The gate: (..., tokens, channels), with 1 in the place of what it does not tell apart."""
        options = self.options
        if options.gate == "middle_y":
            start = DEVIATION * torch.randn(size, generator=generator)
            return branch.add(aten.add.Scalar, branch.parameter("gate", start), 1.0)
        if options.gate == "large":
            sizes = (size, options.gate_width, size)
            gate = _network(branch, "gate_", x, sizes, generator)
            return branch.add(aten.sigmoid.default, gate)
        if options.gate == "middle_x":
            reads = branch.add(aten.add.Tensor, x, h)
        else:
            reads = branch.add(aten.cat.default, [x, h], -1)
        width = size if options.gate == "middle_x" else 2 * size
        gate = _linear(branch, "gate", reads, width, 1, generator)
        gate = branch.add(aten.sigmoid.default, gate)
        return gate if options.gate == "middle_x" else self._mean(branch, gate)

    def _mean(self, branch: Branch, gate: fx.Node) -> fx.Node:
        """The mean over tokens (batch, 1, 1)."""
        if not self.options.mask:
            return branch.add(aten.mean.dim, gate, [-2], True)
        mask = next(n for n in branch.editor.graph.nodes if n.name == self.options.mask)
        weights = branch.add(aten.unsqueeze.default, mask, -1)
        weights = branch.add(aten.to.dtype, weights, branch.dtype)
        total = branch.add(aten.sum.dim_IntList, branch.add(aten.mul.Tensor, gate, weights), [-2],
                           True)  # fmt: skip
        count = branch.add(aten.sum.dim_IntList, weights, [-2], True)
        return branch.add(aten.div.Tensor, total, branch.add(aten.clamp.default, count, 1.0))


def _network(
    branch: Branch,
    prefix: str,
    x: fx.Node,
    sizes: tuple[int, int, int],
    generator: torch.Generator,
) -> fx.Node:
    """U gelu(D x + d) + u, with the tanh form of gelu."""
    reads, width, out = sizes
    hidden = _linear(branch, f"{prefix}down", x, reads, width, generator)
    hidden = branch.add(aten.gelu.default, hidden, approximate="tanh")
    return _linear(branch, f"{prefix}up", hidden, width, out, generator)


def _linear(
    branch: Branch, part: str, x: fx.Node, reads: int, out: int, generator: torch.Generator
) -> fx.Node:
    weight = DEVIATION * torch.randn(out, reads, generator=generator)
    stored = branch.parameter(part, weight), branch.parameter(f"{part}_bias", torch.zeros(out))
    return branch.add(aten.linear.default, x, *stored)


def _tip(layer: Layer) -> fx.Node:
    """The layer's output, behind the adapters that are there."""
    return [layer.node, *results(layer.node, layer.name)][-1]


def _residual(tip: fx.Node, call: fx.Node) -> fx.Node | None:
    """What a layer's output is added to: the other operand of the one sum that reads it."""
    if len(tip.users) != 1:
        return None
    total = next(iter(tip.users))
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    one, other = total.args
    around = other if one is tip else one
    if not isinstance(around, fx.Node) or around is tip:
        return None
    if around.meta["val"].shape != tip.meta["val"].shape:
        return None
    order = list(call.graph.nodes)
    return around if order.index(around) < order.index(call) else None


def _check_cross(program: Program, layer: Layer, by: str) -> None:
    """Refuses a layer that makes no values, or those of what the queries are made of too."""
    queries = {q for q, _, v in attentions(program.graph) if layer.node in _made_by(v)}
    if not queries:
        raise ModelError(f"{by}: no attention reads values from {layer.name!r}")
    places = {other.node: INPUT_ARGUMENT[other.kind] for other in layers(program)}
    read = {made.args[places[made]] for q in queries for made in _made_by(q) if made in places}
    if layer.node.args[places[layer.node]] in read:
        raise ModelError(
            f"{by}: {layer.name!r} makes values of self-attention, and not of cross-attention",
            fix="A model without a decoder has no `values`.",
        )


def _made_by(node: Any) -> set[fx.Node]:
    """The products that a value is made of, with nothing but views and arithmetic between."""
    found: set[fx.Node] = set()
    stack, seen = [node], set()
    while stack:
        made = stack.pop()
        if not isinstance(made, fx.Node) or made in seen:
            continue
        seen.add(made)
        if KINDS.get(made.target) in PRODUCTS and not adapter_of(made):
            found.add(made)
        else:
            stack.extend(made.all_input_nodes)
    return found
