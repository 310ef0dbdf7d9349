"""The one way to change a graph: copies on entry, keeps metadata, hands back a new program."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from graphwright.ir.graph.fake import fake_call
from graphwright.ir.graph.nodes import copy_graph, fake_mode_of, gw_meta, set_gw_meta
from graphwright.ir.program import Program

aten = torch.ops.aten

KEPT_META = ("nn_module_stack",)
"""Metadata a replacement inherits from the node it stands for."""


def _copied(fact: Any) -> Any:
    """A deep copy; faster than `copy.deepcopy` on long lists of numbers, which facts often are."""
    if isinstance(fact, (str, int, float, type(None))):
        return fact
    if type(fact) is dict:
        return {key: _copied(value) for key, value in fact.items()}
    if type(fact) is list:
        return [_copied(value) for value in fact]
    return copy.deepcopy(fact)


class Editor:
    """Edits a copy of a program's graph and state.

    Attributes:
        graph: the copy; walk and match it freely, change it through the methods.
        state: the copy of the name-to-tensor table (the tensors themselves are shared).
        by: id of the pass that edits, recorded on every node it makes.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program = program
        self.by = by
        self.graph = copy_graph(program.graph)
        self.state: dict[str, torch.Tensor] = dict(program.state)
        self.fake_mode = fake_mode_of(self.graph)
        self.facts: dict[str, Any] = _copied(dict(program.facts))
        self.changed = False
        self._stale = False

    # ---- tensors

    def tensor(self, node: Any) -> torch.Tensor | None:
        """The tensor behind a `get_attr` node; None for anything else."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.state.get(str(node.target))
        return None

    def add_state(self, name: str, tensor: torch.Tensor) -> str:
        """Adds a tensor under `name`, or under a free name derived from it; returns the name."""
        free, count = name, 1
        # An nn.Module cannot hold a tensor under the name of one of its methods, as `to`.
        while free in self.state or hasattr(fx.GraphModule, free.rpartition(".")[2]):
            free, count = f"{name}_{count}", count + 1
        self.state[free] = tensor
        self.changed = True
        return free

    def set_state(self, name: str, tensor: torch.Tensor) -> None:
        """Puts another tensor under an existing name; every use sees it."""
        self.state[name] = tensor
        self.changed = True
        for node in self.graph.find_nodes(op="get_attr", target=name):
            self._stale |= tuple(node.meta["val"].shape) != tuple(tensor.shape)
            node.meta["val"] = self.fake(tensor)

    def uses(self, name: str) -> list[fx.Node]:
        """Call nodes that read the tensor `name`."""
        nodes = self.graph.find_nodes(op="get_attr", target=name)
        return [user for node in nodes for user in node.users]

    def get(self, name: str) -> fx.Node:
        """The `get_attr` node of `name`; made at the head of the graph when absent."""
        found: list[fx.Node] = list(self.graph.find_nodes(op="get_attr", target=name))
        if found:
            return found[0]
        first = next(node for node in self.graph.nodes if node.op not in ("placeholder",))
        with self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        node.meta["val"] = self.fake(self.state[name])
        set_gw_meta(node, by=self.by)
        self.changed = True
        return node

    def fake(self, tensor: torch.Tensor) -> FakeTensor:
        """A static-shaped stand-in for a tensor, in the program's fake mode."""
        with torch.no_grad():
            return self.fake_mode.from_tensor(tensor.detach(), static_shapes=True)

    # ---- nodes

    def call(
        self, target: Any, *args: Any, before: fx.Node, like: fx.Node | None = None, **kwargs: Any
    ) -> fx.Node:
        """Inserts a call and computes its shape and dtype.

        Args:
            target: an operator overload, as `torch.ops.aten.linear.default`.
            args: nodes and constants.
            before: node to insert before.
            like: node whose module scope and source the new one inherits; default `before`.
            kwargs: keyword arguments of the call.
        """
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        self._inherit(node, like if like is not None else before)
        node.meta["val"] = self.evaluate(node)
        self.changed = True
        return node

    def evaluate(self, node: fx.Node) -> Any:
        """The node's result on fake tensors."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        return fake_call(node.target, args, kwargs, self.fake_mode)

    def set_args(self, node: fx.Node, *args: Any, **kwargs: Any) -> None:
        """Changes a call's arguments; shapes behind it are propagated by `finish`."""
        node.args, node.kwargs = args, kwargs
        self.changed = self._stale = True

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Lets every user of `old` read `new` instead, and erases `old` when it is dead."""
        for key in KEPT_META:
            if key not in new.meta and key in old.meta:
                new.meta[key] = old.meta[key]
        dropout = gw_meta(old).get("dropout")
        if dropout and new.op == "call_function":
            set_gw_meta(new, dropout=dropout)
        before, after = old.meta.get("val"), new.meta.get("val")
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            self._stale |= before.shape != after.shape or before.dtype != after.dtype
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.changed = True
        if not old.users and old.op not in ("placeholder", "output"):
            self.graph.erase_node(old)

    def erase(self, node: fx.Node) -> None:
        """Erases a node that nothing uses."""
        self.graph.erase_node(node)
        self.changed = True

    def _inherit(self, node: fx.Node, like: fx.Node) -> None:
        for key in KEPT_META:
            if key in like.meta:
                node.meta[key] = like.meta[key]
        set_gw_meta(node, by=self.by, source=gw_meta(like).get("source"))

    # ---- result

    def finish(self, *, propagate: bool | None = None) -> Program:
        """The edited program: dead code out, shapes propagated, unused tensors dropped, linted.

        Args:
            propagate: recompute every shape; by default only when an edit may have changed one.
        """
        if not self.changed:
            return self.program
        # what draws random numbers, as attention may, is dead too where nothing reads it
        self.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        state = {name: tensor for name, tensor in self.state.items() if name in used}
        program = self.program.replace(graph=self.graph, state=state, facts=self.facts)
        if propagate or (propagate is None and self._stale):
            from graphwright.ir.graph.shapes import propagate_shapes

            propagate_shapes(program)
        self.graph.lint()
        return program
