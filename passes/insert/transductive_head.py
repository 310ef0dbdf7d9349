"""insert.transductive_head: a classifier that labels the samples of a batch together."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graft import graft
from graphwright.ir.layers.kinds import INPUT_ARGUMENT
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.modules.transductive import LogitAssignment, PrototypeAssignment
from graphwright.ir.options import Bounded, Rule
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Contract, Effect, Need, Pass, Result
from graphwright.passes.insert._form.places import in_editor
from graphwright.passes.insert._form.support import support_means


class TransductiveHeadOptions(Bounded):
    """Options of insert.transductive_head."""

    rules = (
        Rule(
            "refine",
            "cost == 'prototypes' or not refine",
            "refine moves prototypes, and cost {cost} has none",
        ),
        Rule(
            "sharpness",
            "cost == 'prototypes' or sharpness == 1",
            "sharpness has no part in cost {cost}",
        ),
    )

    cost: Literal["prototypes", "logits"] = "prototypes"
    """What a class costs a sample: its squared distance to the mean of the class's training
    samples, features centred and of length 1 (the paper's); or the layer's own negative logit,
    which needs no data."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the Laplacian term, lambda; to be chosen on validation data. 0 labels every sample
    by itself."""

    neighbours: Annotated[int, Field(ge=1)] = 3
    """Nearest neighbours of a sample in the batch."""

    steps: Annotated[int, Field(ge=1, le=64)] = 20
    """Updates of the assignment, unrolled in the graph."""

    sharpness: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the distances to prototypes; large ones make assignments hard."""

    refine: bool = False
    """Prototypes move to the means of training samples and batch by the assignment so far, before
    every update (soft K-means)."""

    allow_batch_coupling: bool = False
    """Has to be true for a program of any batch size: a sample's result depends on the others of
    its batch, so that a server must not put strangers together or cut a batch in two."""


class TransductiveHead(Pass[TransductiveHeadOptions]):
    """Lets the last layer of a classifier label a batch together instead of sample by sample.

    Assignments Y of samples to classes minimize sum(Y log Y + Y a) - lambda/2 tr(Y^T W Y): a class
    costs a sample a, and near samples want the same class. W is the graph of nearest neighbours of
    the features that the layer reads, made symmetric, without the sample itself. The solution is a
    fixed point, Y = softmax(-a + lambda W Y), of which `steps` updates are unrolled from
    Y = softmax(-a) on. The output has the form of logits: its softmax is Y.

    With `cost: prototypes` the training data is the labelled support; it has samples of every
    class that the layer has. There is no training.

    Source: P53, "Transductive few-shot learning: clustering is all you need?", equations 6 and 9,
    without the stop on the energy (the number of updates is fixed, for a graph has no loop). W is
    the mean of the raw graph of neighbours and its transpose, which gives the energy of the
    released code of LaplacianShot and, other than the raw graph, updates that lower it.
    """

    papers = ("P53",)
    contract: ClassVar[Contract] = "lossy"
    weights: ClassVar[Effect | None] = "kept"
    needs: ClassVar[Need] = "training"
    needs_with: ClassVar[dict[tuple[str, Any], Need]] = {("cost", "logits"): "nothing"}
    after = ("cleanup.*", "prune.*", "tune.*")

    def run(self, program: Program, context: Context) -> Result:
        """Puts the head in.

        Raises:
            ModelError: no linear layer on rows of features gives an output; or the batch is free
                and coupling is not allowed, or is of one sample.
            ArgumentError: the training data has no labels, wrong ones, or none of some class.
        """
        layer = _head(program, self.id)
        _refuse_batch(layer, self.options.allow_batch_coupling, self.id)
        module = self._module(program, layer, context)
        editor = Editor(program, by=self.id)
        call = in_editor(editor, layer.node)
        features: Any = call.args[INPUT_ARGUMENT[layer.kind]]
        reads = (features, call) if self.options.cost == "logits" else (features,)
        name, output = f"{layer.name}.transductive", editor.graph.output_node()
        (scores,) = graft(editor, module, *reads, name=name, before=output)
        output.replace_input_with(call, scores)
        editor.changed = True
        classes = int(call.meta["val"].shape[1])
        said = f"{classes} classes, {self.options.steps} updates, {self.options.cost}"
        metrics = {"classes": float(classes), "updates": float(self.options.steps)}
        return Result(editor.finish(), (Action(layer.name, said),), metrics)

    def _module(self, program: Program, layer: Layer, context: Context) -> nn.Module:
        options = self.options
        if options.cost == "logits":
            return LogitAssignment(options.neighbours, options.weight, options.steps)
        value: Tensor = layer.node.meta["val"]
        features: Any = layer.node.args[INPUT_ARGUMENT[layer.kind]]
        support = support_means(
            program, features.name, int(value.shape[1]), context.training_data, self.id
        )
        sums, counts, mean = (part.to(value.dtype) for part in support)
        return PrototypeAssignment(
            sums, counts, mean, sharpness=options.sharpness, refine=options.refine,
            neighbours=options.neighbours, weight=options.weight, steps=options.steps,
        )  # fmt: skip


def _head(program: Program, by: str) -> Layer:
    """The linear layer whose rows (N, K) are an output."""
    outputs = program.graph.output_node().all_input_nodes
    found = [
        layer for layer in layers(program, ("linear",))
        if layer.node in outputs and layer.node.meta["val"].dim() == 2
    ]  # fmt: skip
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            f"{by}: {len(found)} linear layers give an output: "
            f"{', '.join(layer.name for layer in found[:3])}",
            fix="It takes a classifier with one.",
        )
    first: fx.Node = outputs[0]
    raise ModelError(
        f"{by}: no output is what a linear layer makes of rows of features (batch, features)",
        where=first.name,
        fix="The classifier's logits have to be its output, without a softmax behind them.",
    )


def _refuse_batch(layer: Layer, allowed: bool, by: str) -> None:
    batch = layer.node.meta["val"].shape[0]
    if isinstance(batch, torch.SymInt) and not allowed:
        raise ModelError(
            f"{by}: the program takes any batch size, and every sample's result would depend on "
            "the others of its batch",
            where=layer.node.name,
            fix="Set `allow_batch_coupling: true` where whole batches are what you classify, or "
            "trace the model at a fixed batch size.",
        )
    if batch == 1:
        raise ArgumentError(
            f"{by}: the program's batch is one sample, which has no neighbours",
            fix="Trace the model with a larger batch, or a free one.",
        )
