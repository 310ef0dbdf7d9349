"""Puts a rebuilt weight in the place of a stored one, for every compressed form of a weight.

A method compresses a weight as a matrix (out, columns), and an op rebuilds that matrix. What
stands between the matrix and the weight that a layer wants is the same for all of them: a
transposition for a matmul, a reshape for a convolution, nothing for a linear layer or a table. The
matrices of a stack of experts lie one below the other, as rows of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.layers.kinds import EXPERTS, SEVERAL, TURNED, TURNED_EXPERTS, at_place
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.stored.blocks import Blocks

aten = torch.ops.aten
ours = torch.ops.graphwright

Make = Callable[["Insertion"], fx.Node]
"""Makes the nodes that rebuild a matrix (out, columns), and returns the last."""


class Insertion:
    """The place for nodes that rebuild one weight, and the names of their tensors.

    Attributes:
        editor: of the copy that is edited.
        before: node that they are inserted before.
        like: node whose module scope they inherit.
        old: the weight's node so far; a method may build on its value.
        kind: kind of the layer.
        owner: name of the stored weight that the new tensors are named after.
    """

    def __init__(
        self, editor: Editor, before: fx.Node, like: fx.Node, old: fx.Node, kind: str, owner: str
    ) -> None:
        self.editor = editor
        self.before = before
        self.like = like
        self.old = old
        self.kind = kind
        self.owner = owner

    def store(self, part: str, tensor: Tensor) -> fx.Node:
        """Adds a tensor under a name made of the owner's and `part`, and returns its node.

        A tied weight keeps all its names.
        """
        editor = self.editor
        name = editor.add_state(part_of(self.owner, part), tensor)
        tied = editor.program.aliases.get(self.owner, ())
        if len(tied) > 1:
            others = [part_of(other, part) for other in tied if other != self.owner]
            aliases = {**editor.program.aliases, name: (name, *others)}
            editor.program = editor.program.replace(aliases=aliases)
        return editor.get(name)

    def call(self, target: object, *args: object) -> fx.Node:
        """Inserts a call here."""
        return self.editor.call(target, *args, before=self.before, like=self.like)

    def old_matrix(self) -> fx.Node:
        """The weight so far as a matrix (out, columns)."""
        rebuilt = _rebuilt_matrix(self.old)
        if rebuilt is not None:
            return rebuilt
        if self.kind in TURNED:
            return self.call(aten.transpose.int, self.old, 0, 1)
        if self.kind in EXPERTS:
            turned = self.kind in TURNED_EXPERTS
            stack = self.call(aten.transpose.int, self.old, 1, 2) if turned else self.old
            return self.call(aten.reshape.default, stack, [-1, int(stack.meta["val"].shape[2])])
        if self.old.meta["val"].dim() == 2:
            return self.old
        out = int(self.old.meta["val"].shape[0])
        return self.call(aten.reshape.default, self.old, [out, -1])


def matrix_of(kind: str, weight: Tensor) -> Tensor:
    """A weight as the matrix (out, columns) that `replace_weight` takes; a view where it can be."""
    if kind in EXPERTS:
        stack = weight.transpose(1, 2) if kind in TURNED_EXPERTS else weight
        return stack.reshape(-1, stack.shape[2])
    return weight.t() if kind in TURNED else weight.reshape(weight.shape[0], -1)


def replace_weight(
    editor: Editor,
    layer: Layer,
    make: Make,
    *,
    matrix: bool = True,
    readers: Collection[fx.Node] | None = None,
) -> fx.Node:
    """Lets every use of a layer's weight read a rebuilt one; returns the node that they read now.

    The weight may be stored or itself rebuilt. All layers that are tied to it change with it, so
    that it is called once per weight, not once per layer.

    Args:
        editor: of a copy of the program that the layer was found in.
        layer: any layer that reads the weight.
        make: makes the nodes that rebuild the matrix, or the weight itself.
        matrix: `make` rebuilds the matrix (out, columns); else the weight in its own shape.
        readers: calls in the editor's graph that change; all readers of the weight when absent.
    """
    node = next(n for n in editor.graph.nodes if n.name == layer.node.name)
    old = at_place(node, layer.place)
    assert isinstance(old, fx.Node)
    shape = [int(size) for size in old.meta["val"].shape]
    place = Insertion(editor, _behind(editor, old), node, old, layer.kind, owner_of(layer, old))
    changing = list(old.users) if readers is None else [r for r in old.users if r in readers]
    new = make(place)
    if matrix and layer.kind in TURNED:
        new = place.call(aten.transpose.int, new, 0, 1)
    elif matrix and layer.kind in TURNED_EXPERTS:
        stack = place.call(aten.reshape.default, new, [shape[0], shape[2], shape[1]])
        new = place.call(aten.transpose.int, stack, 1, 2)
    elif matrix and len(shape) != 2:
        new = place.call(aten.reshape.default, new, shape)
    assert list(new.meta["val"].shape) == shape
    for reader in changing:
        reader.replace_input_with(old, new)
    if not old.users:
        editor.erase(old)
    return new


def replace_stored(editor: Editor, reader: fx.Node, old: fx.Node, make: Make) -> fx.Node:
    """Lets one call read a rebuilt tensor in the place of a stored one (a bias, for example)."""
    place = Insertion(editor, _behind(editor, old), reader, old, "", str(old.target))
    new = make(place)
    reader.replace_input_with(old, new)
    return new


def owner_of(layer: Layer, weight: fx.Node) -> str:
    """Name that the tensors of a layer's weight are named after."""
    if weight.op == "get_attr":
        return str(weight.target)
    return layer.name if layer.kind in (*EXPERTS, *SEVERAL) else f"{layer.name}.weight"


