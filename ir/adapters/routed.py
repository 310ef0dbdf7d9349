"""A batch in which every sample names its own adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.adapters.branch import Branch, results
from graphwright.ir.adapters.record import Adapter, adapters, forget
from graphwright.ir.adapters.save import low_rank
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.layers.kinds import MATRICES
from graphwright.ir.layers.selectors import Layer, layers
from graphwright.ir.ops.routed_low_rank import routed_low_rank
from graphwright.ir.program import Program
from graphwright.ir.signature import TensorSpec

INPUT = "adapter"
"""Name of the new input."""

FACT = "routed_adapters"
"""Key of the adapters' names, in the order of their numbers, among a program's facts."""

LARGEST_ERROR = 1e-4
"""Of a sample to the program with its adapter alone, relative to the largest value."""


def route_adapters(program: Program) -> Program:
    """The program with an input more: the number of the adapter that each sample goes through.

    The adapters of a program add up; here every sample of a batch has one of them, or none. So one
    artifact serves requests for different adapters in one call and reads the base's weights once.
    It lowers to both backends like every program.

    Args:
        program: with one or more low-rank adapters beside linear layers, and a free batch, which
            is the first axis of every adapted layer's input.

    Returns:
        A program with the input `adapter`, (batch,) int64: a place in
        `facts["routed_adapters"]`, which has the adapters' names, or -1 for the base alone.

    Raises:
        ArgumentError: there is no adapter, or the batch is not free.
        ModelError: an adapter is no plain low-rank change of linear layers, or goes with a residual
            of the weights; or the samples of a batch are not independent of each other.
    """
    found = adapters(program)
    if not found:
        raise ArgumentError("the program has no adapter", fix="Put adapt.lora or adapt.load first.")
    batch = _batch(program)
    stacks = _stacks(program, list(found.values()))
    editor = Editor(program, by="adapters.route")
    which = _add_input(editor, program)
    for layer in layers(program):
        if layer.name not in stacks:
            continue
        branch = Branch(editor, "routed", layer)
        size = branch.input.meta["val"].shape[0]
        if str(size) != str(which.meta["val"].shape[0]):
            raise ModelError(f"the first axis of what {layer.name!r} reads is not the batch")
        last = [branch.call, *results(branch.call, layer.name)][-1]
        a, b = (_stored(editor, f"{layer.name}.{part}.routed", tensor)
                for part, tensor in zip(("lora_a", "lora_b"), stacks[layer.name],
                                        strict=True))  # fmt: skip
        call = branch.add(routed_low_rank, branch.input, a, b, which, branch.call)
        last.replace_all_uses_with(call)
    for name in found:
        forget(editor, name)
    editor.facts[FACT] = list(found)
    done = editor.finish(propagate=True)
    spec = TensorSpec(INPUT, "int64", (batch,), (-1, len(found)))
    count = program.examples[0].shape[0]
    routed = done.replace(
        signature=replace(done.signature, inputs=(*done.signature.inputs, spec)),
        examples=(*done.examples, torch.arange(count) % len(found)),
    )
    _prove(program, routed, batch)
    return routed


def _batch(program: Program) -> str:
    """Name of the batch dimension."""
    signature = program.signature
    first = {spec.shape[0] if spec.shape else 1 for spec in signature.inputs}
    name = first.pop()
    if first or not isinstance(name, str):
        raise ArgumentError(
            "the first axis of all inputs has to be one free batch dimension",
            fix='Trace with dynamic={"input": {0: "batch"}}.',
        )
    if INPUT in {spec.name for spec in signature.inputs}:
        raise ArgumentError(f"the program has an input {INPUT!r} already")
    return name


def _stacks(program: Program, all_: list[Adapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer the factors of all adapters: a (adapters, rank, in), b (adapters, out, rank)."""
    by_name = {layer.name: layer for layer in layers(program)}
    names = list(dict.fromkeys(name for adapter in all_ for name in adapter.layers))
    return {name: _stack(program, all_, by_name[name]) for name in names}


