"""reparameterize.expand: a convolution becomes several branches, to be trained and folded again."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from graphwright.ir.calibration.observe import observe
from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import arguments
from graphwright.ir.layers.kinds import CONVOLUTIONS
from graphwright.ir.layers.products import input_node
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Targets
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Pass, Result
from graphwright.passes.reparameterize._branches import split
from graphwright.passes.reparameterize._branches.split import Geometry, Part

aten = torch.ops.aten

EPS = 1e-5
PLAIN = {n: getattr(aten, f"conv{n}d").default for n in (1, 2, 3)}
POOLS = {n: getattr(aten, f"avg_pool{n}d").default for n in (1, 2, 3)}


class ExpandOptions(Targets):
    """Options of reparameterize.expand."""

    form: Literal["repvgg", "mobileone", "acnet", "dbb"] = "repvgg"
    """Whose branches: a 1x1 kernel and an identity; several kernels besides; strips; or a 1x1
    kernel, a sequence and a pooling."""

    copies: Annotated[int, Field(ge=2, le=8)] = 4
    """For `mobileone`: equal kernels side by side."""

    statistics: Literal["unit", "measured"] = "unit"
    """Running statistics of the batch norms: mean 0 and variance 1, or those of the branches on
    calibration data, with which the function is nearly the same in training mode too."""


class Expand(Pass[ExpandOptions]):
    """Replaces convolutions by branches with batch norms, equal in sum to what they were.

    Every branch gets a share of the kernel's taps that it has, and its norm undoes itself at the
    start: gamma = sqrt(var + eps), beta = mean. In training mode a norm goes by the statistics of
    the batch, so training starts from the same function only as far as the running statistics
    agree with them (`statistics: measured`). `tune.finetune` trains the branches;
    `reparameterize.<form>` folds them again.

    Strided, grouped and dilated convolutions are taken; a kernel without a tap at the result's own
    place, and a 1x1 kernel (but for `mobileone`), stay.

    Source: Ding et al. 2021, "RepVGG"; Vasu et al. 2023, "MobileOne"; Ding et al. 2019, "ACNet";
    Ding et al. 2021, "Diverse Branch Block" (here without norms inside a sequence). These train
    from scratch; the split of a trained kernel is ours.
    """

    contract = "identity_at_init"
    weights = "reformed"
    stores_weights = True
    before = ("quantize.*", "prune.*")
    needs_with = {("statistics", "measured"): "calibration"}  # noqa: RUF012

    def run(self, program: Program, context: Context) -> Result:
        editor = Editor(program, by=self.id)
        twin = dict(zip(program.graph.nodes, editor.graph.nodes, strict=True))
        parts: dict[Layer, list[Part]] = {}
        actions = []
        for layer in select(program, self.options.targets, CONVOLUTIONS):
            found = self._parts(program, layer, context)
            if isinstance(found, str):
                actions.append(Action.left(layer.name, found))
            else:
                parts[layer] = found
        moments = self._moments(program, parts, context)
        for layer, branches in parts.items():
            _insert(editor, layer, twin[layer.node], branches, moments.get(layer))
            actions.append(Action(layer.name, f"{len(branches)} branches"))
        return Result(editor.finish(), tuple(actions))

    def _parts(self, program: Program, layer: Layer, context: Context) -> list[Part] | str:
        if not layer.weight or isinstance(arguments(layer.node)["padding"], str):
            return "its weight is computed in the graph, or its padding is given as a word"
        if layer.node.meta["val"].dim() != program.state[layer.weight].dim():
            return "it runs without a batch axis"
        weight, own = program.state[layer.weight].detach().double(), _geometry(layer.node)
        at, form = split.centre(weight.shape[2:], own), self.options.form
        if form != "mobileone" and all(size == 1 for size in weight.shape[2:]):
            return "a 1x1 kernel has no smaller one"
        if at is None:
            return "no tap of its kernel reads the result's own place"
        if form == "mobileone":
            generator = context.generator("copies", layer.name)
            return split.mobileone(weight, at, own, self.options.copies, generator)
        return {"repvgg": split.repvgg, "acnet": split.acnet, "dbb": split.dbb}[form](
            weight, at, own
        )

    def _moments(
        self, program: Program, parts: dict[Layer, list[Part]], context: Context
    ) -> dict[Layer, list[tuple[Tensor, Tensor]]]:
        """(mean, variance) of every branch by layer; empty without calibration."""
        if self.options.statistics == "unit":
            return {}
        seen = {layer: _Moments(branches, _geometry(layer.node))
                for layer, branches in parts.items()}  # fmt: skip
        by_input: dict[str, _All] = {}
        for layer, moments in seen.items():
            by_input.setdefault(input_node(layer).name, _All()).several.append(moments)
        observe(program, by_input, context.batches, context.progress)
        return {layer: moments.found() for layer, moments in seen.items()}


class _All:
    """Several observers of one value."""

    def __init__(self) -> None:
        self.several: list[_Moments] = []

    def update(self, x: Tensor) -> None:
        for one in self.several:
            one.update(x)


class _Moments:
    """Mean and variance of the channels of what each branch of a layer gives."""

    def __init__(self, parts: list[Part], own: Geometry) -> None:
        self.parts, self.own = parts, own
        self.sums: list[Any] = [[0.0, 0.0, 0] for _ in parts]

    def update(self, x: Tensor) -> None:
        for part, sums in zip(self.parts, self.sums, strict=True):
            y = part.result(x.detach(), self.own).double().movedim(1, 0).flatten(1)
            sums[0] = sums[0] + y.sum(1)
            sums[1] = sums[1] + y.square().sum(1)
            sums[2] += y.shape[1]

    def found(self) -> list[tuple[Tensor, Tensor]]:
        means = [sums[0] / sums[2] for sums in self.sums]
        squares = [sums[1] / sums[2] for sums in self.sums]
        return [(m, (s - m.square()).clamp_min(0)) for m, s in zip(means, squares, strict=True)]


def _insert(
    editor: Editor,
    layer: Layer,
    node: fx.Node,
    parts: list[Part],
    moments: list[tuple[Tensor, Tensor]] | None,
) -> None:
    given, own = arguments(node), _geometry(node)
    old = editor.state[layer.weight]
    total = None
    for number, part in enumerate(parts):
        place = f"{layer.name}.branch{number}"
        y = _branch(editor, part, given["input"], own, place, node, old)
        size = len(part.scale) if part.scale is not None else int(y.meta["val"].shape[1])
        mean, variance = moments[number] if moments else (torch.zeros(size), torch.ones(size))
        gain = part.scale if part.scale is not None else torch.ones(size, dtype=torch.float64)
        shift = mean.double() * gain
        if number == 0 and given["bias"] is not None:
            shift = shift + editor.state[str(given["bias"].target)].detach().double()
        gamma = gain * torch.sqrt(variance.double() + EPS)
        stored = [
            _store(editor, f"{place}.norm.{name}", value, old, is_parameter=is_parameter)
            for name, value, is_parameter in (
                ("weight", gamma, True), ("bias", shift, True),
                ("running_mean", mean, False), ("running_var", variance, False),
            )
        ]  # fmt: skip
        y = editor.call(aten.batch_norm.default, y, *stored, False, 0.1, EPS, False,
                        before=node, like=node)  # fmt: skip
        total = y if total is None else editor.call(
            aten.add.Tensor, total, y, before=node, like=node
        )  # fmt: skip
    assert total is not None
    editor.replace(node, total)


def _branch(
    editor: Editor, part: Part, x: fx.Node, own: Geometry, place: str, node: fx.Node, old: Tensor
) -> fx.Node:
    axes = len(own.stride)
    ones, zeros = [1] * axes, [0] * axes
    if part.first is not None:
        weight = _store(editor, f"{place}.first.weight", part.first, old)
        x = editor.call(PLAIN[axes], x, weight, None, ones, zeros, ones, own.groups,
                        before=node, like=node)  # fmt: skip
    if part.pool:
        return editor.call(POOLS[axes], x, list(part.pool), list(own.stride), list(part.padding),
                           before=node, like=node)  # fmt: skip
    if part.weight is None:
        return x
    weight = _store(editor, f"{place}.weight", part.weight, old)
    return editor.call(PLAIN[axes], x, weight, None, list(own.stride), list(part.padding),
                       list(own.dilation), own.groups, before=node, like=node)  # fmt: skip


def _store(
    editor: Editor, name: str, value: Tensor, old: Tensor, *, is_parameter: bool = True
) -> fx.Node:
    made = value.to(dtype=old.dtype, device=old.device).contiguous()
    if is_parameter:
        made = nn.Parameter(made, requires_grad=old.requires_grad)
    return editor.get(editor.add_state(name, made))


def _geometry(node: fx.Node) -> Geometry:
    given = arguments(node)
    axes = node.args[1].meta["val"].dim() - 2  # type: ignore[union-attr]

    def each(name: str) -> tuple[int, ...]:
        value = given[name]
        values = [value] if isinstance(value, int) else list(value)
        return tuple(int(v) for v in (values * axes if len(values) == 1 else values))

    return Geometry(each("stride"), each("padding"), each("dilation"), int(given["groups"]))
