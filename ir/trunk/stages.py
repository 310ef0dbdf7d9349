"""A module of one network in the place of another's, and stitches between widths that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.program import Program

aten = torch.ops.aten
CONVOLVE = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}

STUDENT = "student."
"""Prefix of the tensors of a module that stands in another network."""

DEAD = 1e-10
"""Share of the largest variance below which a direction of channels is taken for dead."""

KEPT = ("nn_module_stack", "custom")
"""What a copied node keeps of its metadata: its module, and where dropouts go in training."""


@dataclass(frozen=True)
class Stitch:
    """An affine map of channels, the same at every position.

    Attributes:
        weight: (out, in).
        bias: (out,).
    """

    weight: Tensor
    bias: Tensor

    def after(self, first: Stitch) -> Stitch:
        """One map for `first` and then this one; computed in float64."""
        w, b = self.weight.detach().double(), self.bias.detach().double()
        bias = w @ first.bias.detach().double() + b
        return Stitch((w @ first.weight.detach().double()).to(self.weight), bias.to(self.bias))

    def put(self, editor: Editor, name: str, node: fx.Node, axis: int, before: fx.Node) -> fx.Node:
        """Adds it as a 1x1 convolution, or as a linear layer over the last axis.

        Args:
            editor: of the program.
            name: of the layer.
            node: whose value it maps.
            axis: of the channels.
            before: node to insert before.
        """
        dims = node.meta["val"].dim()
        is_last = axis == dims - 1
        weight = (
            self.weight if is_last else self.weight.reshape(*self.weight.shape, *[1] * (dims - 2))
        )
        stored = [
            editor.get(editor.add_state(f"{name}.{what}", nn.Parameter(tensor.detach().clone())))
            for what, tensor in (("weight", weight), ("bias", self.bias))
        ]
        target = aten.linear.default if is_last else CONVOLVE[dims]
        return editor.call(target, node, *stored, before=before, like=node)


@dataclass(frozen=True)
class Border:
    """The value between two modules, in the student and in the network it learns in.

    Attributes:
        node: of the student.
        meta: of the other network.
        axis: of the channels whose number differs; None where the shapes are the same.
        leave: from the student's channels to the other's; None without an axis.
        enter: back.
    """

    node: str
    meta: str
    axis: int | None = None
    leave: Stitch | None = None
    enter: Stitch | None = None


def differing_axis(student: fx.Node, meta: fx.Node) -> int | None:
    """The axis of channels in which two values differ; None where there is none.

    Raises:
        ModelError: they differ in something else.
    """
    ours, theirs = (
        [size if isinstance(size, int) else "free" for size in node.meta["val"].shape]
        for node in (student, meta)
    )
    if ours == theirs:
        return None
    axes = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    axis = axes[0]
    is_channels = axis == len(ours) - 1 or (axis == 1 and len(ours) in CONVOLVE)
    fixed = all(isinstance(shape[axis], int) for shape in (ours, theirs))
    if len(ours) != len(theirs) or len(axes) > 1 or not is_channels or not axis or not fixed:
        raise ModelError(
            f"the student's {student.name!r} has the shape {ours} where the teacher's "
            f"{meta.name!r} has {theirs}: no map of channels stitches them"
        )
    return axis


def fitted(source: Tensor, target: Tensor, axis: int) -> Stitch:
    """The affine map of channels with the least squared error.

    Args:
        source: (batch, ...), any shape with channels at `axis`.
        target: the same shape but for the channels.
        axis: of the channels.
    """
    x, y = (value.detach().movedim(axis, -1).flatten(0, -2).double() for value in (source, target))
    means = x.mean(0), y.mean(0)
    x = x - means[0]
    # of the solutions the least one: channels may be dead, or fewer samples than channels
    inverse = torch.linalg.pinv(x.T @ x, rtol=DEAD, hermitian=True)
    solution = inverse @ (x.T @ (y - means[1]))
    bias = means[1] - means[0] @ solution
    return Stitch(solution.T.to(target), bias.to(target))


def transplanted(
    meta: Program, student: Program, borders: Sequence[Border], place: int, by: str
) -> Program:
    """A network with the student's module in one place, between its stitches.

    The module's tensors have the prefix `student.`, the stitches are `stitch.enter` and
    `stitch.leave`.

    Args:
        meta: the network; left as it is.
        student: takes the same inputs.
        borders: behind every module but the last.
        place: of the module.
        by: id of the pass.

    Raises:
        ModelError: something but the value at the border goes from module to module.
    """
    editor = Editor(meta, by)
    nodes = {node.name: node for node in editor.graph.nodes}
    theirs = {node.name: node for node in student.graph.nodes}
    end = editor.graph.output_node()
    is_last = place == len(borders)
    before = end if is_last else nodes[borders[place].meta].next
    made: dict[fx.Node, fx.Node] = {}
    if place:
        border = borders[place - 1]
        value = nodes[border.meta]
        if border.enter is not None and border.axis is not None:
            value = border.enter.put(editor, "stitch.enter", value, border.axis, before)
        made[theirs[border.node]] = value
    inputs = {node.name: node for node in editor.graph.find_nodes(op="placeholder")}
    wanted = _outputs(student) if is_last else [theirs[borders[place].node]]
    _copy(editor, student, wanted, made, inputs, before)
    if is_last:
        editor.set_args(end, tuple(made[node] for node in wanted))
    else:
        border = borders[place]
        value = made[wanted[0]]
        if border.leave is not None and border.axis is not None:
            value = border.leave.put(editor, "stitch.leave", value, border.axis, before)
        editor.replace(nodes[border.meta], value)
    return editor.finish(propagate=True)


def refuse_other_ways(
    student: Program, borders: Sequence[Border], owner: Mapping[str, int]
) -> None:
    """Raises ModelError where more than the value at a border goes from module to module.

    What follows from the inputs alone (sizes, masks) may be used anywhere.

    Args:
        student: in modules.
        borders: behind every module but the last.
        owner: module that every tensor belongs to, that of its first use.
    """
    nodes = {node.name: node for node in student.graph.nodes}
    for place in range(1, len(borders) + 1):
        start = nodes[borders[place - 1].node]
        last = place == len(borders)
        wanted = _outputs(student) if last else [nodes[borders[place].node]]
        for node in _needed(wanted, {start}):
            tensor = student.state.get(str(node.target)) if node.op == "get_attr" else None
            if isinstance(tensor, nn.Parameter) and owner[str(node.target)] < place:
                raise ModelError(
                    f"module {place} uses {str(node.target)!r} of module "
                    f"{owner[str(node.target)]} past the border {start.name!r}: modules are "
                    "distilled one by one where one value goes from each to the next",
                    fix="Lower `modules`.",
                )


def stitched(student: Program, borders: Sequence[Border], by: str) -> Program:
    """The student with every pair of stitches, leaving and entering, as one layer `stitch.<n>`."""
    editor = Editor(student, by)
    nodes = {node.name: node for node in editor.graph.nodes}
    for number, border in enumerate(borders):
        if border.leave is None or border.enter is None or border.axis is None:
            continue
        node = nodes[border.node]
        both = border.enter.after(border.leave)
        layer = both.put(editor, f"stitch.{number}", node, border.axis, node.next)
        editor.replace(node, layer)
    return editor.finish(propagate=True)


def _outputs(program: Program) -> list[fx.Node]:
    """What the program gives."""
    flat: Any = program.graph.output_node().args[0]
    return list(flat)


def _needed(wanted: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """The wanted nodes and what they are computed from, up to the nodes of `stop`."""
    found: set[fx.Node] = set()
    stack = [node for node in wanted if node not in stop]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [other for other in node.all_input_nodes if other not in stop]
    return found


def _copy(
    editor: Editor,
    student: Program,
    wanted: Sequence[fx.Node],
    made: dict[fx.Node, fx.Node],
    inputs: Mapping[str, fx.Node],
    before: fx.Node,
) -> None:
    """Adds what the wanted nodes are computed from, and notes the copies in `made`."""
    needed = _needed(wanted, set(made))
    for node in student.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            made[node] = inputs[node.name]
        elif node.op == "get_attr":
            name = f"{STUDENT}{node.target}"
            if name not in editor.state:
                name = editor.add_state(name, student.state[str(node.target)])
            made[node] = editor.get(name)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: made[n])
            made[node] = editor.call(node.target, *args, before=before, **kwargs)
            made[node].meta.update({key: node.meta[key] for key in KEPT if key in node.meta})