def _stack(program: Program, all_: list[Adapter], layer: Layer) -> tuple[Tensor, Tensor]:
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for adapter in all_:
        names = adapter.layers.get(layer.name)
        if names is None:
            pairs.append(None)
            continue
        parts = {part: program.state[name].detach() for part, name in names.items()}
        if adapter.residual:
            raise ModelError(f"adapter {adapter.name!r} goes with a residual of the weights, which "
                             "the others do not share",
                             fix="Save it with `base`, and load that.")  # fmt: skip
        if layer.kind not in MATRICES or "magnitude" in parts:
            what = "scales the layer too" if "magnitude" in parts else f"is beside a {layer.kind}"
            raise ModelError(f"adapter {adapter.name!r} {what} ({layer.name!r}); plain low-rank "
                             "changes of linear layers alone are routed")  # fmt: skip
        a, b, scale = low_rank(parts, adapter.scales.get(layer.name, 1.0), adapter, layer)
        pairs.append((a, b * scale))
    some = next(pair for pair in pairs if pair is not None)
    rank = max(len(pair[0]) for pair in pairs if pair is not None)
    a_all = some[0].new_zeros(len(all_), rank, some[0].shape[1])
    b_all = some[1].new_zeros(len(all_), some[1].shape[0], rank)
    for number, pair in enumerate(pairs):
        if pair is not None:
            a_all[number, : len(pair[0])] = pair[0]
            b_all[number, :, : len(pair[0])] = pair[1]
    return a_all, b_all


def _stored(editor: Editor, name: str, tensor: Tensor) -> fx.Node:
    if name not in editor.state:
        name = editor.add_state(name, nn.Parameter(tensor, requires_grad=False))
    return editor.get(name)


def _add_input(editor: Editor, program: Program) -> fx.Node:
    """The new placeholder, behind the others."""
    last = [n for n in editor.graph.nodes if n.op == "placeholder"][-1]
    size = last.meta["val"].shape[0]
    with editor.graph.inserting_after(last):
        node = editor.graph.placeholder(INPUT)
    with editor.fake_mode:
        node.meta["val"] = torch.empty((size,), dtype=torch.int64)
    return node


def _prove(program: Program, routed: Program, batch: str) -> None:
    """Compares every sample of a mixed batch with the program that has its adapter alone.

    Raises:
        ModelError: one differs.
    """
    outputs = program.signature.outputs
    names = list(adapters(program))
    least = max(2, len(names) + 1)
    times = -(-least // program.examples[0].shape[0])
    inputs: tuple[Tensor, ...] = tuple(torch.cat([x] * times) for x in program.examples)
    which = torch.arange(len(inputs[0])) % (len(names) + 1) - 1
    by_name = [spec.name for spec in program.signature.inputs]
    with torch.no_grad():
        ours = _flat(routed, dict(zip((*by_name, INPUT), (*inputs, which), strict=True)))
        for number in range(-1, len(names)):
            own = which == number
            alone = _flat(_alone(program, names, number), dict(zip(by_name, inputs, strict=True)))
            for spec, one, other in zip(outputs, ours, alone, strict=True):
                fits = spec.shape[:1] == (batch,)
                error = (one[own] - other[own]).abs().max() if fits else torch.tensor(torch.inf)
                if not float(error) <= LARGEST_ERROR * float(other.abs().max()):
                    raise ModelError(
                        f"the samples of a batch depend on each other: output {spec.name!r} of a "
                        "mixed batch is not that of the samples' own adapters"
                    )


def _alone(program: Program, names: list[str], number: int) -> Program:
    """The program in which all other adapters are zero."""
    state: dict[str, Any] = dict(program.state)
    for place, adapter in enumerate(adapters(program).values()):
        if place != number:
            for name in adapter.tensors():
                if state[name].is_floating_point():
                    state[name] = torch.zeros_like(state[name].detach())
    return program.replace(state=state)


def _flat(program: Program, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = program.module(*program.bind(**inputs))
    return found
