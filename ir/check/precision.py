"""Runs a program node by node, in float64 or in its own precision; keeps a value while it is read.

In float64 every stored tensor is widened where it is read, one at a time, and every cast to a
shorter type is left out: the function that the program stands for, without rounding on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir.graph.turns import in_turn
from graphwright.ir.program import Program

ROUNDOFF = {"float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}
"""Spacing of the numbers above 1, by float type."""

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}

REINTERPRETS = (torch.ops.aten.view.dtype,)
"""Ops that read the bits of their operand, which a wider type has not got."""


def roundoff(program: Program) -> float:
    """Coarsest roundoff among a program's own float tensors and outputs; float32's without any."""
    names = {str(t.dtype).removeprefix("torch.") for t in program.state.values()}
    names |= {spec.dtype for spec in program.signature.outputs}
    return max((ROUNDOFF[name] for name in names if name in ROUNDOFF), default=2**-23)


def widened(value: Any) -> Any:
    """The same nest with every float tensor as float64, every complex one as complex128."""
    if isinstance(value, Tensor):
        return value.to(WIDE[value.dtype]) if value.dtype in WIDE else value
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """Random numbers drawn inside on the CPU are the same at every entry, and move no stream."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def draws(target: Any) -> bool:
    """Whether an operator draws random numbers."""
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    return torch.Tag.nondeterministic_seeded in tags


class Walk:
    """One run of a program whose steps the caller takes, one node after the other.

    Attributes:
        program: what is run.
        wide: run in float64 instead of the program's own precision.
        values: results of the nodes that are still to be read.
        narrow: nodes with an op that has no float64 form, or one behind which it was run in its
            own precision.
        drawn: calls so far that draw random numbers; each has draws of its own, the same in
            every walk.
    """

    def __init__(self, program: Program, inputs: tuple[Tensor, ...], *, wide: bool) -> None:
        self.program, self.wide = program, wide
        self.values: dict[fx.Node, Any] = {}
        self.narrow: set[fx.Node] = set()
        self.drawn = 0
        self.readers = {node: len(node.users) for node in program.graph.nodes}
        placeholders = program.graph.find_nodes(op="placeholder")
        for node, tensor in zip(placeholders, program.filled(inputs), strict=True):
            self.values[node] = widened(tensor) if wide else tensor

    def step(self, node: fx.Node) -> Any:
        """Computes a call, keeps its value until it is released, and returns it."""
        if node.op != "call_function":
            return self.values.get(node)
        target = node.target
        assert callable(target)
        self.drawn += draws(target)
        with torch.no_grad(), same_draws(self.drawn) if draws(target) else nullcontext():
            if self.wide:
                self.values[node] = self._wide(node, target)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
                self.values[node] = target(*args, **kwargs)
        return self.values[node]

    def value(self, node: fx.Node) -> Any:
        """Value of a node that was computed, or of a stored tensor, as it is kept."""
        if node.op == "get_attr":
            stored = self.program.state[str(node.target)]
            return widened(stored) if self.wide else stored
        return self.values[node]

    def release(self, node: fx.Node) -> None:
        """Says that `node` has read its operands; drops those that nobody else will read."""
        for operand in node.all_input_nodes:
            self.let_go(operand)
        if self.readers[node] <= 0:
            self.values.pop(node, None)

    def hold(self, nodes: Iterable[fx.Node]) -> None:
        """Keeps the values of `nodes` until each is let go."""
        for node in nodes:
            self.readers[node] += 1

    def let_go(self, node: fx.Node) -> None:
        """Ends one reader's interest in the value of `node`."""
        self.readers[node] -= 1
        if self.readers[node] <= 0:
            self.values.pop(node, None)

    def _wide(self, node: fx.Node, target: Any) -> Any:
        if target not in REINTERPRETS:
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._wide_argument)
            try:
                return fx.node.map_aggregate(target(*args, **kwargs), widened)
            except Exception:  # however an op says that it has no float64 form
                pass  # as the program itself computes it, below
        self.narrow.add(node)
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: own_precision(self.value(n), n.meta.get("val"))
        )
        return fx.node.map_aggregate(target(*args, **kwargs), widened)

    def _wide_argument(self, argument: Any) -> Any:
        return self.value(argument) if isinstance(argument, fx.Node) else widened(argument)


def own_precision(value: Any, like: Any) -> Any:
    """`value` in the dtypes of `like`, nests alike; what has no counterpart stays as it is."""
    if isinstance(value, Tensor) and isinstance(like, Tensor):
        return value.to(like.dtype)
    if isinstance(value, (list, tuple)) and isinstance(like, (list, tuple)):
        parts = [own_precision(v, other) for v, other in zip(value, like, strict=False)]
        return type(value)(parts) if type(value) in (list, tuple) else tuple(parts)
    return value


def run_in_double(
    program: Program,
    inputs: tuple[Tensor, ...],
    replaced: Mapping[str, Callable[[Any], Any]] | None = None,
) -> tuple[Tensor, ...]:
    """Flat outputs of the program computed in float64.

    Args:
        program: left as it is; no stored tensor is written to.
        inputs: one tensor per input, in the signature's dtypes.
        replaced: by node name, a function from the node's value to the one its readers get.

    Returns:
        one tensor per output: float64 where the program gives floats.
    """
    walk = Walk(program, inputs, wide=True)
    for node in in_turn(program.graph):
        if node.op == "output":
            found: Any = fx.map_arg(node.args[0], walk.value)
            return tuple(found)
        walk.step(node)
        if replaced and node.name in replaced:
            walk.values[node] = replaced[node.name](walk.values[node])
        walk.release(node)
    raise AssertionError("a graph ends with its output")
