"""adapt.degradation_lora: low-rank changes that depend on how an input is degraded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import fx, nn

from graphwright.ir.adapters.branch import Branch
from graphwright.ir.adapters.merging import Adapted, Merged
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.inline import inline
from graphwright.ir.graph.nodes import set_gw_meta
from graphwright.ir.layers.kinds import CONVOLUTIONS, MATRICES
from graphwright.ir.layers.selectors import Layer
from graphwright.ir.mode import NORMS
from graphwright.ir.options import Rule
from graphwright.ir.program import Program
from graphwright.ir.tune.options import Function
from graphwright.passes.adapt._form.adapter import AdapterOptions, AdapterPass
from graphwright.passes.adapt._form.conditioned import Conditioning, block_of, number_blocks
from graphwright.passes.adapt._form.low_rank import back, groups_of, matrix_shape, shapes, through
from graphwright.passes.base import Context

aten = torch.ops.aten


class DegradationLoraOptions(AdapterOptions):
    """Options of adapt.degradation_lora."""

    rank: Annotated[int, Field(ge=1)] = 32
    """Rank of every layer's change (the paper's, for a U-Net; 16 for its encoder)."""

    alpha: Annotated[float, Field(gt=0)] = 8.0
    """The change is multiplied by alpha / rank."""

    estimator: Annotated[Function | None, Field(examples=["my_nets:estimator"])] = None
    """Function that gives the module which estimates the degradation: its arguments are inputs of
    the program, by name, and its result (batch, numbers) from 0 to 1. It becomes a part of the
    program, frozen."""

    degradation: str = ""
    """In the place of `estimator`: input of the program with these numbers."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("estimator", "('estimator' in given) != ('degradation' in given)",
             "give estimator, or degradation, an input of the program"),
    )  # fmt: skip


class DegradationLora(AdapterPass[DegradationLoraOptions]):
    """Lets every chosen layer compute W x + s b C^T a x with a C that depends on the sample.

    An estimate of how a sample is degraded (blur and noise, say) is seen at random frequencies;
    from it, and from what is learned of the block that a layer is in, a network makes the matrix C
    (rank, rank) between a and b, one for every sample and block. b starts at zero. As the change
    differs from sample to sample, it stays in the graph, with the estimator in front of it.

    Source: Zhang et al. 2024, "Degradation-Guided One-Step Image Super-Resolution with Diffusion
    Priors" (S3Diff), section 3.2, and the published code. C starts as the identity (there as next
    to nothing, from where b learns very slowly).
    """

    papers = ("P17",)
    kinds = (*MATRICES, *CONVOLUTIONS)

    def prepare(
        self, program: Program, chosen: Sequence[Layer], context: Context
    ) -> tuple[Conditioning, Program | None, torch.Generator]:
        """The network's plan, and the estimator as a program.

        Raises:
            ArgumentError: the estimator does not fit the program's inputs.
            ModelError: it cannot be frozen, or `degradation` has another shape.
        """
        options = self.options
        blocks = number_blocks(layer.name for layer in chosen)
        conditioning = Conditioning(options.name, blocks, options.rank)
        estimator = None
        if options.estimator is not None:
            estimator = _estimator(program, options.estimator, context)
        else:
            _check_input(program, options.degradation, self.id)
        return conditioning, estimator, context.generator("degradation")

    def refusal(self, layer: Layer) -> str:
        rank = self.options.rank
        if rank > min(matrix_shape(layer)):
            raise ModelError(
                f"rank {rank} is larger than layer {layer.name!r} allows, a matrix of "
                f"{' by '.join(map(str, matrix_shape(layer)))}",
                fix="Take a smaller rank, which all layers share, or leave the layer out.",
            )
        if groups_of(layer) > 1:
            return "a grouped convolution's change has no matrix that groups share"
        value = layer.node.meta["val"]
        return "its output has no batch" if value.dim() < 2 else ""

    def attach(self, branch: Branch, layer: Layer, generator: torch.Generator) -> str:
        conditioning: Conditioning
        conditioning, estimator, own = branch.found
        if conditioning.values is None:
            before = next(n for n in branch.editor.graph.nodes if n.op == "call_function")
            values = self._values(branch.editor, estimator, before)
            conditioning.build(branch.editor, values, before, own)
        program = branch.editor.program
        batch, other = (_batch(program, n) for n in (branch.input, conditioning.values))
        if batch != other:
            return f"its input has a batch of {batch}, and the degradation one of {other}"
        rank = self.options.rank
        size_a, size_b = shapes(layer, rank)
        a = torch.randn(size_a, generator=generator) / rank
        stored_a = branch.parameter("conditioned_a", a)
        stored_b = branch.parameter("conditioned_b", torch.zeros(size_b))
        branch.shared = dict(conditioning.shared)
        branch.scale = self.options.alpha / rank
        low = through(branch, layer, stored_a)
        low = _times(branch, layer, low, conditioning.matrix(layer.name))
        low = branch.add(aten.mul.Scalar, low, branch.scale)
        change = back(branch, layer, low, stored_b)
        branch.finish(branch.add(aten.add.Tensor, branch.tip, change))
        return f"rank {rank}, block {block_of(layer.name)}"

    def _values(self, editor: Editor, estimator: Program | None, before: fx.Node) -> fx.Node:
        """The node of the degradation (batch, numbers)."""
        inputs: dict[str, fx.Node] = {
            str(n.target): n for n in editor.graph.find_nodes(op="placeholder")
        }
        if estimator is None:
            return inputs[self.options.degradation]
        known = set(editor.graph.nodes)
        given = {spec.name: inputs[spec.name] for spec in estimator.signature.inputs}
        prefix = f"estimator_{self.options.name}"
        (values,) = inline(editor, estimator, given, prefix=prefix, before=before)
        for node in editor.graph.nodes:
            if node not in known and node.op == "call_function":
                set_gw_meta(node, adapter=self.options.name)
        return values

    @classmethod
    def merged(cls, layer: Adapted) -> Merged:
        raise ModelError(
            f"the adapter beside {layer.name!r} changes from sample to sample with its "
            "degradation: no one weight does what it does",
            fix="Leave it beside the layer; it is exported as it is.",
        )


