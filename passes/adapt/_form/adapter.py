"""The base of passes that put an adapter beside layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import fx, nn
from typing_extensions import TypeVar

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.adapters.record import Adapter, adapters, record
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.constants import depends_on_input
from graphwright.ir.layers.kinds import PRODUCTS
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Options, Selector
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result

aten = torch.ops.aten


class AdapterOptions(Options):
    """Options of every adapter."""

    targets: Selector = ("kind:linear",)
    """Layers that get an adapter: selector patterns over names and kinds."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")] = "default"
    """Name of the adapter; a program may have several, and their changes add up."""

    also_train: Selector = ()
    """Layers whose own parameters stay trainable, such as a new classifier: selector patterns."""


OptionsT = TypeVar("OptionsT", bound=AdapterOptions, default=AdapterOptions)


class AdapterPass(Pass[OptionsT]):
    """Puts an adapter beside every chosen layer, and freezes all other parameters.

    A subclass says how the nodes are put in (`attach`) and what the layer's weight becomes when
    they are merged into it (`merged`).

    Class attributes:
        kinds: of layers that can be adapted.
    """

    contract: ClassVar[Contract] = "identity_at_init"
    weights: ClassVar[Effect | None] = "kept"
    kinds: ClassVar[tuple[str, ...]] = PRODUCTS

    @abstractmethod
    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        """Adds the nodes beside one call; returns what the layer has now, for the report.

        Args:
            branch: where they go. A layer that is called several times has several, whose tensors
                are the same.
            layer: that is adapted.
            generator: of the layer's random numbers.
        """

    def refusal(self, layer: Layer) -> str:
        """The reason why a layer cannot be adapted; empty where it can.

        Raises:
            ModelError: the options ask of the layer what no layer of its size has.
        """
        return ""

    def prepare(self, program: Program, chosen: Sequence[Layer], context: Context) -> Any:
        """Looks at all layers together, before the first; `attach` has the result in its branch."""
        return None

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        """The weight and the bias with which a layer alone does what it does with its adapter.

        Raises:
            ModelError: the adapter is no linear change of the layer.
        """
        raise ModelError(
            f"an adapter of {cls.id} cannot be merged: it changes {layer.name!r} by more than its "
            "weight",
            fix="Leave it beside the layer; it is exported as it is.",
        )

    @classmethod
    def hooks(cls, program: Program, adapter: Adapter) -> list[Hook]:
        """Hooks with which the adapter takes part in training."""
        return []

    def run(self, program: Program, context: Context) -> Result:
        """Adapts the chosen layers; see the class."""
        targets = select(program, self.options.targets, self.kinds)
        chosen, actions = self.sorted_out(program, targets)
        found = self.prepare(program, chosen, context)
        return self.insert(program, context, chosen, actions, found)

    def sorted_out(
        self, program: Program, targets: Sequence[Layer]
    ) -> tuple[list[Layer], list[Action]]:
        """The layers that can be adapted, and a word on each of the others.

        Raises:
            ArgumentError: the program has an adapter of this name.
            ModelError: none of them can be adapted.
        """
        if self.options.name in adapters(program):
            raise ArgumentError(
                f"the program has an adapter {self.options.name!r} already",
                fix="Set another `name`.",
            )
        chosen, actions = [], []
        for layer in targets:
            if reason := _refusal(layer) or self.refusal(layer):
                actions.append(Action.left(layer.name, reason))
            else:
                chosen.append(layer)
        if not chosen:
            raise _none_left(self.id, actions)
        return chosen, actions

    def insert(
        self,
        program: Program,
        context: Context,
        chosen: Sequence[Layer],
        actions: list[Action],
        found: Any,
        kind: str = "",
        given: Mapping[str, Any] | None = None,
    ) -> Result:
        """Puts the adapter beside the layers, freezes the rest, and records what it did.

        Args:
            program: the program.
            context: of the pass.
            chosen: layers to adapt.
            actions: words on the others; those on these are added.
            found: what `prepare` gave.
            kind: id of the pass that merges and trains the adapter; this one when empty.
            given: options of that pass; those of this one when None.

        Raises:
            ModelError: no layer has got anything.
        """
        options = self.options
        editor = Editor(program, by=self.id)
        parts: dict[str, dict[str, str]] = {}
        scales: dict[str, float] = {}
        shared: dict[str, str] = {}
        residual = False
        for layer in chosen:
            branch = Branch(editor, options.name, layer, found)
            done = self.attach(branch, layer, context.generator(layer.name))
            if not branch.parts:
                actions.append(Action.left(layer.name, done))
            elif layer.name not in parts:
                actions.append(Action(layer.name, done))
                parts[layer.name] = branch.parts
                scales[layer.name] = branch.scale
            residual |= branch.residual
            shared |= branch.shared
        if not parts:
            raise _none_left(self.id, actions)
        frozen = freeze(editor, program, options.also_train)
        given = self.resolved_options() if given is None else given
        record(
            editor,
            Adapter(options.name, kind or self.id, given, parts, scales, residual, frozen, shared),
        )
        result = editor.finish()
        return Result(result, tuple(actions), _counts(result))


def _none_left(by: str, actions: Sequence[Action]) -> ModelError:
    why = tuple(sorted({f"{a.layer}: {a.reason}" for a in actions}))
    return ModelError(f"{by}: no selected layer can be adapted", details=why[:5])


def _refusal(layer: Layer) -> str:
    value = layer.node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return "its output is no floating-point tensor"
    if layer.kind == "addmm" and (len(layer.node.args) > 3 or layer.node.kwargs):
        return "addmm with factors alpha or beta"
    return ""


def freeze(editor: Editor, program: Program, also_train: Sequence[str]) -> tuple[str, ...]:
    """Freezes what was trainable, but for adapters and the layers in `also_train`: those of this
    adapter and those that an earlier one has left trainable."""
    earlier = adapters(program).values()
    kept = {name for adapter in earlier for name in adapter.tensors()}
    if any(adapter.frozen for adapter in earlier):
        kept |= set(program.trainable())
    for layer in select(program, also_train) if also_train else ():
        kept |= _own(layer)
    frozen = [name for name in program.trainable() if name not in kept]
    for name in frozen:
        editor.set_state(name, nn.Parameter(editor.state[name].detach(), requires_grad=False))
    return tuple(frozen)


def _own(layer: Layer) -> set[str]:
    """Names of the stored tensors that a layer reads."""
    found: set[str] = set()
    stack = [node for node in layer.node.all_input_nodes if not depends_on_input(node)]
    while stack:
        node: fx.Node = stack.pop()
        if node.op == "get_attr":
            found.add(str(node.target))
        stack.extend(node.all_input_nodes)
    return found


def _counts(program: Program) -> dict[str, float]:
    trained = sum(p.numel() for p in program.trainable().values())
    total = sum(t.numel() for t in program.state.values() if t.is_floating_point())
    return {
        "adapted_layers": float(sum(len(a.layers) for a in adapters(program).values())),
        "trainable_parameters": float(trained),
        "trainable_share": trained / max(1, total),
    }


def weight_shape(layer: Layer) -> tuple[int, ...]:
    """Shape of a layer's weight."""
    from graphwright.ir.layers.products import weight_node

    value: Any = weight_node(layer).meta["val"]
    return tuple(int(size) for size in value.shape)
