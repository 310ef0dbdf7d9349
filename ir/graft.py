"""Puts the traced graph of an `nn.Module` into a program, between nodes that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.ir.data.synthetic import example_sizes
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.graph.sizes import dimension_names, expression_of


def graft(
    editor: Editor,
    module: nn.Module,
    *reads: fx.Node,
    name: str,
    before: fx.Node,
    shared: Callable[[str], str | None] = lambda _: None,
) -> tuple[fx.Node, ...]:
    """Adds the calls that `module` makes on the values of `reads`; returns those of its outputs.

    The module's parameters and buffers become tensors of the program under `name.`, so that every
    pass finds its layers. Sizes that are free in the program are free in what is added.

    Args:
        editor: of the program that is edited.
        module: takes as many tensors as are read, and returns one or several. Left as it is.
        reads: nodes whose values it is given, in order.
        name: prefix of its tensors.
        before: node to insert before; behind all that is read.
        shared: of the name that a tensor has in the module, the one under which the program has it
            already; None for a tensor of the module's own.

    Raises:
        ModelError: the module cannot be traced at these sizes, or fixes one that is free.
    """
    from graphwright.ir.trace.capture import trace

    examples = [_example(editor, node) for node in reads]
    # other sizes are run with the whole program, when the contract of the pass is checked
    program = trace(module, examples, dynamic=_free_axes(module, reads, examples), check=False)
    _refuse_fixed(program, reads, name)
    made: dict[fx.Node, fx.Node] = {}
    given = iter(reads)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            made[node] = next(given)
        elif node.op == "get_attr":
            stored = program.state[str(node.target)]
            there = shared(str(node.target))
            made[node] = editor.get(there or _stored(editor, f"{name}.{node.target}", stored))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: made[n])
            made[node] = editor.call(node.target, *args, before=before, **kwargs)
    outputs: Any = program.graph.output_node().args[0]
    return tuple(made[node] for node in outputs)


def _stored(editor: Editor, name: str, tensor: Tensor) -> str:
    """Stores a copy that is no view of a larger tensor; the same name for the same tensor."""
    copied = tensor.detach().clone().contiguous()
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return editor.add_state(name, copied)


def _example(editor: Editor, node: fx.Node) -> Tensor:
    """A tensor of the node's dtype and of the size that it has on the program's examples."""
    value: Tensor = node.meta["val"]
    program = editor.program
    sizes = example_sizes(program.signature, program.examples)
    names = {symbol: sizes[named.name] for symbol, named in dimension_names(program).items()}
    shape = [int(expression_of(size).subs(names)) for size in value.shape]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(shape, generator=generator) if value.is_floating_point() else None
    return torch.zeros(shape, dtype=value.dtype) if drawn is None else drawn.to(value.dtype)


def _free_axes(
    module: nn.Module, reads: Sequence[fx.Node], examples: Sequence[Tensor]
) -> dict[str, dict[int, str]]:
    """Axes with free sizes by the names of the module's arguments; equal sizes have one name."""
    import inspect

    names = [p for p in inspect.signature(module.forward).parameters][: len(examples)]
    known: dict[Any, str] = {}
    return {
        name: {
            axis: known.setdefault(expression_of(size), f"size{len(known)}")
            for axis, size in enumerate(node.meta["val"].shape)
            if not isinstance(size, int) and not expression_of(size).is_number
        }
        for name, node in zip(names, reads, strict=True)
    }


def _refuse_fixed(program: Any, reads: Sequence[fx.Node], name: str) -> None:
    for spec, node in zip(program.signature.inputs, reads, strict=True):
        for axis, (size, own) in enumerate(zip(spec.shape, node.meta["val"].shape, strict=True)):
            if isinstance(size, int) and not expression_of(own).is_number:
                raise ModelError(
                    f"{name} can be put in at a fixed size of axis {axis} alone, and the program "
                    "leaves it free",
                    where=node.name,
                    fix="Trace the model with that dimension fixed.",
                )
