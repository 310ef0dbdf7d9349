"""adapt.wta_crs: layers that keep only some rows of their input for training."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import fx

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.adapters.record import Adapter, adapters, record
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.nodes import full_arguments
from graphwright.ir.layers.selectors import Layer, select
from graphwright.ir.options import Selector
from graphwright.ir.program import Program
from graphwright.ir.tune.hooks import Hook
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass
from graphwright.passes.adapt._math.column_row import sampled_linear
from graphwright.passes.base import Action, Context, Result

aten = torch.ops.aten


class WtaCrsOptions(AdapterOptions):
    """Options of adapt.wta_crs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")] = "wta_crs"
    """Name of the rule among the program's adapters."""

    targets: Selector = ("kind:linear",)
    """Linear layers that keep few rows: selector patterns over names and kinds."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the rows (samples times tokens) that is kept."""

    least: Annotated[int, Field(ge=1)] = 10
    """Rows that are kept in any case."""


class WtaCrs(AdapterPass[WtaCrsOptions]):
    """Lets linear layers keep few rows of their input for the gradient of their weight.

    A training step remembers what every trained layer has read, which is most of its memory. Here
    a layer remembers the rows that count most, and a random few of the others, weighted so that
    the gradient of the weight is right on average. Results, and all other gradients, are exact. It
    holds for the trained weights of a layer: its own, or those of adapters that were put in
    before. The program itself stays as it is, and nothing is frozen.

    Source: Liu et al. 2023, "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of
    Language Model", equations 6 to 8. Rows count by their own norm: the gradient's norm of the last
    epoch, which the paper multiplies it with, needs a number for every sample of the data. The
    random part is always divided by its probabilities (the published code leaves that out in the
    first epoch).
    """

    papers = ("P38",)
    kinds = ("linear",)

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        raise AssertionError("nothing is put beside a layer")

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        if options.name in adapters(program):
            raise ArgumentError(
                f"the program has an adapter {options.name!r} already", fix="Set another `name`."
            )
        trainable = program.trainable()
        actions: list[Action] = []
        chosen: dict[str, dict[str, str]] = {}
        for layer in select(program, options.targets, self.kinds):
            beside = [parts for a in adapters(program).values() for name, parts in a.layers.items()
                      if name == layer.name]  # fmt: skip
            has_own = layer.weight in trainable
            if has_own or any(n in trainable for parts in beside for n in parts.values()):
                chosen[layer.name] = {}
                actions.append(Action(layer.name, f"keeps {options.share:.0%} of its rows"))
            else:
                actions.append(Action.left(layer.name, "nothing of it is trained"))
        if not chosen:
            raise ModelError(f"{self.id}: nothing of the selected layers is trained",
                             fix="Put it behind the adapters that are to be trained.")  # fmt: skip
        editor = Editor(program, by=self.id)
        record(editor, Adapter(options.name, self.id, self.resolved_options(), chosen))
        return Result(editor.finish(), tuple(actions))

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        return layer.weight, layer.bias

    @classmethod
    def hooks(cls, program: Program, adapter: Adapter) -> list[Hook]:
        return [FewRows(program, adapter)]


class FewRows(Hook):
    """Puts the products that keep few rows into the training graph."""

    def __init__(self, program: Program, adapter: Adapter) -> None:
        self.share, self.least = float(adapter.options["share"]), int(adapter.options["least"])
        trainable = program.trainable()
        own = {layer.weight for layer in select(program, list(adapter.layers), ("linear",))}
        own |= {n for a in adapters(program).values() for layer in adapter.layers
                for n in a.layers.get(layer, {}).values()}  # fmt: skip
        self.weights = own & set(trainable)

    def on_graph(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.linear.default):
            args, _ = full_arguments(node)
            weight = args[1]
            if not isinstance(weight, fx.Node) or str(weight.target) not in self.weights:
                continue
            with graph.inserting_before(node):
                call = (*args[:3], self.share, self.least)
                new = graph.call_function(sampled_linear, call)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