def _times(branch: Branch, layer: Layer, low: fx.Node, matrix: fx.Node) -> fx.Node:
    """`low` with C^T applied to the rank of every position: t'[r] = sum over k of t[k] C[k, r]."""
    dim = low.meta["val"].dim()
    is_convolution = layer.kind in CONVOLUTIONS
    if is_convolution:
        low = branch.add(aten.permute.default, low, [0, *range(2, dim), 1])
    elif dim == 2:
        low = branch.add(aten.unsqueeze.default, low, 1)
    for _ in range(max(dim, 3) - 3):
        matrix = branch.add(aten.unsqueeze.default, matrix, 1)
    low = branch.add(aten.matmul.default, low, matrix)
    if is_convolution:
        return branch.add(aten.permute.default, low, [0, dim - 1, *range(1, dim - 1)])
    return branch.add(aten.squeeze.dim, low, 1) if dim == 2 else low


def _batch(program: Program, node: fx.Node | None) -> str:
    """Size of a value's first axis: a number, or the free sizes of the inputs that it is."""
    assert node is not None
    found = str(node.meta["val"].shape[0])
    for spec in program.signature.inputs:
        given = next(n for n in program.graph.nodes if n.name == spec.name).meta["val"].shape
        for size, symbol in zip(spec.shape, given, strict=True):
            if isinstance(size, str):
                found = re.sub(rf"\b{re.escape(str(symbol))}\b", size, found)
    return found


def _estimator(program: Program, name: str, context: Context) -> Program:
    """The estimator, traced on the program's own examples."""
    from graphwright.ir.data.sources import import_object
    from graphwright.ir.trace.capture import trace

    made = import_object(name, context.folder, "the estimator")
    module = made if isinstance(made, nn.Module) else made()
    if not isinstance(module, nn.Module):
        raise ArgumentError("gives no torch module", where=name)
    specs = {spec.name: spec for spec in program.signature.inputs}
    wanted = [p.name for p in inspect.signature(module.forward).parameters.values()
              if p.default is p.empty]  # fmt: skip
    if missing := [argument for argument in wanted if argument not in specs]:
        raise ArgumentError(f"the estimator asks for {missing[0]!r}, which is no input",
                            where=name, fix=f"Inputs are {', '.join(specs)}.")  # fmt: skip
    examples = dict(zip(specs, program.examples, strict=True))
    free = {n: {axis: size for axis, size in enumerate(specs[n].shape) if isinstance(size, str)}
            for n in wanted}  # fmt: skip
    given = {n: examples[n] for n in wanted}
    used = {d for axes in free.values() for d in axes.values()}
    dims = {d: bounds for d, bounds in program.signature.dims.items() if d in used}
    found = trace(module.eval(), given, free, dims=dims)
    kept = [spec.shape for spec in found.signature.inputs]
    if kept != [specs[n].shape for n in wanted]:
        raise ModelError(f"the estimator takes inputs of {kept} alone", where=name,
                         fix="Let it run at every size that the program takes.")  # fmt: skip
    (output,) = (*found.signature.outputs,) if len(found.signature.outputs) == 1 else (None,)
    if output is None or len(output.shape) != 2 or not isinstance(output.shape[1], int):
        raise ModelError("the estimator's result is not one tensor (batch, numbers)", where=name)
    return _frozen(found, name, context)


def _frozen(estimator: Program, name: str, context: Context) -> Program:
    """The estimator without batch norms, whose statistics training would move."""
    from graphwright.passes.base import find_pass

    folded: Program = find_pass("cleanup.fold_batch_norm")().run(estimator, context).program
    for node in folded.graph.nodes:
        if node.target in NORMS and isinstance(node.args[3], fx.Node):
            raise ModelError(f"the estimator has a norm whose statistics would be trained: "
                             f"{node.name}", where=name, fix="Fold it into a layer.")  # fmt: skip
    return folded


def _check_input(program: Program, name: str, by: str) -> None:
    inputs = {spec.name: spec for spec in program.signature.inputs}
    if name not in inputs:
        raise ArgumentError(f"{by}: the program has no input {name!r}",
                            fix=f"Its inputs are {', '.join(inputs)}.")  # fmt: skip
    spec = inputs[name]
    if len(spec.shape) != 2 or not isinstance(spec.shape[1], int) or "float" not in spec.dtype:
        raise ModelError(f"{by}: the input {name!r} is {spec.dtype} {spec.shape}, and not numbers "
                         "(batch, count)")  # fmt: skip