def rebuild_blocks(blocks: Blocks) -> Make:
    """Nodes of a weight in blocks: its stored tensors and `graphwright::dequantize_blocks`."""

    def make(place: Insertion) -> fx.Node:
        zero = blocks.zero_point
        return place.call(
            ours.dequantize_blocks.default,
            place.store("codes", blocks.codes),
            place.store("scale", blocks.scale),
            None if zero is None else place.store("zero_point", zero),
            blocks.bits,
            blocks.block,
            blocks.columns,
        )

    return make


def rebuild_channels(codes: Tensor, scale: Tensor, axis: int) -> Make:
    """Nodes of a tensor of int8 or int32 codes with one scale per channel of `axis`."""

    def make(place: Insertion) -> fx.Node:
        stored = place.store("codes", codes), place.store("scale", scale)
        return place.call(ours.dequantize.default, *stored, None, axis)

    return make


def rebuild_two_of_four(kept: Tensor, places: Tensor) -> Make:
    """Nodes of a matrix that is stored as the two values of every four, and their places."""

    def make(place: Insertion) -> fx.Node:
        stored = place.store("kept", kept), place.store("places", places)
        return place.call(ours.expand_2_4.default, *stored)

    return make


def part_of(owner: str, part: str) -> str:
    """`fc.weight` -> `fc.weight_codes`, and a parameter of the root module `w` -> `w.codes`.

    A layer is called after its stored tensor, up to the last dot: so it keeps its name.
    """
    return f"{owner}_{part}" if "." in owner else f"{owner}.{part}"


def _rebuilt_matrix(weight: fx.Node) -> fx.Node | None:
    """The matrix that an earlier `replace_weight` turned or reshaped; None where there is none."""
    if weight.target is aten.transpose.int and weight.args[1:] == (1, 2):
        assert isinstance(weight.args[0], fx.Node)
        return _rebuilt_matrix(weight.args[0])  # a stack (experts, in, out)
    is_turned = weight.target is aten.transpose.int and weight.args[1:] == (0, 1)
    if not is_turned and weight.target is not aten.reshape.default:
        return None
    matrix = weight.args[0]
    is_ours = getattr(getattr(matrix, "target", None), "namespace", "") == ours.name
    return matrix if isinstance(matrix, fx.Node) and is_ours else None


def _behind(editor: Editor, weight: fx.Node) -> fx.Node:
    """Behind everything stored, at the head of the graph; behind the weight when it is computed."""
    if weight.op != "get_attr":
        return weight.next
    first: fx.Node = next(n for n in editor.graph.nodes if n.op not in ("placeholder", "get_attr"))
    return first
