"""insert.scale_affine: scales and shifts of a feature map that follow from the map itself."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.nodes import op_name
from graphwright.ir.layers.kinds import (
    CONVOLUTIONS,
    INPUT_ARGUMENT,
    TRANSPOSED_CONVOLUTIONS,
)
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.modules.scale_affine import ScaleAffine as Module
from graphwright.ir.options import Selector
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result
from graphwright.passes.insert._form.places import (
    InsertOptions,
    apply_freeze,
    in_editor,
    put_behind,
    put_in_front,
    seeded,
)


class ScaleAffineOptions(InsertOptions):
    """Options of insert.scale_affine."""

    targets: Selector = ("*",)
    """Convolutions that get a layer: selector patterns over names and kinds."""

    place: Literal["output", "input"] = "output"
    """Where it goes: behind the convolution and the norm that follows it (an encoder), or in front
    of the convolution (a decoder)."""


class ScaleAffine(Pass[ScaleAffineOptions]):
    """Puts scale affine layers behind, or in front of, convolutions.

    The layer multiplies every value of a feature map by 1 + s and adds t; both come from the map
    through two pointwise convolutions with a GELU between them. The last one starts at zero, so
    that the network is the same until it is trained (the released code starts it at random). The
    change depends on the input, so that it stays in the graph.

    Source: P76, section 3.4.
    """

    papers = ("P76",)
    contract: ClassVar[Contract] = "identity_at_init"
    weights: ClassVar[Effect | None] = "kept"

    def run(self, program: Program, context: Context) -> Result:
        """Inserts a layer at every chosen convolution that is called once.

        Raises:
            ModelError: no chosen convolution can have one.
        """
        options = self.options
        editor = Editor(program, by=self.id)
        chosen = select(program, options.targets, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS))
        calls = Counter(layer.name for layer in chosen)
        actions: dict[str, Action] = {}
        for layer in chosen:
            reason = _refusal(layer, calls[layer.name])
            actions[layer.name] = (
                Action.left(layer.name, reason) if reason else self._insert(editor, layer, context)
            )
        if not any(action.changed for action in actions.values()):
            why = tuple(f"{a.layer}: {a.reason}" for a in actions.values())
            raise ModelError(f"{self.id}: no chosen convolution can have a layer", details=why[:5])
        apply_freeze(editor, options.freeze)
        return Result(editor.finish(), tuple(actions.values()))

    def _insert(self, editor: Editor, layer: Layer, context: Context) -> Action:
        call = in_editor(editor, layer.node)
        index = INPUT_ARGUMENT[layer.kind]
        tip: Any = call.args[index] if self.options.place == "input" else _normed(call)
        value: Tensor = tip.meta["val"]
        channels = int(value.shape[1])
        module = seeded(Module, context.generator(layer.name), channels, value.dim())
        module = module.to(value.dtype)
        name = f"{layer.name}.scale_affine"
        if self.options.place == "input":
            put_in_front(editor, call, index, module, name)
        else:
            put_behind(editor, tip, module, name)
        return Action(layer.name, f"scale affine of {channels} channels")


def _refusal(layer: Layer, calls: int) -> str:
    value = layer.node.meta.get("val")
    if calls > 1:
        return f"it is called {calls} times"
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return "its output is no floating-point tensor"
    return ""


def _normed(call: fx.Node) -> fx.Node:
    """The value behind a convolution and the norm that alone reads it."""
    readers = list(call.users)
    if len(readers) == 1 and "norm" in op_name(readers[0]):
        norm = readers[0]
        if norm.args[0] is call and isinstance(norm.meta.get("val"), torch.Tensor):
            return norm
    return call
