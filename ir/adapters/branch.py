"""The place of an adapter beside a layer: nodes that read its input and change its output.

The layer's own call stays as it is, so that every pass that quantizes, prunes or calibrates sees
the layer it knows. The nodes of an adapter carry its name (`adapter_of`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.graph.nodes import adapter_of, full_arguments, gw_meta, set_gw_meta
from graphwright.ir.layers.kinds import BIAS_ARGUMENT, INPUT_ARGUMENT, WEIGHT_ARGUMENT
from graphwright.ir.layers.selectors import Layer

aten = torch.ops.aten


class Branch:
    """One layer that an adapter is put beside.

    Attributes:
        editor: of the copy that is edited.
        name: of the adapter.
        layer: that is adapted.
        call: the layer's own call, in the editor's graph.
        tip: the value that stands for the layer's output so far: its call, or the result of an
            adapter that is there already.
        parts: names of the tensors stored so far, by their part.
        shared: names of the tensors stored for all layers together, by their part.
        scale: factor of the change, which merging and other formats ask for.
        residual: whether a part of the weight has moved into the adapter.
        found: what the pass has found for all layers together, before the first.
    """

    def __init__(self, editor: Editor, name: str, layer: Layer, found: Any = None) -> None:
        self.editor = editor
        self.found = found
        self.name = name
        self.layer = layer
        self.call = next(n for n in editor.graph.nodes if n.name == layer.node.name)
        self.tip = [self.call, *results(self.call, layer.name)][-1]
        self.parts: dict[str, str] = {}
        self.shared: dict[str, str] = {}
        self.scale = 1.0
        self.residual = False
        self._made: list[fx.Node] = []
        self._after = self.tip

    # ---- what is there

    @property
    def input(self) -> fx.Node:
        """The activation that the layer reads."""
        node = self.call.args[INPUT_ARGUMENT[self.layer.kind]]
        assert isinstance(node, fx.Node)
        return node

    @property
    def weight(self) -> fx.Node:
        """The layer's weight: stored, or rebuilt in the graph."""
        node = self.call.args[WEIGHT_ARGUMENT[self.layer.kind]]
        assert isinstance(node, fx.Node)
        return node

    @property
    def arguments(self) -> list[Any]:
        """All arguments of the layer's call, defaults filled in."""
        return full_arguments(self.call)[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's weight."""
        dtype: torch.dtype = self.weight.meta["val"].dtype
        return dtype

    def bias(self) -> fx.Node | None:
        """The layer's bias."""
        place = BIAS_ARGUMENT.get(self.layer.kind)
        node = None if place is None else self.arguments[place]
        return node if isinstance(node, fx.Node) else None

    # ---- what is put in

    def parameter(self, part: str, tensor: Tensor) -> fx.Node:
        """Stores a tensor that is trained, in the dtype of the weight."""
        return self._store(part, nn.Parameter(tensor.detach().to(self.dtype).contiguous()))

    def constant(self, part: str, tensor: Tensor) -> fx.Node:
        """Stores a tensor that stays as it is."""
        return self._store(part, tensor.detach().contiguous())

    def _store(self, part: str, tensor: Tensor) -> fx.Node:
        # one part is one tensor, whichever calls of the layer read it
        owner = self.layer.name
        is_module = owner not in self.editor.state  # and not a parameter of the root module
        name = f"{owner}{'.' if is_module else '_'}{part}.{self.name}"
        if name not in self.editor.state:
            name = self.editor.add_state(name, tensor)
        self.parts[part] = name
        return self.editor.get(name)

    def add(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        """Adds a call behind the ones before it, marked with the adapter's name."""
        after = self._after.next
        while after.op in ("placeholder", "get_attr"):
            after = after.next
        node = self.editor.call(target, *args, before=after, like=self.call, **kwargs)
        set_gw_meta(node, adapter=self.name)
        self._after = node
        self._made.append(node)
        return node

    def dropped(self, p: float, *readers: fx.Node) -> None:
        """Lets `readers` see the layer's input through one dropout while the program trains."""
        self.dropped_from(self.input, p, *readers)

    def dropped_from(self, source: fx.Node, p: float, *readers: fx.Node) -> None:
        """Lets `readers` see a value through one dropout while the program trains."""
        if p:
            entries = gw_meta(source).get("dropout") or ()
            names = [reader.name for reader in readers]
            set_gw_meta(source, dropout=[*entries, ["dropout", p, names]])

    def before(self, target: object, *args: object) -> fx.Node:
        """Adds a call in front of the layer's own."""
        node = self.editor.call(target, *args, before=self.call, like=self.call)
        set_gw_meta(node, adapter=self.name)
        return node

    def read_weight(self, node: fx.Node) -> None:
        """Lets the layer's call read its weight from a node that is computed from it."""
        self.call.update_arg(WEIGHT_ARGUMENT[self.layer.kind], node)

    def scale_input(self, factor: fx.Node) -> None:
        """Lets the layer read its input times a factor, and nothing else change."""
        self.read_input(self.before(aten.mul.Tensor, self.input, factor), steps=1)

    def read_input(self, node: fx.Node, *, steps: int) -> None:
        """Lets the layer's call read its input from a node that is computed from it.

        Args:
            node: the last of the calls put in front.
            steps: how many they are; each has the one before, or the input, for first argument.
        """
        set_gw_meta(node, adapter_of=self.layer.name, steps=steps)
        self.call.update_arg(INPUT_ARGUMENT[self.layer.kind], node)

    def finish(self, result: fx.Node) -> None:
        """Lets every reader of the layer's output read `result` instead."""
        made = set(self._made)
        set_gw_meta(result, adapter_of=self.layer.name)
        if dropout := gw_meta(self.tip).get("dropout"):
            set_gw_meta(result, dropout=dropout)
            set_gw_meta(self.tip, dropout=None)
        self.tip.replace_all_uses_with(result, delete_user_cb=lambda user: user not in made)


def stored_weight(call: fx.Node, place: int) -> fx.Node:
    """The weight that a call reads, below what adapters compute from it."""
    node = call.args[place]
    assert isinstance(node, fx.Node)
    while adapter_of(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def results(call: fx.Node, layer: str) -> list[fx.Node]:
    """What adapters have put in the place of a call's output, the first one first."""
    found: list[fx.Node] = []
    tip = call
    while (result := _behind(tip, layer)) is not None:
        found.append(result)
        tip = result
    return found


def _behind(tip: fx.Node, layer: str) -> fx.Node | None:
    """The result of the adapter that reads `tip` as the output of `layer`."""
    stack, seen = [user for user in tip.users if adapter_of(user)], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        owner = gw_meta(node).get("adapter_of")
        if owner == layer:
            return node
        if owner is None:
            stack.extend(user for user in node.users if adapter_of(user) == adapter_of(node))
    return None
